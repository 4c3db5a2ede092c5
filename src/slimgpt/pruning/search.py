"""Search: choose the widths that the whole model likes best.

The sensitivity pass prices the error of each sublayer; the widths follow from the prices. The
prices are right to first order only, so the search tilts them, prunes part of the samples to the
widths that follow, and measures the divergence of that model on held-out tokens. Each trial is a
sequential pass as in the final run, without refit: inherited errors and their correction count.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from slimgpt.allocation.compass import Point, compass_search
from slimgpt.allocation.shapes import BlockShape, BlockWidths
from slimgpt.pruning.job import Job
from slimgpt.pruning.plan import without_dropped
from slimgpt.pruning.sensitivity import Measurement, divergence_at, measure, reallocate
from slimgpt.runtime.distributed import broadcast
from slimgpt.runtime.run_directory import TRIALS_FILE

log = logging.getLogger(__name__)

# First steps of the logarithm of the prices: later layers dearer; attention dearer; dear sublayers
# dearer; both ends dearer.
STEPS = (0.6, 0.5, 0.25, 0.6)
NUM_HALVINGS, LEAST_GAIN = 2, 0.003


@dataclass(frozen=True)
class Trial:
    """Widths that were tried.

    Attributes
    ----------
    widths : list of tuple of int
        The widths.
    divergence : float
        KL(dense model ‖ pruned model) on held-out calibration tokens, in nats per token.
    seconds : float
        Duration of the trial.
    """

    widths: list[BlockWidths]
    divergence: float
    seconds: float


def searched_widths(job: Job) -> list[BlockWidths]:
    """Choose the widths of least divergence that a compass search over the prices finds.

    The first trial has the widths that `measured_widths` returns, so the result is not worse in
    this measure. After `search_budget` minutes of trials, no other one begins.

    Parameters
    ----------
    job : Job
        Its run directory stores the trials. An interrupted search continues from there.
    """
    measurement, trials = measure(job), _finished(job)
    shapes, _ = without_dropped(job.shapes, measurement.widths)

    def value(point: Point) -> float:
        widths = reallocate(job, measurement, tilted(shapes, measurement, point))
        known = [trial.divergence for trial in trials if trial.widths == widths]
        if known:
            return known[0]
        if trials and sum(trial.seconds for trial in trials) >= 60 * job.config.search_budget:
            return math.inf
        trials.append(_try(job, widths))
        job.run.write(TRIALS_FILE, json.dumps([asdict(trial) for trial in trials]))
        best = min(trial.divergence for trial in trials)
        log.info("search, trial %d: KL %.4f, best %.4f", len(trials), trials[-1].divergence, best)
        return trials[-1].divergence

    compass_search(value, STEPS, NUM_HALVINGS, LEAST_GAIN)
    return min(trials, key=lambda trial: trial.divergence).widths


def tilted(
    shapes: Sequence[BlockShape], measurement: Measurement, point: Point
) -> list[list[float]]:
    """Multiply the prices by factors with four parameters.

    The logarithm of the factor is a z + b [attention] + c (ln cost − mean ln cost) + d (z² − 1/3),
    where z runs from −1 in the first block to 1 in the last.
    """
    depth, attention, contrast, ends = point
    costs = measurement.costs
    logs = [math.log(cost) for block in costs for cost in block if cost > 0]
    mean = sum(logs) / max(len(logs), 1)

    def factor(place: float, kind: str, cost: float) -> float:
        log_factor = depth * place + ends * (place**2 - 1 / 3) + attention * (kind == "attention")
        return math.exp(log_factor + contrast * (math.log(cost) - mean)) if cost > 0 else 1.0

    return [
        [
            price * factor(2 * index / max(len(costs) - 1, 1) - 1, sublayer.kind, cost)
            for sublayer, cost, price in zip(shape.sublayers, *block, strict=True)
        ]
        for index, (shape, *block) in enumerate(zip(shapes, costs, measurement.prices, strict=True))
    ]


def _try(job: Job, widths: Sequence[BlockWidths]) -> Trial:
    start = time.monotonic()
    found = divergence_at(job, widths)
    return Trial(list(widths), found, broadcast(time.monotonic() - start))


def _finished(job: Job) -> list[Trial]:
    if not job.run.all_have(TRIALS_FILE):
        return []
    return TypeAdapter(list[Trial]).validate_json(job.run.read(TRIALS_FILE))

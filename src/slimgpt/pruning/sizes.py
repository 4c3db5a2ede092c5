"""Several sizes of one model that share what they can, and a curve to choose a size from."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from slimgpt.allocation.shapes import BlockWidths, has_experts
from slimgpt.config import TARGETS, PruneConfig
from slimgpt.errors import ConfigError, MissingDependencyError
from slimgpt.methods.registry import make_method
from slimgpt.models.device import find_device
from slimgpt.models.source import find_model
from slimgpt.pruning.inputs import check_inputs, identity_of, make_job, open_inputs
from slimgpt.pruning.job import Inputs, Job
from slimgpt.pruning.plan import initial_widths, is_measured, make_plan
from slimgpt.pruning.prune import PruneResult, finish, is_finished, read_result
from slimgpt.pruning.sensitivity import divergence_at, measure, reallocate
from slimgpt.runtime.distributed import is_main, process_group
from slimgpt.runtime.environment import Stopwatch
from slimgpt.runtime.files import write_atomically
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import TRIALS_FILE, Run, open_run

log = logging.getLogger(__name__)

# Options that decide the size, or how many layers go, and so what is shared.
SIZES = {"ratio", "layer_ratios", "drop_layers", *TARGETS}

SHARED_DIR, CURVE_FILE, FIGURE_FILE = "shared", "sweep.csv", "sweep.svg"


@dataclass(frozen=True)
class SweepPoint:
    """A size on the curve of a sweep.

    Attributes
    ----------
    ratio : float
        Removed fraction of the block parameters that was asked for.
    params : int
        All parameters of the model.
    divergence : float
        KL(dense model ‖ pruned model) on held-out calibration tokens, in nats per token, before the
        refit.
    """

    ratio: float
    params: int
    divergence: float


def prune_family(
    model: str,
    output: str | Path,
    ratios: Sequence[float],
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[PruneResult, ...]:
    """Prune a model to several sizes, each a part of the next larger one.

    The sizes share the calibration samples and one sensitivity pass, at the largest ratio. Every
    unit of a smaller model is also in the larger ones; the weights differ. After an interruption,
    the same call continues.

    Parameters
    ----------
    model : str
        As in `slimgpt.prune`.
    output : str or Path
        Directory for the results; each is in a directory ``ratio-0.2`` there.
    ratios : sequence of float
        Fractions of the block parameters to remove, at least two.
    restart : bool
        Discard interrupted runs in `output` and start over; finished sizes stay.
    progress : Progress
        As in `slimgpt.prune`.
    **options
        The fields of `slimgpt.config.PruneConfig`, without those that decide the size.

    Returns
    -------
    tuple of PruneResult
        From the largest model to the smallest.

    Raises
    ------
    SlimGPTError
        As in `slimgpt.prune`. Also if a finished size in `output` has other options.
    """
    configs, output = _configs(ratios, options), Path(output)
    if configs[0].channel_selection != "greedy" or configs[0].query_heads:
        raise ConfigError(
            "a family needs channel_selection='greedy' and query_heads=False, so that each model "
            "is a part of the next larger one",
            hint="leave out --query-heads and --preset paper, or prune each size by itself",
        )
    results: list[PruneResult] = []
    with _sizes(model, configs, output / SHARED_DIR, progress, restart) as (sizes, shared):
        missing = [size for size in sizes if not _is_done(output, size)]
        if missing and _is_measured(missing[-1]):
            with open_run(output / _name(missing[-1].config)) as run:
                _identify(run, missing[-1], restart)
                measure(make_job(missing[-1], run, shared))
        for size in sizes:
            run = Run(output / _name(size.config))
            if size in missing:
                if results:
                    size.method.within = {
                        (block.block, sublayer.kind): sublayer.keep
                        for block in results[-1].blocks
                        for sublayer in block.sublayers
                    }
                log.info("ratio %g", size.config.ratio)
                with open_run(run.output) as run:
                    _identify(run, size, restart=False)
                    finish(size, run, shared)
            results.append(read_result(run))
        shared.forget()
    with suppress(OSError):
        (output / SHARED_DIR).rmdir()
    return tuple(results)


def sweep(
    model: str,
    output: str | Path,
    ratios: Sequence[float],
    *,
    restart: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[SweepPoint, ...]:
    """Measure how far pruned models of several sizes are from the dense one; none is written.

    Each is pruned as in a sensitivity pass: with a quarter of the samples, without refit.
    ``sweep.csv`` and ``sweep.svg`` in `output` have the curve. After an interruption, the same call
    continues.

    Parameters
    ----------
    model, output, ratios, restart, progress, **options
        As in `prune_family`.
    """
    configs, output, points = _configs(ratios, options), Path(output), list[SweepPoint]()
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "a sweep", "pip install 'slimgpt[report]'")
    with _sizes(model, configs, output, progress, restart) as (sizes, run):
        if not _is_measured(sizes[-1]):
            raise ConfigError(
                "a sweep needs measured widths, and more calibration tokens than there are "
                f"channels: widths={configs[0].widths!r}, nsamples={configs[0].nsamples}, "
                f"seqlen={sizes[0].seqlen}",
                hint="leave out --widths, or give more --nsamples",
            )
        job = make_job(sizes[-1], run, run)
        measurement = measure(job)
        if run.all_have(TRIALS_FILE):
            points = TypeAdapter(list[SweepPoint]).validate_json(run.read(TRIALS_FILE))
        for size in sizes[len(points) :]:
            here = replace(job, config=size.config)
            widths = reallocate(here, measurement, measurement.prices)
            points.append(_point(here, widths))
            log.info("ratio %g: KL %.4f", size.config.ratio, points[-1].divergence)
            run.write(TRIALS_FILE, json.dumps([asdict(point) for point in points]))
        if is_main():
            _write_curve(output, points)
        run.forget()
    return tuple(points)


def _configs(ratios: Sequence[float], options: dict[str, Any]) -> list[PruneConfig]:
    """Options of each size, the largest model first."""
    if given := SIZES & {name for name, value in options.items() if value}:
        raise ConfigError(
            f"ratios leave nothing to decide to {', '.join(sorted(given))}",
            hint="leave that out, or prune to one size with `slimgpt prune`",
        )
    if len(set(ratios)) < max(2, len(ratios)):
        raise ConfigError(
            f"ratios={','.join(map(str, ratios))} are not several different sizes",
            hint="give two different ratios or more, e.g. --ratios 0.2,0.33,0.5",
        )
    return [PruneConfig.create(**options | {"ratio": ratio}) for ratio in sorted(ratios)]


@contextmanager
def _sizes(
    model: str, configs: Sequence[PruneConfig], directory: Path, progress: Progress, restart: bool
) -> Iterator[tuple[list[Inputs], Run]]:
    """Open the model for each size, and a run directory for what they share."""
    source = find_model(model)
    check_inputs(configs[0])
    with process_group(find_device(configs[0].device)) as device, open_run(directory) as shared:
        largest = open_inputs(source, configs[-1], device, progress)
        sizes = [*(_resized(largest, config) for config in configs[:-1]), largest]
        if has_experts(sizes[0].shapes):
            raise ConfigError(
                "models with experts are not pruned to several sizes at once",
                hint="prune each size by itself",
            )
        if is_main():
            # The largest ratio alone decides what is shared.
            shared.identify(identity_of(sizes[-1]), restart)
        yield sizes, shared


def _resized(inputs: Inputs, config: PruneConfig) -> Inputs:
    """The same model for another size, with a skeleton of its own."""
    initial_widths(inputs.shapes, inputs.base_config, config, None)  # raises if it is infeasible
    return replace(
        inputs,
        config=config,
        method=make_method(config),
        streamed=inputs.streamed.anew(),
        stopwatch=Stopwatch(),
    )


def _is_measured(size: Inputs) -> bool:
    widths = initial_widths(size.shapes, size.base_config, size.config, size.target, size.dropped)
    return is_measured(size.shapes, widths, size.seqlen, size.config)


def _identify(run: Run, size: Inputs, restart: bool) -> None:
    if is_main():
        run.identify(identity_of(size), restart)


def _name(config: PruneConfig) -> str:
    return f"ratio-{config.ratio:g}"


def _is_done(output: Path, size: Inputs) -> bool:
    run = Run(output / _name(size.config))
    return is_finished(run, size.streamed.weights.source, size.config)


def _point(job: Job, widths: Sequence[BlockWidths]) -> SweepPoint:
    found = divergence_at(job, widths)
    params = make_plan(job.base_config, job.config, widths, job.target).params_after
    return SweepPoint(job.config.ratio, params, found)


def _write_curve(output: Path, points: Sequence[SweepPoint]) -> None:
    from slimgpt.presentation.figures import curves, save

    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_atomically(output / CURVE_FILE, text.getvalue())
    line = [(point.params / 1e6, point.divergence) for point in points]
    plot = curves({"": line}, "million parameters", "nats per held-out token, before the refit")
    save([plot], output / FIGURE_FILE, "KL divergence from the dense model")

"""Which sublayers matter most to the output of the model, and the widths that follow from it."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.costs import costs_of_changes
from slimgpt.distributed import from_main, is_main
from slimgpt.errors import NumericalError
from slimgpt.footprint import Footprint
from slimgpt.run import WIDTHS_FILE, Run
from slimgpt.schedule import BlockShape, BlockWidths, move_units
from slimgpt.stored import read_tensor
from slimgpt.streaming import StreamedModel
from slimgpt.sweep import read_plan, sweep

log = logging.getLogger(__name__)

SURVEY_SHARE = 4  # one sample in so many; half as many others show what errors cost
MAX_PROBES, PROBE_TOKENS = 16, 512  # of these others at most, and tokens of each


def samples_needed(shapes: Sequence[BlockShape], seqlen: int) -> int:
    """Least number of calibration samples of which a survey gets as many tokens as channels.

    With fewer tokens, what stays of an FFN fits them whatever goes: its errors are near 0.
    """
    num_channels = max(shape.num_channels for shape in shapes)
    return SURVEY_SHARE * (math.ceil(num_channels / seqlen) - 1) + 1


def probe_bytes(skeleton: PreTrainedModel, nsamples: int, seqlen: int) -> int:
    """Memory for the backward pass: what enters the blocks; embedding, head and logits."""
    config, num_tokens = skeleton.config, min(seqlen, PROBE_TOKENS)
    states = (config.num_hidden_layers + 3) * len(_probes(nsamples)) * num_tokens
    numbers = (states + 2 * config.vocab_size) * config.hidden_size
    logits = 6 * num_tokens * config.vocab_size
    return numbers * skeleton.dtype.itemsize + logits * torch.float32.itemsize


def measured_widths(
    run: Run,
    streamed: StreamedModel,
    samples_NT: Tensor,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    config: PruneConfig,
    footprint: Footprint,
) -> list[BlockWidths]:
    """Keep the units that matter most to the model's output, whatever sublayer they are in.

    The survey prunes to the given widths with a part of the samples. It measures for each sublayer
    what its error costs the output there (`slimgpt.costs`), and what the error would be at other
    widths. A sublayer that the given widths leave whole stays so.

    Parameters
    ----------
    run : Run
        Where an interrupted survey is found again, and its result.
    streamed : StreamedModel
        The model before pruning.
    samples_NT : Tensor
        int64, the calibration tokens of all processes.
    shapes, widths
        The blocks, and the widths to begin with, at which something is removed.
    config, footprint
        See `slimgpt.sweep.sweep`.

    Returns
    -------
    list of BlockWidths
        With as many parameters in all.

    Raises
    ------
    NumericalError
        If gradients overflow.
    """
    if not from_main(run.has(WIDTHS_FILE)):
        chosen_NT = samples_NT[::SURVEY_SHARE]
        log.info("survey, with %d of the samples, of what the layers cost", len(chosen_NT))
        sweep(streamed.anew(), chosen_NT, widths, config, footprint, run, stage="survey")
        if is_main():
            moved = _moved(run, streamed, samples_NT, shapes, widths, config.multiple_of)
            with run.saving(WIDTHS_FILE) as temporary:
                temporary.write_text(json.dumps([asdict(width) for width in moved]))
            for index in range(len(moved)):
                run.discard(run.block_file(index, "survey"))
    values = from_main(is_main() and json.loads(run.saved(WIDTHS_FILE).read_text()))
    return [BlockWidths(**value) for value in values]


def _moved(
    run: Run,
    streamed: StreamedModel,
    samples_NT: Tensor,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    multiple_of: int,
) -> list[BlockWidths]:
    files = [run.saved(run.block_file(index, "survey")) for index in range(len(shapes))]
    blocks = [read_plan(file) for file in files]
    probes_NT = samples_NT[_probes(len(samples_NT)), :PROBE_TOKENS]
    costs = costs_of_changes(
        streamed, blocks, [partial(read_tensor, file) for file in files], probes_NT
    )
    plans = [plan for block in blocks for plan in (block.attention, block.ffn)]
    if not all(map(math.isfinite, costs)):
        raise NumericalError(
            "the gradients of the survey overflow",
            hint="use --dtype float32 or bfloat16, or --widths scheduled",
        )
    # A cost near or below zero is noise, and no reason to remove all.
    least = [sum(map(abs, costs[kind::2])) / len(shapes) / 10 for kind in (0, 1)] * len(shapes)
    prices = [
        max(cost, floor) / plan.error if plan.error else 0.0
        for cost, floor, plan in zip(costs, least, plans, strict=True)
    ]
    return move_units(shapes, widths, [plan.errors for plan in plans], prices, multiple_of)


def _probes(num_samples: int) -> list[int]:
    """Some samples, other than those of the survey if there are others."""
    step = 2 * SURVEY_SHARE * math.ceil(num_samples / (2 * SURVEY_SHARE * MAX_PROBES))
    return list(range(1 % num_samples, num_samples, step))

"""What the changes of each sublayer cost the output of the model.

One backward pass through the pruned model, which is in memory a block at a time.

Shape suffixes: ``N`` samples, ``T`` tokens of a sample, ``C`` hidden size, ``V`` vocabulary,
``I`` columns of an output projection, ``K`` those that are kept, ``O`` its rows.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax
from transformers import PreTrainedModel

from slimgpt.allocation.reallocation import PROBE_TOKENS, SURVEY_SHARE, move_units, probe_samples
from slimgpt.allocation.shapes import BlockShape, BlockWidths
from slimgpt.calibration.activations import TOKENS_PER_BATCH, Stream, embed, run_sublayer
from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.models.device import fast_products
from slimgpt.models.family import Block
from slimgpt.models.stored import read_tensor
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.unit_slices import unit_columns
from slimgpt.pruning.block import replay_block
from slimgpt.pruning.decisions import BlockPlan
from slimgpt.pruning.memory import Footprint
from slimgpt.pruning.sequential import read_plan, sweep
from slimgpt.runtime.distributed import from_main, is_main
from slimgpt.runtime.progress import Progress, no_progress
from slimgpt.runtime.run_directory import WIDTHS_FILE, Run

log = logging.getLogger(__name__)


@torch.no_grad()
def costs_of_changes(
    streamed: StreamedModel,
    plans: Sequence[BlockPlan],
    reads: Sequence[Callable[[str], Tensor]],
    samples_NT: Tensor,
) -> list[float]:
    """By how much the divergence falls, to first order, as what was done to a sublayer is undone.

    Let W be the output projection of a sublayer, W + ΔW what it is in the pruned model (0 for
    columns that are gone), x its input there, and g the gradient for its output of
    KL(model ‖ pruned model), which falls by E[gᵀ ΔW x]. The gradients come block by block, from the
    last one to the first; each block is run once more from the input that it had.

    Parameters
    ----------
    streamed : StreamedModel
        The model before pruning.
    plans, reads
        What was decided for the blocks, and functions that read their new output projections, see
        `slimgpt.pruning.block.replay_block`.
    samples_NT : Tensor
        int64, tokens to run over, best others than those of the calibration.

    Returns
    -------
    list of float
        The costs, for attention and FFN of each block in turn, in nats per token.
    """
    log.info("gradients, with %d tokens each of %d samples", *samples_NT.shape[::-1])
    pruned, inputs = streamed.anew(), []
    batch_size = max(1, TOKENS_PER_BATCH // samples_NT.shape[1])
    with pruned.around_blocks() as model:
        stream = embed(model, samples_NT, batch_size, with_dense=True)
    for block, plan, read in zip(pruned.blocks(), plans, reads, strict=True):
        inputs.append(stream.hidden_NTC.clone())
        replay_block(block, plan, read, stream)
    gradient_NTC = _gradient_of_divergence(streamed, stream)
    costs = []
    for block in streamed.blocks(backward=True):
        index = block.index
        costs[:0] = _pull_back(
            block, plans[index], reads[index], stream, inputs.pop(), gradient_NTC
        )
    return [cost / samples_NT.numel() for cost in costs]


def _gradient_of_divergence(streamed: StreamedModel, stream: Stream) -> Tensor:
    """Gradient of KL(dense ‖ pruned) for what enters the head in the pruned model."""
    gradient_NTC = torch.empty_like(stream.hidden_NTC)
    with streamed.without_blocks() as model:
        dense_NTC = chain.from_iterable(stream.dense_batches())
        samples = zip(stream.hidden_NTC, dense_NTC, gradient_NTC, strict=True)
        for hidden_TC, dense_TC, gradient_TC in samples:  # the logits of one are many
            dense_TV = _log_probabilities(model, dense_TC.to(model.device))
            with torch.enable_grad():
                last_TC = hidden_TC.to(model.device).detach().requires_grad_()
                pruned_TV = _log_probabilities(model, last_TC)
                divergence = kl_div(pruned_TV, dense_TV, reduction="sum", log_target=True)
            gradient_TC.copy_(torch.autograd.grad(divergence, last_TC)[0])
    return gradient_NTC


def _log_probabilities(model: PreTrainedModel, hidden_TC: Tensor) -> Tensor:
    with fast_products(next(model.parameters())):
        logits_TV = model(inputs_embeds=hidden_TC[None], use_cache=False).logits[0]
    return log_softmax(logits_TV.float(), dim=-1)


def _pull_back(
    block: Block,
    plan: BlockPlan,
    read: Callable[[str], Tensor],
    stream: Stream,
    inputs_NTC: Tensor,
    gradient_NTC: Tensor,
) -> list[float]:
    """Turn the gradient for what leaves the pruned block into that for what enters it, in place.

    Gives the sums of gᵀ ΔW x of both sublayers.
    """
    device = block.attention.output.weight.device
    new_weights = []
    for sublayer, decided in zip(block.sublayers, (plan.attention, plan.ffn), strict=True):
        new_OI = sublayer.output.weight
        if len(decided.keep) < sublayer.num_units:
            weight_OK = read(f"{block.output_name(sublayer)}.weight").to(device)
            columns_K = unit_columns(torch.tensor(decided.keep, device=device), sublayer.unit_size)
            new_OI = torch.zeros_like(new_OI).index_copy_(1, columns_K, weight_OK)
        new_weights.append(new_OI)
    costs = [0.0] * len(new_weights)
    batches = (values_NTC.split(stream.batch_size) for values_NTC in (inputs_NTC, gradient_NTC))
    for input_NTC, given_NTC in zip(*batches, strict=True):
        states, changes = [input_NTC.to(device).detach().requires_grad_()], []
        for sublayer, new_OI in zip(block.sublayers, new_weights, strict=True):
            with torch.enable_grad():
                batch_NTI = run_sublayer(block, sublayer, stream, states[-1])
                with fast_products(new_OI):
                    output = linear(batch_NTI, new_OI, sublayer.output.bias)
                states.append(states[-1] + output)
            with fast_products(new_OI):
                changes.append(linear(batch_NTI, new_OI - sublayer.output.weight))
        after = given_NTC.to(device)
        before, *between = torch.autograd.grad(states[-1], states[:-1], after)
        for kind, (g, change) in enumerate(zip((*between, after), changes, strict=True)):
            costs[kind] += float((g.float() * change.float()).sum())
        given_NTC.copy_(before)
    return costs


def measured_widths(
    run: Run,
    streamed: StreamedModel,
    samples_NT: Tensor,
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    config: PruneConfig,
    footprint: Footprint,
    progress: Progress = no_progress,
) -> list[BlockWidths]:
    """Keep the units that matter most to the model's output, whatever sublayer they are in.

    The survey prunes to the given widths with a part of the samples. It measures for each sublayer
    what its error costs the output there, and what the error would be at other widths. A sublayer
    that the given widths leave whole stays so.

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
    config, footprint, progress
        See `slimgpt.pruning.sequential.sweep`.

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
        sweep(
            streamed.anew(),
            chosen_NT,
            widths,
            config,
            footprint,
            run,
            stage="survey",
            progress=progress,
        )
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
    probes_NT = samples_NT[probe_samples(len(samples_NT)), :PROBE_TOKENS]
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

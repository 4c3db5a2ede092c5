"""Sensitivity pass: reallocate units by how much each sublayer's error changes the model's output.

A sequential pass over part of the samples prunes the model to the scheduled widths. One backward
pass through the pruned model, with one block in memory at a time, gives the first-order effect of
each sublayer's error on the KL divergence. The final widths remove parameters where this effect is
smallest.

Shape suffixes: ``N`` samples, ``T`` tokens of a sample, ``C`` hidden size, ``V`` vocabulary,
``I`` columns of an output projection, ``K`` kept columns, ``O`` rows.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax

from slimgpt.allocation.reallocation import (
    SENSITIVITY_SHARE,
    Curve,
    measured_removals,
    move_units,
)
from slimgpt.allocation.schedule import WidthRules
from slimgpt.allocation.shapes import BlockWidths, SublayerShape, Width
from slimgpt.calibration.activations import TOKENS_PER_BATCH, Stream, embed, run_sublayer
from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.methods.slimgpt import SlimGPT
from slimgpt.models.blocks import Block
from slimgpt.models.device import autocast, repeatable_attention, sums_device
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.sublayers import Sublayer
from slimgpt.pruning.block import replay_block
from slimgpt.pruning.decisions import SavedBlock, SublayerPlan
from slimgpt.pruning.job import Job
from slimgpt.pruning.plan import initial_widths, width_rules, with_dropped, without_dropped
from slimgpt.pruning.sequential import kept_blocks, kept_indices, sequential_pass
from slimgpt.runtime.distributed import broadcast, is_main
from slimgpt.runtime.run_directory import MEASUREMENT_FILE
from slimgpt.solver.elimination import (
    Elimination,
    HeadCounts,
    HeadParams,
    eliminate_channels,
    eliminate_units,
    trace_heads,
)
from slimgpt.solver.hessian import Problem

log = logging.getLogger(__name__)


class MeasuringSlimGPT(SlimGPT):
    """SlimGPT that also records the errors at other widths. It is greedy, so widths are nested."""

    def __init__(self, config: PruneConfig, rules: WidthRules) -> None:
        super().__init__(config)
        self.refit_epochs, self.rules = 0, rules

    def eliminate(
        self, problem: Problem, sublayer: Sublayer, width: Width
    ) -> tuple[Elimination, Curve]:
        """Remove units; also return the errors, with damping, at smaller and smaller widths.

        They are those of `measured_removals`; or, if query heads may go, those on the path of
        `slimgpt.solver.elimination.trace_heads` to twice the removed parameters.
        """
        shape, num_units = sublayer.shape, sublayer.num_units
        if shape.parts > 1 and self.config.query_heads:
            left, _ = super().eliminate(problem, sublayer, width)
            removed = shape.kept_params(num_units) - shape.kept_params(width)
            return left, self._path(problem, shape, 2 * removed)
        assert isinstance(width, int)
        num_remove = num_units - width
        removals = [
            removed
            for removed in measured_removals(num_units, width, self.rules.step(shape))
            if self.rules.allows(shape, num_units - removed)
        ]
        further = removals[-1] - num_remove
        if sublayer.unit_size > 1:
            size, error = sublayer.unit_size, self.config.head_error
            left = eliminate_units(problem, num_remove, size, error, num_further=further)
        else:
            left = eliminate_channels(problem, num_remove, num_further=further)
        errors = left.errors.cpu().cumsum(dim=0).tolist()  # a GPU adds in any order
        return left, tuple((num_units - removed, errors[removed - 1]) for removed in removals)

    def _path(self, problem: Problem, shape: SublayerShape, num_params: int) -> Curve:
        heads = HeadCounts(shape.num_units, shape.parts)
        params = HeadParams(shape.part_params, shape.unit_params - shape.parts * shape.part_params)
        _, *path = trace_heads(problem, heads, params, num_params, self.config.head_error)
        curve = (
            (groups if per_group == shape.parts else (groups, per_group), error)
            for (groups, per_group), _, error in path
        )
        return tuple(point for point in curve if self.rules.allows(shape, point[0]))


@dataclass(frozen=True)
class Measurement:
    """What a sensitivity pass finds around the widths that it prunes to.

    Attributes
    ----------
    widths : list of tuple of int
        These widths.
    divergence : float
        KL(dense model ‖ pruned model) on held-out calibration tokens, in nats per token.
    costs : list of list of float
        By block and sublayer, what undoing its pruning would reduce the divergence by, to first
        order. A cost near or below zero is noise; a tenth of the mean of its kind is the least.
    curves : list of list of Curve
        By block and sublayer, the errors at smaller and smaller widths.
    errors : list of list of float
        By block and sublayer, the error at its width.
    """

    widths: list[BlockWidths]
    divergence: float
    costs: list[list[float]]
    curves: list[list[tuple[tuple[Width, float], ...]]]
    errors: list[list[float]]

    @property
    def prices(self) -> list[list[float]]:
        """Cost of an error of 1, by block and sublayer."""
        return [
            [cost / error if error else 0.0 for cost, error in zip(*block, strict=True)]
            for block in zip(self.costs, self.errors, strict=True)
        ]


def measured_widths(job: Job) -> list[BlockWidths]:
    """Reallocate units among all sublayers by their effect on the model's output.

    An FFN that the schedule leaves intact is not measured, so it stays intact. If query heads may
    go, an attention that it leaves intact loses its smallest step in the measurement.

    Parameters
    ----------
    job : Job
        Its run directory stores the measurement. An interrupted pass continues from there.

    Returns
    -------
    list of tuple of int
        Widths that remove as many parameters in all as the scheduled widths, or meet the target.

    Raises
    ------
    NumericalError
        If gradients overflow.
    """
    measurement = measure(job)
    return reallocate(job, measurement, measurement.prices)


def reallocate(
    job: Job, measurement: Measurement, prices: Sequence[Sequence[float]]
) -> list[BlockWidths]:
    """Move units to where they matter most at these prices, see `move_units`."""
    rules = width_rules(job.base_config, job.config)
    scheduled = initial_widths(job.shapes, job.base_config, job.config, job.target, job.dropped)
    shapes, kept = without_dropped(job.shapes, scheduled)
    moved = move_units(shapes, kept, measurement.curves, prices, rules=rules, target=job.target)
    return with_dropped(moved, job.shapes, job.dropped)


def measure(job: Job) -> Measurement:
    """Prune to the scheduled widths, and measure what each sublayer's error costs.

    Raises
    ------
    NumericalError
        If gradients overflow.
    """
    shared = job.shared
    if not shared.all_have(MEASUREMENT_FILE):
        widths = initial_widths(job.shapes, job.base_config, job.config, job.target, job.dropped)
        widths = _start(job, widths)
        log.info(
            "sensitivity of the layers, with %d of the samples",
            len(job.samples_NT[::SENSITIVITY_SHARE]),
        )
        method = MeasuringSlimGPT(job.config, width_rules(job.base_config, job.config))
        with _trial(job, widths, method) as blocks:
            if is_main():
                measurement = _measured(job, widths, blocks)
                shared.write(MEASUREMENT_FILE, json.dumps(asdict(measurement)))
    return TypeAdapter(Measurement).validate_json(shared.read(MEASUREMENT_FILE))


def divergence_at(job: Job, widths: Sequence[BlockWidths]) -> float:
    """KL(dense ‖ model pruned to these widths) on held-out tokens, in nats per token.

    The model is pruned with part of the samples and without refit.
    """
    method = SlimGPT(job.config.model_copy(update={"refit_epochs": 0}))
    with _trial(job, widths, method) as blocks:
        return broadcast(is_main() and divergence(job.streamed, blocks, job.probes))


@contextmanager
def _trial(job: Job, widths: Sequence[BlockWidths], method: SlimGPT) -> Iterator[list[SavedBlock]]:
    """Prune with part of the samples; the blocks are discarded at the end.

    An interrupted pass continues from its saved blocks.

    Yields
    ------
    list of SavedBlock
        The pruned blocks; none but on the main process.
    """
    run = job.run
    measuring = replace(
        job,
        method=method,
        streamed=job.streamed.anew(),
        samples_NT=job.samples_NT[::SENSITIVITY_SHARE],
    )
    sequential_pass(measuring, widths, "sensitivity")
    names = [run.block_file(index, "sensitivity") for index in kept_indices(widths)] * is_main()
    yield [SavedBlock.open(run.saved(name)) for name in names]
    for name in names:
        run.discard(name)


def _start(job: Job, widths: Sequence[BlockWidths]) -> list[BlockWidths]:
    """Widths of the sensitivity pass: the scheduled ones, but every attention loses something."""
    if not job.config.query_heads or job.config.attention_share == 0:
        return list(widths)
    allows = width_rules(job.base_config, job.config).allows
    return [
        tuple(
            sub.smallest_step
            if sub.kind == "attention" and width == sub.num_units and allows(sub, sub.smallest_step)
            else width
            for sub, width in zip(shape.sublayers, block, strict=True)
        )
        for shape, block in zip(job.shapes, widths, strict=True)
    ]


def _measured(job: Job, widths: list[BlockWidths], blocks: Sequence[SavedBlock]) -> Measurement:
    divergence, costs = sensitivities(job.streamed, blocks, job.probes)
    if not all(map(math.isfinite, chain.from_iterable(costs))):
        raise NumericalError(
            "the gradients of the sensitivity pass overflow",
            hint="use --dtype float32 or bfloat16, or --widths scheduled",
        )
    by_kind = defaultdict(list)
    for block, block_costs in zip(blocks, costs, strict=True):
        for plan, cost in zip(block.plan.sublayers, block_costs, strict=True):
            if not plan.replaces:
                by_kind[plan.kind].append(abs(cost))
    means = {kind: sum(values) / len(values) for kind, values in by_kind.items()}

    def known(plan: SublayerPlan, cost: float) -> float:
        # A cost near or below zero is noise. Without a floor, all units of the sublayer would go.
        # To undo a sublayer that replaces dropped blocks would undo that too, so its cost says
        # nothing about its units.
        mean = means.get(plan.kind, 1.0)
        return mean if plan.replaces else max(cost, mean / 10)

    plans = [block.plan.sublayers for block in blocks]
    costs = [
        [known(*pair) for pair in zip(*block, strict=True)]
        for block in zip(plans, costs, strict=True)
    ]
    curves = [[plan.curve for plan in block] for block in plans]
    errors = [[plan.error for plan in block] for block in plans]
    return Measurement(widths, divergence, costs, curves, errors)


@torch.no_grad()
def sensitivities(
    streamed: StreamedModel, blocks: Sequence[SavedBlock], samples_NT: Tensor
) -> tuple[float, list[list[float]]]:
    """First-order estimate of the KL reduction if one sublayer's pruning were undone.

    Let W and b be the output projection of a sublayer, W + ΔW (0 in removed columns) and b + Δb
    those of the pruned model, x its input there, and g the gradient of KL(model ‖ pruned model)
    with respect to its output. Undoing the change reduces the divergence by E[gᵀ (ΔW x + Δb)]. The
    backward pass goes from the last block to the first and recomputes each block from its saved
    input.

    Parameters
    ----------
    streamed : StreamedModel
        The dense model.
    blocks : sequence of SavedBlock
        The pruned blocks; the others are dropped.
    samples_NT : Tensor
        int64, tokens for the gradient pass, preferably held out.

    Returns
    -------
    float
        The divergence, in nats per token.
    list of list of float
        Its reduction, by block and sublayer.
    """
    log.info("gradients, with %d tokens each of %d samples", *samples_NT.shape[::-1])
    inputs: list[Tensor] = []
    stream = _replayed(streamed, blocks, samples_NT, inputs)
    gradient_NTC = torch.empty_like(stream.hidden_NTC)
    total, costs = _divergence(streamed, stream, gradient_NTC), []
    by_index = {saved.plan.block: saved for saved in blocks}
    for block in streamed.blocks(reversed(by_index)):
        stream.hidden_NTC = inputs.pop()
        sums = _pull_back(block, by_index[block.index], stream, gradient_NTC)
        costs.insert(0, [total / samples_NT.numel() for total in sums])
    return total / samples_NT.numel(), costs


@torch.no_grad()
def divergence(streamed: StreamedModel, blocks: Sequence[SavedBlock], samples_NT: Tensor) -> float:
    """KL(dense model ‖ pruned model), in nats per token; parameters as in `sensitivities`."""
    stream = _replayed(streamed, blocks, samples_NT)
    return _divergence(streamed, stream) / samples_NT.numel()


def _replayed(
    streamed: StreamedModel,
    blocks: Sequence[SavedBlock],
    samples_NT: Tensor,
    inputs: list[Tensor] | None = None,
) -> Stream:
    """Streams after the last block, dense and pruned; the pruned inputs of the blocks if wanted."""
    pruned = streamed.anew()
    batch_size = max(1, TOKENS_PER_BATCH // samples_NT.shape[1])
    with pruned.around_blocks() as model:
        stream = embed(model, samples_NT, batch_size, with_dense=True)
    by_index = {saved.plan.block: saved for saved in blocks}
    for block, gap in kept_blocks(pruned, list(by_index)):
        if inputs is not None:
            inputs.append(stream.hidden_NTC.clone())
        replay_block(block, by_index[block.index], stream)
        if gap:
            gap.move_dense(stream)
    return stream


def _divergence(
    streamed: StreamedModel, stream: Stream, gradient_NTC: Tensor | None = None
) -> float:
    """Sum of KL(dense ‖ pruned) over the tokens, from the streams after the last block.

    If wanted, its gradient for the pruned model's stream is written to `gradient_NTC`.
    """
    total = torch.zeros((), dtype=torch.float64, device=sums_device(streamed.device))
    with streamed.after_blocks() as head:
        assert stream.dense_NTC is not None
        samples = zip(stream.hidden_NTC, stream.dense_NTC, strict=True)
        for index, (hidden_TC, dense_TC) in enumerate(samples):  # logits are large
            dense_TV = log_softmax(head(dense_TC).float(), dim=-1)
            with torch.set_grad_enabled(gradient_NTC is not None):
                last_TC = hidden_TC.detach().requires_grad_(gradient_NTC is not None)
                pruned_TV = log_softmax(head(last_TC).float(), dim=-1)
                value = kl_div(pruned_TV, dense_TV, reduction="sum", log_target=True)
            total += value.detach().to(total.device)
            if gradient_NTC is not None:
                gradient_NTC[index] = torch.autograd.grad(value, last_TC)[0]
    return float(total)


def _pull_back(
    block: Block, saved: SavedBlock, stream: Stream, gradient_NTC: Tensor
) -> list[float]:
    """Backpropagate through a pruned block: `gradient_NTC` goes in place from output to input.

    `stream` is the residual stream before the block. Returns the sum of gᵀ ΔW x of each sublayer.
    """
    projections = [
        _pruned_projection(sublayer, saved, plan)
        for sublayer, plan in zip(block.sublayers, saved.plan.sublayers, strict=True)
    ]
    device = projections[0][0].device
    costs = torch.zeros(len(projections), dtype=torch.float64, device=sums_device(device))
    for input_NTC, given_NTC in zip(
        stream.batches(), gradient_NTC.split(stream.batch_size), strict=True
    ):
        first = state = input_NTC.to(device).detach().requires_grad_()
        outputs, changes = [], []
        for sublayer, (new_OI, new_O) in zip(block.sublayers, projections, strict=True):
            source = first if block.is_parallel else state
            with torch.enable_grad(), repeatable_attention(device):
                batch_NTI = run_sublayer(sublayer, stream, source)
                with autocast(new_OI):
                    output = linear(batch_NTI, new_OI, new_O).to(state.dtype)
                    state = state + sublayer.contribution(output)
                outputs.append(output)
            with autocast(new_OI):
                old_O = sublayer.output.bias
                change_O = None if new_O is None or old_O is None else new_O - old_O
                changes.append(linear(batch_NTI, new_OI - sublayer.output.weight, change_O))
        before, *gradients = torch.autograd.grad(state, [first, *outputs], given_NTC.to(device))
        for index, (g, change) in enumerate(zip(gradients, changes, strict=True)):
            costs[index] += (g.float() * change.float()).sum().to(costs.device)
        given_NTC.copy_(before)
    return costs.tolist()


def _pruned_projection(
    sublayer: Sublayer, saved: SavedBlock, plan: SublayerPlan
) -> tuple[Tensor, Tensor | None]:
    """Weight of the pruned model's output projection, with zeros in removed columns, and bias."""
    old_OI, bias_O = sublayer.output.weight, sublayer.output.bias
    if len(plan.keep) == sublayer.num_units and not plan.replaces:
        return old_OI, bias_O
    if bias_O is not None:
        bias_O = saved.read(f"{sublayer.output_name}.bias").to(bias_O.device)
    weight_OK = sublayer.output.oriented(saved.read(f"{sublayer.output_name}.weight"))
    weight_OK = weight_OK.to(old_OI.device)
    columns_K = sublayer.columns(plan.kept(old_OI.device))
    return torch.zeros_like(old_OI).index_copy_(1, columns_K, weight_OK), bias_O

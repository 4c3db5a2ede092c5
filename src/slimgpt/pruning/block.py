"""Prune one block: collect, decide, compensate, propagate, slice.

Layer-wise structured pruning as in SlimGPT (Ling et al. 2024, arXiv 2412.18110, algorithm 1):
blocks are pruned in order, each calibrated on the outputs of the pruned blocks before it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from slimgpt.allocation.shapes import BlockWidths, Width, written_width
from slimgpt.calibration.activations import (
    Activations,
    Stream,
    collect,
    pass_block,
    pass_through,
    propagate,
)
from slimgpt.errors import numerical_errors_at
from slimgpt.methods.base import Decision, Method
from slimgpt.models.blocks import Block
from slimgpt.models.experts import Experts
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.sublayers import Projection, Sublayer
from slimgpt.models.units import Kept
from slimgpt.pruning.decisions import BlockPlan, SavedBlock, SublayerPlan
from slimgpt.pruning.experts import prune_experts
from slimgpt.pruning.refit import refit
from slimgpt.pruning.slicing import slice_sublayer
from slimgpt.runtime.distributed import broadcast, broadcast_tensor, is_main
from slimgpt.solver.hessian import output_power


@dataclass(frozen=True)
class Gap:
    """The dropped blocks that follow a block.

    Attributes
    ----------
    indices : sequence of int
        Their indices.
    streamed : StreamedModel
        The model.
    """

    indices: Sequence[int]
    streamed: StreamedModel

    def move_dense(self, stream: Stream) -> None:
        """Move the dense model's stream past these blocks, if there is one."""
        dense = stream.dense()
        if dense is not None and self.indices:
            for block in self.streamed.blocks(self.indices):
                pass_block(block, dense)


def prune_block(
    block: Block,
    widths: BlockWidths,
    stream: Stream,
    method: Method,
    activation_memory: int,
    gap: Gap | None = None,
) -> BlockPlan:
    """Prune one block in place.

    Parameters
    ----------
    block : Block
        The dense block, with its weights.
    widths : BlockWidths
        Units to keep, by sublayer.
    stream : Stream
        Residual stream before the block. On return, the stream after the pruned block.
    method : Method
        Selects the units to keep and updates the weights.
    activation_memory : int
        Bytes of sublayer activations that may be kept from calibration to propagation.
    gap : Gap, optional
        Dropped blocks that follow. The dense model's stream moves past them, and the last sublayer
        is fitted to add what they add, if it is an FFN and the method compensates.

    Raises
    ------
    NumericalError
        If a Hessian cannot be factorised. The message names the block and the sublayer.
    """
    stream.enter(block)
    patched = block.sublayers[-1] if gap and _patches(method, block.sublayers[-1]) else None
    plans = [
        _prune_sublayer(
            sublayer, width, stream, method, activation_memory, gap if sublayer is patched else None
        )
        for sublayer, width in zip(block.sublayers, widths, strict=True)
    ]
    if gap and patched is None:
        gap.move_dense(stream)
    return BlockPlan(block.index, tuple(plans))


def _patches(method: Method, last: Sublayer) -> bool:
    """Whether the last sublayer of a block is fitted to add what the next blocks added.

    A norm after the sublayer leaves nothing to solve for. The refit includes the norm.
    """
    can_fit = last.post_norm is None or method.refit_epochs > 0
    return method.compensates and last.kind == "ffn" and can_fit


def replay_block(block: Block, saved: SavedBlock, stream: Stream) -> None:
    """Apply the saved decisions to a block in place. The stream changes exactly as in pruning.

    Parameters
    ----------
    block : Block
        The dense block, with its weights.
    saved : SavedBlock
        The saved decisions and weights.
    stream : Stream
        Residual stream before the block. On return, the stream after the pruned block; that of the
        dense model is then before any dropped blocks that follow.
    """
    stream.enter(block)
    for sublayer, decided in zip(block.sublayers, saved.plan.sublayers, strict=True):
        pass_through(sublayer, stream.dense())
        is_whole = len(decided.keep) == sublayer.num_units and not decided.parts
        if is_whole and not decided.replaces:
            pass_through(sublayer, stream)
            continue
        kept = decided.kept(sublayer.weight.device)
        if isinstance(sublayer, Experts):
            weight = saved.read(f"{sublayer.name}.experts.down_proj")
            slice_sublayer(sublayer, kept, weight.to(sublayer.weights.down_proj))
            pass_through(sublayer, stream)
            continue
        output, name = sublayer.output, sublayer.output_name
        if output.bias is not None:
            _set_bias(output, saved.read(f"{name}.bias"))
        new_weight = output.oriented(saved.read(f"{name}.weight")).to(output.weight.device)
        if decided.refit is None:
            _apply(sublayer, stream, kept, new_weight)
        else:
            slice_sublayer(sublayer, kept, new_weight)
            for input_name, linear in sublayer.inputs.items():
                weight = saved.read(f"{sublayer.name}.{input_name}.weight")
                linear.weight.copy_(linear.oriented(weight))
            pass_through(sublayer, stream)


def _prune_sublayer(
    sublayer: Sublayer,
    width: Width,
    stream: Stream,
    method: Method,
    activation_memory: int,
    gap: Gap | None,
) -> SublayerPlan:
    if width == sublayer.num_units and gap is None:
        pass_through(sublayer, stream.dense())
        pass_through(sublayer, stream)
        return SublayerPlan(sublayer.kind, tuple(range(sublayer.num_units)))
    if isinstance(sublayer, Experts):
        plan, weight = prune_experts(sublayer, width, stream, method)
        slice_sublayer(sublayer, plan.kept(sublayer.weight.device), weight)
        pass_through(sublayer, stream)
        return plan
    is_refit = method.refit_epochs > 0 and sublayer.kind == "ffn"
    # A refit changes the input projections, so kept activations would be stale.
    activations = _collect(sublayer, stream, 0 if is_refit else activation_memory, gap)
    known, output, plan = activations.kept, sublayer.output, None
    num_columns = sublayer.num_columns(written_width(width))
    new_weight = output.weight.new_empty(output.out_features, num_columns)
    if is_main():
        with numerical_errors_at(f"block {sublayer.block}, {sublayer.kind}"):
            if width == 0:
                decision = _without(sublayer, method, activations)
            else:
                decision = method.decide(sublayer, width, activations)
        new_weight.copy_(decision.weight_OK)
        if decision.bias_O is not None:
            _set_bias(output, decision.bias_O)
        plan = SublayerPlan(
            sublayer.kind,
            () if width == 0 else tuple(decision.kept.units.tolist()),
            decision.error,
            decision.error / decision.power if decision.power else 0.0,
            decision.damping,
            () if decision.kept.parts is None else tuple(decision.kept.parts.tolist()),
            tuple(decision.curve),
            replaces=() if gap is None else tuple(gap.indices),
        )
        del decision
    del activations
    plan = broadcast(plan)
    kept = plan.kept(new_weight.device)
    if output.bias is not None:
        broadcast_tensor(output.bias)
    new_weight = broadcast_tensor(new_weight)
    if not is_refit:
        _apply(sublayer, stream, kept, new_weight, known)
        return plan
    dense = replace(sublayer, module=copy.deepcopy(sublayer.module))
    slice_sublayer(sublayer, kept, new_weight)
    correction = None if gap is None else 1.0
    error_ratio = refit(sublayer, dense, stream, method.config, correction)
    pass_through(sublayer, stream)
    return replace(plan, refit=error_ratio)


def _collect(
    sublayer: Sublayer, stream: Stream, activation_memory: int, gap: Gap | None
) -> Activations:
    """Gather the statistics; with a gap, the target is the dense model's stream after it."""
    if gap is None:
        return collect(sublayer, stream, activation_memory)
    if sublayer.post_norm is not None:  # then only the refit has that target
        activations = collect(sublayer, stream, activation_memory)
        gap.move_dense(stream)
        return activations
    pass_through(sublayer, stream.dense())
    gap.move_dense(stream)
    activations = collect(sublayer, stream, activation_memory, dense_is_ahead=True)
    activations.correction = 1.0
    return activations


def _without(sublayer: Sublayer, method: Method, activations: Activations) -> Decision:
    """Remove all units: the output is 0, or its mean if it has a bias and the method compensates.

    One unit is left, with zeros.
    """
    hessian_II, mean_I, bias_O = activations.hessian_II, activations.mean_I, sublayer.output.bias
    weight_OI = sublayer.output.weight.to(hessian_II.device)
    power = output_power(weight_OI, hessian_II)
    if bias_O is not None and method.compensates:
        bias_O = bias_O.to(mean_I) + weight_OI.to(mean_I) @ mean_I
    kept = Kept(torch.zeros(1, dtype=torch.int64, device=sublayer.weight.device))
    return Decision(kept, torch.zeros_like(sublayer.kept_output(kept)), power, power, bias_O)


def _set_bias(output: Projection, bias_O: Tensor) -> None:
    bias_O = bias_O.to(output.weight.dtype).to(output.weight.device)
    output.module.bias = nn.Parameter(bias_O, requires_grad=False)


def _apply(
    sublayer: Sublayer,
    stream: Stream,
    kept: Kept,
    new_weight: Tensor,
    known: Sequence[Tensor] = (),
) -> None:
    if sublayer.spec.couples_units:  # without the others, the kept units have other activations
        slice_sublayer(sublayer, kept, new_weight)
        pass_through(sublayer, stream)
        return
    propagate(sublayer, stream, sublayer.columns(kept), new_weight, known)
    slice_sublayer(sublayer, kept, new_weight)

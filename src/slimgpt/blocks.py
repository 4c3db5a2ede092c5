"""Prune the blocks of a model: collect, decide, compensate, propagate, shrink.

Layer-wise structured pruning as in SlimGPT (Ling, Wang & Liu 2024, arXiv 2412.18110, algorithm 1):
blocks are pruned in order, each calibrated on the outputs of the pruned blocks before it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt import obs
from slimgpt.calibrate import Stream, choose_batch_size, collect, embed, pass_through, propagate
from slimgpt.config import PruneConfig
from slimgpt.distributed import from_main, is_main, tensor_from_main
from slimgpt.errors import NumericalError
from slimgpt.families import Block, Sublayer, bind
from slimgpt.schedule import BlockWidths
from slimgpt.shrink import shrink_sublayer, unit_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SublayerPlan:
    """What was decided for one sublayer.

    Attributes
    ----------
    keep : tuple of int
        Units kept: key/value groups or FFN channels, sorted.
    error, relative_error : float
        Mean squared change of the sublayer's output over the calibration tokens, E‖Δy‖², and the
        same over E‖y‖².
    damping : float
        Damping that the Hessian needed; 0 where nothing was removed.
    """

    keep: tuple[int, ...]
    error: float
    relative_error: float
    damping: float


@dataclass(frozen=True)
class BlockPlan:
    """What was decided for one block."""

    block: int
    attention: SublayerPlan
    ffn: SublayerPlan

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BlockPlan":
        """Invert `dataclasses.asdict` and a way through JSON."""
        plans = {
            kind: SublayerPlan(**values[kind] | {"keep": tuple(values[kind]["keep"])})
            for kind in ("attention", "ffn")
        }
        return cls(block=values["block"], **plans)

    def __str__(self) -> str:
        """What went and what it cost, in a few words."""
        return ", ".join(
            f"{len(plan.keep)} {units} kept, error {plan.relative_error:.4f}"
            for plan, units in ((self.attention, "kv groups"), (self.ffn, "channels"))
        )


def prune_block(
    block: Block, width: BlockWidths, stream: Stream, activation_memory: int, config: PruneConfig
) -> BlockPlan:
    """Prune one block in place.

    Parameters
    ----------
    block : Block
        As it was before, with its weights.
    width : BlockWidths
        What it keeps.
    stream : Stream
        What enters the block; afterwards what leaves the pruned block.
    activation_memory : int
        Bytes of sublayer activations to keep between their two uses.
    config : PruneConfig
        Options of the method.

    Raises
    ------
    NumericalError
        If a Hessian cannot be factorised; names the block and the sublayer.
    """
    attention, ffn = (
        _prune_sublayer(block, sublayer, num_keep, stream, activation_memory, config)
        for sublayer, num_keep in (
            (block.attention, width.num_groups),
            (block.ffn, width.num_channels),
        )
    )
    return BlockPlan(block.index, attention, ffn)


def replay_block(
    block: Block, plan: BlockPlan, read: Callable[[str], Tensor], stream: Stream
) -> None:
    """Do again to a block what was decided before, and to the stream exactly the same.

    Parameters
    ----------
    block : Block
        As it was before, with its weights.
    plan : BlockPlan
        What was decided.
    read : callable
        Gives the output projections of the pruned block by their names in the model.
    stream : Stream
        What enters the block; afterwards what leaves the pruned block.
    """
    for sublayer, decided in zip(block.sublayers, (plan.attention, plan.ffn), strict=True):
        if len(decided.keep) == sublayer.num_units:
            pass_through(block, sublayer, stream)
        else:
            weight = sublayer.output.weight
            kept_units = torch.tensor(decided.keep, device=weight.device)
            name = f"{block.name}.{sublayer.spec.module}.{sublayer.spec.output}.weight"
            new_weight = read(name).to(weight.device)
            _apply(block, sublayer, stream, kept_units, new_weight)


def prune_blocks(
    model: PreTrainedModel, samples: Tensor, widths: Sequence[BlockWidths], config: PruneConfig
) -> list[BlockPlan]:
    """Prune a model that is in memory, in place.

    Parameters
    ----------
    model : PreTrainedModel
        A dense model of a supported family.
    samples : Tensor
        int64, (nsamples, seqlen), calibration tokens.
    widths : sequence of BlockWidths
        What each block keeps.
    config : PruneConfig
        Options of the method.

    Returns
    -------
    list of BlockPlan
        The model's forward pass is that of the pruned model afterwards; its config is not changed.
    """
    stream = embed(model, samples, choose_batch_size(*samples.shape))
    return [
        prune_block(block, width, stream, config.activation_memory, config)
        for block, width in zip(bind(model), widths, strict=True)
    ]


def _prune_sublayer(
    block: Block,
    sublayer: Sublayer,
    num_keep: int,
    stream: Stream,
    activation_memory: int,
    config: PruneConfig,
) -> SublayerPlan:
    if num_keep == sublayer.num_units:
        pass_through(block, sublayer, stream)
        return SublayerPlan(tuple(range(num_keep)), 0.0, 0.0, 0.0)
    hessian_II, kept = collect(block, sublayer, stream, activation_memory)
    weight = sublayer.output.weight
    plan, new_weight = None, weight.new_empty(len(weight), num_keep * sublayer.unit_size)
    if is_main():
        try:
            problem = obs.prepare(
                weight.to(hessian_II.device), hessian_II, config.damping, config.damping_mode
            )
        except NumericalError as err:
            place = f"block {block.index}, {sublayer.kind}"
            raise NumericalError(f"{place}: {err}", hint=err.hint) from err
        del hessian_II
        if problem.damping > config.damping:
            log.warning(
                "block %d, %s: the Hessian is singular to rounding, so its damping was raised "
                "from %g to %g",
                block.index,
                sublayer.kind,
                config.damping,
                problem.damping,
            )
        kept_units = _select(problem, sublayer, num_keep, config)
        columns_K = unit_columns(kept_units, sublayer.unit_size)
        solution_OK, error = obs.compensate(problem, columns_K)
        new_weight.copy_(solution_OK)
        relative = error / problem.power if problem.power else 0.0
        plan = SublayerPlan(tuple(kept_units.tolist()), error, relative, problem.damping)
        del problem, solution_OK
    plan = from_main(plan)
    kept_units = torch.tensor(plan.keep, device=weight.device)
    _apply(block, sublayer, stream, kept_units, tensor_from_main(new_weight), kept)
    return plan


def _apply(
    block: Block,
    sublayer: Sublayer,
    stream: Stream,
    kept_units: Tensor,
    new_weight: Tensor,
    kept: Sequence[Tensor] = (),
) -> None:
    columns = unit_columns(kept_units, sublayer.unit_size)
    propagate(block, sublayer, stream, columns, new_weight, kept)
    shrink_sublayer(sublayer, kept_units, new_weight)


def _select(problem: obs.Problem, sublayer: Sublayer, num_keep: int, config: PruneConfig) -> Tensor:
    """Indices of the units to keep, sorted."""
    matrices = problem.weight_OI, problem.inverse_II
    num_remove = sublayer.num_units - num_keep
    if sublayer.kind == "attention":
        removed = obs.eliminate_units(*matrices, num_remove, sublayer.unit_size, config.head_error)
    elif config.channel_selection == "greedy":
        removed = obs.eliminate_channels(*matrices, num_remove)
    else:
        removed = obs.eliminate_channel_groups(
            *matrices, num_remove, config.min_group_size, config.max_group_size
        )
    keep = torch.ones(sublayer.num_units, dtype=torch.bool, device=removed.order_R.device)
    keep[removed.order_R] = False
    return keep.nonzero().squeeze(1)

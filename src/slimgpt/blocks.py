"""Prune the blocks of a model: collect, decide, compensate, propagate, shrink.

Layer-wise structured pruning as in SlimGPT (Ling, Wang & Liu 2024, arXiv 2412.18110, algorithm 1):
blocks are pruned in order, each calibrated on the outputs of the pruned blocks before it.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimgpt import obs
from slimgpt.calibrate import (
    Activations,
    Stream,
    collect,
    pass_through,
    propagate,
)
from slimgpt.config import PruneConfig
from slimgpt.distributed import from_main, is_main, tensor_from_main
from slimgpt.errors import NumericalError
from slimgpt.families import Block, Sublayer
from slimgpt.importance import LOCAL_SCORES
from slimgpt.refit import refit
from slimgpt.schedule import BlockWidths, surveyed_removals
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
        Damping that the Hessian needed; 0 where nothing was removed or solved.
    errors : tuple of float
        In a survey, the error after each of `schedule.surveyed_removals`, damping included.
    refit : float or None
        What `slimgpt.refit.refit` made of the squared error; None where there was none. The other
        errors are those before.
    """

    keep: tuple[int, ...]
    error: float
    relative_error: float
    damping: float
    errors: tuple[float, ...] = ()
    refit: float | None = None


@dataclass(frozen=True)
class BlockPlan:
    """What was decided for one block."""

    block: int
    attention: SublayerPlan
    ffn: SublayerPlan

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "BlockPlan":
        """Invert `dataclasses.asdict` and a way through JSON."""
        plans = {}
        for kind in ("attention", "ffn"):
            given = values[kind]
            lists = {name: tuple(given[name]) for name in ("keep", "errors") if name in given}
            plans[kind] = SublayerPlan(**given | lists)
        return cls(block=values["block"], **plans)

    def __str__(self) -> str:
        """What went and what it cost, in a few words."""
        return ", ".join(
            f"{len(plan.keep)} {units} kept, error {plan.relative_error:.4f}"
            for plan, units in ((self.attention, "kv groups"), (self.ffn, "channels"))
        )


class Decision(NamedTuple):
    """What a method makes of one sublayer.

    Attributes
    ----------
    kept_units : Tensor
        Indices, sorted.
    weight_OK : Tensor
        The kept columns of the output projection.
    bias_O : Tensor or None
        Its bias.
    error, power : float
        E‖Δy‖² and E‖y‖² over the calibration tokens.
    damping, errors
        See `SublayerPlan`.
    """

    kept_units: Tensor
    weight_OK: Tensor
    bias_O: Tensor | None
    error: float
    power: float
    damping: float = 0.0
    errors: tuple[float, ...] = ()


def prune_block(
    block: Block,
    width: BlockWidths,
    stream: Stream,
    activation_memory: int,
    config: PruneConfig,
    scores: Sequence[Tensor] = (),
    is_survey: bool = False,
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
    scores : sequence of Tensor
        From a method of `importance.GLOBAL_SCORES`: of all sublayers of the model.
    is_survey : bool
        Whether the plan shall have the errors of other widths too.

    Raises
    ------
    NumericalError
        If a Hessian cannot be factorised; names the block and the sublayer.
    """
    attention, ffn = (
        _prune_sublayer(
            block, sublayer, num_keep, stream, activation_memory, config, given, is_survey
        )
        for sublayer, num_keep, given in zip_longest(
            block.sublayers,
            (width.num_groups, width.num_channels),
            scores[2 * block.index : 2 * block.index + 2],
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
        Gives the tensors of the pruned block by their names in the model.
    stream : Stream
        What enters the block; afterwards what leaves the pruned block.
    """
    for sublayer, decided in zip(block.sublayers, (plan.attention, plan.ffn), strict=True):
        pass_through(block, sublayer, stream, stream.dense_batches())
        if len(decided.keep) == sublayer.num_units:
            pass_through(block, sublayer, stream, stream.batches())
        else:
            device = sublayer.output.weight.device
            kept_units = torch.tensor(decided.keep, device=device)
            name = block.output_name(sublayer)
            if sublayer.output.bias is not None:
                _set_bias(sublayer.output, read(f"{name}.bias"))
            new_weight = read(f"{name}.weight").to(device)
            if decided.refit is not None:
                shrink_sublayer(sublayer, kept_units, new_weight)
                for input_name, linear in sublayer.inputs.items():
                    linear.weight.copy_(read(f"{block.linear_name(sublayer, input_name)}.weight"))
                pass_through(block, sublayer, stream, stream.batches())
            else:
                _apply(block, sublayer, stream, kept_units, new_weight)


def _prune_sublayer(
    block: Block,
    sublayer: Sublayer,
    num_keep: int,
    stream: Stream,
    activation_memory: int,
    config: PruneConfig,
    scores_U: Tensor | None,
    is_survey: bool,
) -> SublayerPlan:
    pass_through(block, sublayer, stream, stream.dense_batches())
    if num_keep == sublayer.num_units:
        pass_through(block, sublayer, stream, stream.batches())
        return SublayerPlan(tuple(range(num_keep)), 0.0, 0.0, 0.0)
    is_refit = config.refits and sublayer.kind == "ffn" and not is_survey
    # What was in front of the output projection is of no use after a refit.
    activations = collect(block, sublayer, stream, 0 if is_refit else activation_memory)
    kept, output, plan = activations.kept, sublayer.output, None
    new_weight = output.weight.new_empty(output.out_features, num_keep * sublayer.unit_size)
    if is_main():
        if config.method == "slimgpt":
            problem = _prepare(block, sublayer, activations, config)
            del activations  # the Hessian is as large as all else that the solver needs
            decision = _solve(problem, sublayer, num_keep, config, is_survey)
            del problem
        else:
            decision = _cut(sublayer, num_keep, activations, config, scores_U)
            del activations
        new_weight.copy_(decision.weight_OK)
        if decision.bias_O is not None:
            _set_bias(output, decision.bias_O)
        relative = decision.error / decision.power if decision.power else 0.0
        keep = tuple(decision.kept_units.tolist())
        plan = SublayerPlan(keep, decision.error, relative, decision.damping, decision.errors)
        del decision
    else:
        del activations
    plan = from_main(plan)
    kept_units = torch.tensor(plan.keep, device=new_weight.device)
    if output.bias is not None:
        tensor_from_main(output.bias)
    new_weight = tensor_from_main(new_weight)
    if not is_refit:
        _apply(block, sublayer, stream, kept_units, new_weight, kept)
        return plan
    dense = replace(sublayer, module=copy.deepcopy(sublayer.module))
    shrink_sublayer(sublayer, kept_units, new_weight)
    gain = refit(
        sublayer, dense, stream, config.correction, config.refit_epochs, config.seed + block.index
    )
    pass_through(block, sublayer, stream, stream.batches())
    return replace(plan, refit=gain)


def _prepare(
    block: Block, sublayer: Sublayer, activations: Activations, config: PruneConfig
) -> obs.Problem:
    hessian_II, cross_OI = activations.hessian_II, activations.cross_OI
    weight_OI = sublayer.output.weight.to(hessian_II.device)
    try:
        problem = obs.prepare(
            weight_OI,
            hessian_II,
            config.damping,
            config.damping_mode,
            cross_OI,
            config.correction,
        )
    except NumericalError as err:
        place = f"block {block.index}, {sublayer.kind}"
        raise NumericalError(f"{place}: {err}", hint=err.hint) from err
    if problem.damping > config.damping:
        log.warning(
            "block %d, %s: the Hessian is singular to rounding, so its damping was raised "
            "from %g to %g",
            block.index,
            sublayer.kind,
            config.damping,
            problem.damping,
        )
    return problem


def _solve(
    problem: obs.Problem, sublayer: Sublayer, num_keep: int, config: PruneConfig, is_survey: bool
) -> Decision:
    """SlimGPT: what costs least goes, and what stays makes up for it.

    A survey is always greedy, since its errors have to be nested.
    """
    is_attention, num_remove = sublayer.kind == "attention", sublayer.num_units - num_keep
    removals, further = range(0), 0
    if is_survey:
        step = 1 if is_attention else config.multiple_of
        removals = surveyed_removals(sublayer.num_units, num_keep, step)
        further = removals[-1] - num_remove
    if is_attention:
        left = obs.eliminate_units(
            problem, num_remove, sublayer.unit_size, config.head_error, num_further=further
        )
    elif is_survey or config.channel_selection == "greedy":
        left = obs.eliminate_channels(problem, num_remove, num_further=further)
    else:
        left = obs.eliminate_channel_groups(
            problem, num_remove, config.min_group_size, config.max_group_size
        )
    kept_units = left.kept_K[:: sublayer.unit_size] // sublayer.unit_size
    errors = left.errors.cumsum(dim=0).tolist()
    return Decision(
        kept_units,
        left.weight_OK,
        None,
        left.error,
        problem.power,
        problem.damping,
        tuple(errors[removed - 1] for removed in removals),
    )


def _cut(
    sublayer: Sublayer,
    num_keep: int,
    activations: Activations,
    config: PruneConfig,
    scores_U: Tensor | None,
) -> Decision:
    """The other methods: the units of the lowest scores go, and the weights stay as they are.

    FLAP puts the mean of what goes into the bias, so that only its variance is lost.
    """
    if scores_U is None:
        scores_U = LOCAL_SCORES[config.method](sublayer, activations)
    kept_units = scores_U.argsort(descending=True, stable=True)[:num_keep].sort().values
    hessian_II, mean_I = activations.hessian_II, activations.mean_I
    weight_OI = sublayer.output.weight.to(mean_I.device).to(mean_I.dtype)
    columns_K = unit_columns(kept_units, sublayer.unit_size).to(mean_I.device)
    removed_R = torch.ones_like(mean_I, dtype=torch.bool).index_fill_(0, columns_K, False)
    weight_OR, lost_RR = weight_OI[:, removed_R], hessian_II[removed_R][:, removed_R]
    bias_O = None
    if config.method == "flap":
        mean_R = mean_I[removed_R]
        lost_RR -= mean_R.outer(mean_R)
        bias_O = weight_OR @ mean_R
        if sublayer.output.bias is not None:
            bias_O += sublayer.output.bias.to(bias_O.device)
    error = obs.output_power(weight_OR, lost_RR)
    power = obs.output_power(weight_OI, hessian_II)
    return Decision(kept_units, weight_OI[:, columns_K], bias_O, error, power)


def _set_bias(linear: nn.Linear, bias_O: Tensor) -> None:
    bias_O = bias_O.to(linear.weight.dtype).to(linear.weight.device)
    linear.bias = nn.Parameter(bias_O, requires_grad=False)


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

"""Prune the blocks of a model: collect, decide, compensate, propagate, shrink.

Layer-wise structured pruning as in SlimGPT (Ling, Wang & Liu 2024, arXiv 2412.18110, algorithm 1):
blocks are pruned in order, each calibrated on the outputs of the pruned blocks before it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import Stream, collect, pass_through, propagate
from slimgpt.config import PruneConfig
from slimgpt.methods.registry import remove_lowest
from slimgpt.methods.slimgpt import prepare, solve
from slimgpt.models.family import Block, Sublayer
from slimgpt.models.unit_slices import unit_columns
from slimgpt.pruning.decisions import BlockPlan, SublayerPlan
from slimgpt.pruning.refit import refit
from slimgpt.pruning.slicing import shrink_sublayer
from slimgpt.runtime.distributed import from_main, is_main, tensor_from_main


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
            problem = prepare(block, sublayer, activations, config)
            del activations  # the Hessian is as large as all else that the solver needs
            decision = solve(problem, sublayer, num_keep, config, is_survey)
            del problem
        else:
            decision = remove_lowest(sublayer, num_keep, activations, config, scores_U)
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

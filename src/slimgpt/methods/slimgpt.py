"""SlimGPT: what costs least goes, and what stays makes up for it."""

import logging

from slimgpt.allocation.reallocation import surveyed_removals
from slimgpt.calibration.activations import Activations
from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.methods.base import Decision
from slimgpt.models.family import Block, Sublayer
from slimgpt.solver import elimination, hessian

log = logging.getLogger(__name__)


def prepare(
    block: Block, sublayer: Sublayer, activations: Activations, config: PruneConfig
) -> hessian.Problem:
    """Damp and factorise the Hessian of a sublayer."""
    hessian_II, cross_OI = activations.hessian_II, activations.cross_OI
    weight_OI = sublayer.output.weight.to(hessian_II.device)
    try:
        problem = hessian.prepare(
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


def solve(
    problem: hessian.Problem,
    sublayer: Sublayer,
    num_keep: int,
    config: PruneConfig,
    is_survey: bool,
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
        left = elimination.eliminate_units(
            problem, num_remove, sublayer.unit_size, config.head_error, num_further=further
        )
    elif is_survey or config.channel_selection == "greedy":
        left = elimination.eliminate_channels(problem, num_remove, num_further=further)
    else:
        left = elimination.eliminate_channel_groups(
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

"""SlimGPT: remove the units with the smallest error; the remaining weights compensate for them.

References
----------
Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110.
"""

import logging

import torch
from torch import Tensor

from slimgpt.allocation.reallocation import Curve
from slimgpt.allocation.shapes import Width
from slimgpt.calibration.activations import Activations, Stream
from slimgpt.calibration.routing import rerouting_errors
from slimgpt.config import PruneConfig
from slimgpt.methods.base import Decision, Method
from slimgpt.models.experts import Experts
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.solver.elimination import (
    Elimination,
    HeadCounts,
    compensated_bias,
    eliminate_channel_groups,
    eliminate_channels,
    eliminate_heads,
    eliminate_units,
)
from slimgpt.solver.hessian import Damping, Problem, Target, prepare

log = logging.getLogger(__name__)


class SlimGPT(Method):
    """Optimal Brain Surgeon on the output projection of each sublayer."""

    removes = Method.removes | {"experts"}
    compensates = True

    def __init__(self, config: PruneConfig) -> None:
        super().__init__(config)
        self.needs_dense = config.correction > 0 or config.drop_layers > 0
        self.refit_epochs = config.refit_epochs

    def score_experts(self, experts: Experts, stream: Stream) -> Tensor:
        """Error of leaving out each expert and routing its tokens again."""
        return rerouting_errors(experts, stream)

    def decide(self, sublayer: Sublayer, width: Width, activations: Activations) -> Decision:
        """Eliminate the units with the smallest error, see `slimgpt.methods.base.Method.decide`."""
        problem = self._prepare(sublayer, activations)
        if width == sublayer.num_units:  # only the target is new
            left, curve = _untouched(problem), ()
        else:
            left, curve = self.eliminate(problem, sublayer, width)
        bias_O = sublayer.output.bias
        if bias_O is not None:
            bias_O = compensated_bias(problem, left, bias_O)
        return Decision(
            _kept(sublayer, width, left),
            left.weight_OK,
            left.error,
            problem.power,
            bias_O,
            problem.damping,
            curve,
        )

    def eliminate(
        self, problem: Problem, sublayer: Sublayer, width: Width
    ) -> tuple[Elimination, Curve]:
        """Remove units; the second value, the errors at other widths, is empty here."""
        config = self.config
        if not isinstance(width, int):
            heads = HeadCounts(sublayer.num_units, sublayer.num_parts)
            return eliminate_heads(problem, heads, HeadCounts(*width), config.head_error), ()
        num_remove, first = sublayer.num_units - width, self.excluded(sublayer)
        if sublayer.unit_size > 1:
            size = sublayer.unit_size
            units = eliminate_units(problem, num_remove, size, config.head_error, first=first)
            return units, ()
        if config.channel_selection == "greedy":
            return eliminate_channels(problem, num_remove, first=first), ()
        bounds = config.min_group_size, config.max_group_size
        return eliminate_channel_groups(problem, num_remove, *bounds), ()

    def _prepare(self, sublayer: Sublayer, activations: Activations) -> Problem:
        config = self.config
        # Take the sums so that they are freed early: H is as large as the solver's other matrices.
        hessian_II, cross_OI = activations.take_sums()
        weight_OI = sublayer.output.weight.to(hessian_II.device)
        damping, target = Damping(config.damping, config.damping_mode), None
        if cross_OI is not None:
            correction = activations.correction
            correction = config.correction if correction is None else correction
            target = Target(cross_OI, correction, activations.target_O)
        mean_I = None if sublayer.output.bias is None else activations.mean_I
        problem = prepare(weight_OI, hessian_II, damping, target, mean_I)
        if problem.damping > config.damping:
            log.warning(
                "block %d, %s: the Hessian is singular to rounding, so its damping was raised "
                "from %g to %g",
                sublayer.block,
                sublayer.kind,
                config.damping,
                problem.damping,
            )
        return problem


def _untouched(problem: Problem) -> Elimination:
    weight_OI = problem.weight_OI
    errors = problem.added_I.new_zeros(0)
    columns_I = torch.arange(weight_OI.shape[1], device=weight_OI.device)
    return Elimination(columns_I[:0], errors, columns_I, weight_OI, 0.0)


def _kept(sublayer: Sublayer, width: Width, left: Elimination) -> Kept:
    """The units and query heads to which the remaining columns belong."""
    if isinstance(width, int):
        return Kept(left.kept_K[:: sublayer.unit_size] // sublayer.unit_size)
    head_size = sublayer.unit_size // sublayer.num_parts
    heads = left.kept_K[::head_size] // head_size
    return Kept(heads[:: width[1]] // sublayer.num_parts, heads)

"""SlimGPT: remove the units with the smallest error; the remaining weights compensate for them.

References
----------
Ling, Wang & Liu 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110.
"""

import logging

from slimgpt.calibration.activations import Activations
from slimgpt.config import PruneConfig
from slimgpt.methods.base import Decision, Method
from slimgpt.models.blocks import Sublayer
from slimgpt.solver.elimination import (
    Elimination,
    eliminate_channel_groups,
    eliminate_channels,
    eliminate_units,
)
from slimgpt.solver.hessian import Damping, Problem, Target, prepare

log = logging.getLogger(__name__)


class SlimGPT(Method):
    """Optimal Brain Surgeon on the output projection of each sublayer."""

    def __init__(self, config: PruneConfig) -> None:
        super().__init__(config)
        self.needs_dense = config.correction > 0
        self.refit_epochs = config.refit_epochs

    def decide(self, sublayer: Sublayer, num_keep: int, activations: Activations) -> Decision:
        """Eliminate the units with the smallest error, see `slimgpt.methods.base.Method.decide`."""
        problem = self._prepare(sublayer, activations)
        left, errors = self.eliminate(problem, sublayer, sublayer.num_units - num_keep)
        kept_units = left.kept_K[:: sublayer.unit_size] // sublayer.unit_size
        return Decision(
            kept_units,
            left.weight_OK,
            left.error,
            problem.power,
            damping=problem.damping,
            errors=errors,
        )

    def eliminate(
        self, problem: Problem, sublayer: Sublayer, num_remove: int
    ) -> tuple[Elimination, tuple[float, ...]]:
        """Remove units; the second value, the errors at other widths, is empty here."""
        config = self.config
        if sublayer.unit_size > 1:
            size = sublayer.unit_size
            return eliminate_units(problem, num_remove, size, config.head_error), ()
        if config.channel_selection == "greedy":
            return eliminate_channels(problem, num_remove), ()
        bounds = config.min_group_size, config.max_group_size
        return eliminate_channel_groups(problem, num_remove, *bounds), ()

    def _prepare(self, sublayer: Sublayer, activations: Activations) -> Problem:
        config = self.config
        # Take the sums so that they are freed early: H is as large as the solver's other matrices.
        hessian_II, cross_OI = activations.take_sums()
        weight_OI = sublayer.output.weight.to(hessian_II.device)
        damping = Damping(config.damping, config.damping_mode)
        target = None if cross_OI is None else Target(cross_OI, config.correction)
        problem = prepare(weight_OI, hessian_II, damping, target)
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

"""Magnitude: the norm of a unit's weights."""

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.methods.base import ScoringMethod, unit_sums
from slimgpt.models.sublayers import Sublayer


class Magnitude(ScoringMethod):
    """Squared norm of all weights of a unit."""

    def score(self, sublayer: Sublayer, activations: Activations) -> Tensor:
        """Σ w², see `ScoringMethod.score`."""
        return unit_sums(sublayer, lambda linear: linear.weight.float().square())

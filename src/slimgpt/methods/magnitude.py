"""Magnitude: the norm of a unit's weights."""

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.methods.base import unit_sums
from slimgpt.models.family import Sublayer


def magnitude(sublayer: Sublayer, _: Activations) -> Tensor:
    """Squared norm of all weights of a unit."""
    return unit_sums(sublayer, lambda linear: linear.weight.float().square())

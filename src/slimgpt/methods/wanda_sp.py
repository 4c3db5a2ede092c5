"""Wanda-sp: weights times the norms of their inputs."""

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.models.family import Sublayer


def wanda_sp(sublayer: Sublayer, activations: Activations) -> Tensor:
    """Σ |W_ij|·‖x_j‖ over the output projection's columns (Wanda-sp, in FLAP, section 4)."""
    norms_I = activations.hessian_II.diagonal().sqrt()
    sums_I = sublayer.output.weight.float().abs().sum(dim=0).to(norms_I.device)
    return (sums_I * norms_I).view(sublayer.num_units, -1).sum(dim=1)

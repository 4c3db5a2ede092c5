"""Wanda-sp: absolute weights times the norms of their inputs.

References
----------
Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
arXiv 2306.11695. Its structured form is from An et al. 2023 (FLAP), arXiv 2312.11983, section 4.
"""

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.methods.base import ScoringMethod
from slimgpt.models.sublayers import Sublayer


class WandaSP(ScoringMethod):
    """Absolute weights of the output projection times the norms of their inputs."""

    def score(self, sublayer: Sublayer, activations: Activations) -> Tensor:
        """Σ |W_ij|·‖x_j‖ over a unit's columns, see `ScoringMethod.score`."""
        norms_I = activations.hessian_II.diagonal().sqrt()
        sums_I = sublayer.output.weight.float().abs().sum(dim=0).to(norms_I.device)
        return (sums_I * norms_I).view(sublayer.num_units, -1).sum(dim=1)

"""FLAP: score by the fluctuation of the inputs; a bias replaces the removed columns' mean output.

References
----------
An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
arXiv 2312.11983.
"""

import copy
from typing import Any

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.errors import UnsupportedModelError
from slimgpt.methods.base import ScoringMethod
from slimgpt.models.layout import family_in
from slimgpt.models.sublayers import Sublayer


class Flap(ScoringMethod):
    """Removed columns contribute their mean output through the bias; only the variance is lost."""

    def extend_config(self, config: Any) -> Any:
        """Give every linear layer of the blocks a bias.

        Raises
        ------
        UnsupportedModelError
            If models of this type have no biases in their output projections.
        """
        biases = {spec.bias for spec in family_in(config).sublayers} - {True}
        text = config.get_text_config()
        keys = {key for key in biases if isinstance(key, str) and hasattr(text, key)}
        if keys != biases:
            raise UnsupportedModelError(
                f"models of type {config.model_type!r} have no biases in their output projections",
                hint="the method flap needs them; choose another --method",
            )
        if all(getattr(text, key) for key in keys):
            return config
        config = copy.deepcopy(config)
        for key in keys:
            setattr(config.get_text_config(), key, True)
        return config

    def score(self, sublayer: Sublayer, activations: Activations) -> Tensor:
        """Σ Var(x_j)·‖w_j‖² over a unit's columns (FLAP, WIFV), see `ScoringMethod.score`.

        The original FLAP also ranks the scores of all layers together to choose the widths; here
        the schedule sets the widths.
        """
        variance_I = activations.hessian_II.diagonal() - activations.mean_I.square()
        sums_I = sublayer.output.weight.float().square().sum(dim=0).to(variance_I.device)
        return (sums_I * variance_I).view(sublayer.num_units, -1).sum(dim=1)

    def replace(
        self, sublayer: Sublayer, weight_OR: Tensor, mean_R: Tensor, lost_RR: Tensor
    ) -> Tensor:
        """Put the mean output of the removed columns into the bias."""
        lost_RR -= mean_R.outer(mean_R)
        bias_O = weight_OR @ mean_R
        if sublayer.output.bias is not None:
            bias_O += sublayer.output.bias.to(bias_O.device)
        return bias_O

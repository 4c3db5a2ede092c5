"""FLAP: fluctuation of the inputs, and biases that replace what goes."""

import copy
from typing import Any

from torch import Tensor

from slimgpt.calibration.activations import Activations
from slimgpt.errors import UnsupportedModelError
from slimgpt.models.family import Sublayer, family_of


def with_biases(config: Any) -> Any:
    """Config of the same model with a bias in every linear layer of its blocks.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a model of a supported family.

    Raises
    ------
    UnsupportedModelError
        If models of this type have no such biases.
    """
    family = family_of(config.model_type)
    keys = family.attention.bias, family.ffn.bias
    if not all(hasattr(config, key) for key in keys):
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} have no biases in their output projections",
            hint="the method flap needs them; choose another --method",
        )
    config = copy.deepcopy(config)
    for key in keys:
        setattr(config, key, True)
    return config


def fluctuation(sublayer: Sublayer, activations: Activations) -> Tensor:
    """Σ Var(x_j)·‖w_j‖² over the output projection's columns (FLAP, WIFV).

    FLAP puts the scores of all layers on one scale to choose the widths too; here the schedule
    does that.
    """
    variance_I = activations.hessian_II.diagonal() - activations.mean_I.square()
    sums_I = sublayer.output.weight.float().square().sum(dim=0).to(variance_I.device)
    return (sums_I * variance_I).view(sublayer.num_units, -1).sum(dim=1)

"""Every method by its name."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import Activations
from slimgpt.config import PruneConfig
from slimgpt.methods.base import Decision
from slimgpt.methods.flap import fluctuation
from slimgpt.methods.loraprune import lora_gradient
from slimgpt.methods.magnitude import magnitude
from slimgpt.methods.random import random
from slimgpt.methods.taylor import taylor
from slimgpt.methods.wanda_sp import wanda_sp
from slimgpt.models.family import Sublayer
from slimgpt.models.unit_slices import unit_columns
from slimgpt.solver import hessian

LOCAL_SCORES: dict[str, Callable[[Sublayer, Activations], Tensor]] = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "flap": fluctuation,
}

GLOBAL_SCORES: dict[
    str, Callable[[PreTrainedModel, Tensor, Sequence[BlockWidths], int], list[Tensor]]
] = {"random": random, "taylor": taylor, "loraprune": lora_gradient}

NEEDS_GRADIENTS = {"taylor", "loraprune"}


def remove_lowest(
    sublayer: Sublayer,
    num_keep: int,
    activations: Activations,
    config: PruneConfig,
    scores_U: Tensor | None,
) -> Decision:
    """The other methods: the units of the lowest scores go, and the weights stay as they are.

    FLAP puts the mean of what goes into the bias, so that only its variance is lost.
    """
    if scores_U is None:
        scores_U = LOCAL_SCORES[config.method](sublayer, activations)
    kept_units = scores_U.argsort(descending=True, stable=True)[:num_keep].sort().values
    hessian_II, mean_I = activations.hessian_II, activations.mean_I
    weight_OI = sublayer.output.weight.to(mean_I.device).to(mean_I.dtype)
    columns_K = unit_columns(kept_units, sublayer.unit_size).to(mean_I.device)
    removed_R = torch.ones_like(mean_I, dtype=torch.bool).index_fill_(0, columns_K, False)
    weight_OR, lost_RR = weight_OI[:, removed_R], hessian_II[removed_R][:, removed_R]
    bias_O = None
    if config.method == "flap":
        mean_R = mean_I[removed_R]
        lost_RR -= mean_R.outer(mean_R)
        bias_O = weight_OR @ mean_R
        if sublayer.output.bias is not None:
            bias_O += sublayer.output.bias.to(bias_O.device)
    error = hessian.output_power(weight_OR, lost_RR)
    power = hessian.output_power(weight_OI, hessian_II)
    return Decision(kept_units, weight_OI[:, columns_K], bias_O, error, power)

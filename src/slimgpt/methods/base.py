"""How much each unit matters, by the rival methods that SlimGPT is compared with.

Every method gives each unit of a sublayer a score; the units of the lowest scores go. Calibration,
schedule and shrinking are SlimGPT's, so each layer loses as much as it does there, also with
methods whose authors rank all layers together. The weights that stay are not changed.

Shape suffixes: ``O`` out features, ``I`` in features, ``U`` units, ``N`` samples, ``T`` tokens.

References
----------
Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda),
arXiv 2306.11695.
An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP and
Wanda-sp), arXiv 2312.11983.
Ma, Fang & Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models",
arXiv 2305.11627.
Zhang et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
arXiv 2305.18403.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.models.family import Sublayer, bind


class Decision(NamedTuple):
    """What a method makes of one sublayer.

    Attributes
    ----------
    kept_units : Tensor
        Indices, sorted.
    weight_OK : Tensor
        The kept columns of the output projection.
    bias_O : Tensor or None
        Its bias.
    error, power : float
        E‖Δy‖² and E‖y‖² over the calibration tokens.
    damping, errors
        See `SublayerPlan`.
    """

    kept_units: Tensor
    weight_OK: Tensor
    bias_O: Tensor | None
    error: float
    power: float
    damping: float = 0.0
    errors: tuple[float, ...] = ()


def unit_sums(sublayer: Sublayer, score: Callable[[Any], Tensor]) -> Tensor:
    """Add up what each weight of a sublayer is worth, for each of its units.

    Parameters
    ----------
    sublayer : Sublayer
        In a live model.
    score : callable
        Gives the scores_OI of a linear layer's weight.

    Returns
    -------
    Tensor
        scores_U, from the rows of the input projections and the columns of the output projection.
    """
    linears = [sublayer.module.get_submodule(name) for name in sublayer.spec.inputs]
    output = sublayer.module.get_submodule(sublayer.spec.output)
    sums = [*(score(linear).sum(dim=1) for linear in linears), score(output).sum(dim=0)]
    sums_U = [s.cpu().double().view(sublayer.num_units, -1).sum(dim=1) for s in sums]
    return torch.stack(sums_U).sum(dim=0)


def sublayers_of(model: PreTrainedModel) -> list[Sublayer]:
    """List the sublayers of all blocks."""
    return [sublayer for block in bind(model) for sublayer in block.sublayers]


def add_gradient(model: PreTrainedModel, sample_T: Tensor) -> None:
    """Add the gradient of the loss on one sample, which is all that is in memory."""
    sample_NT = sample_T[None].to(model.device)
    model(sample_NT, labels=sample_NT, use_cache=False).loss.backward()

"""What the error of each sublayer does to the output of the whole model."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel


def price_changes(
    model: PreTrainedModel, changed: Mapping[str, Tensor], priced: list[str], samples_NT: Tensor
) -> list[float]:
    """By how much the divergence from the model falls, to first order, as a change is undone.

    Let W + ΔW be a changed weight and G the gradient, for it, of KL(model ‖ changed model) with all
    changes made. Then it is tr(Gᵀ ΔW): the derivative for a factor of ΔW, at 1.

    Parameters
    ----------
    model : PreTrainedModel
        The model before any change, with its weights.
    changed : mapping of str to Tensor
        Weights that change, by their names, in their new values.
    priced : list of str
        Names of the changes to undo, each by itself.
    samples_NT : Tensor
        int64, tokens to run over, best others than the changes were fitted to.

    Returns
    -------
    list of float
        In nats per token.
    """
    model.requires_grad_(False)
    changed = {name: weight.to(model.device) for name, weight in changed.items()}
    weights = [changed[name].requires_grad_() for name in priced]
    totals = torch.zeros(len(priced), dtype=torch.float64)
    for sample_T in samples_NT.to(model.device):
        arguments = {"input_ids": sample_T[None], "use_cache": False}
        with torch.no_grad():
            dense_TV = log_softmax(model(**arguments).logits[0].float(), dim=-1)
        with torch.enable_grad():
            logits_TV = functional_call(model, changed, kwargs=arguments).logits[0]
            divergence = kl_div(
                log_softmax(logits_TV.float(), dim=-1), dense_TV, reduction="sum", log_target=True
            )
        gradients = torch.autograd.grad(divergence, weights)
        for index, (name, weight) in enumerate(zip(priced, weights, strict=True)):
            change = weight.detach().float() - model.get_parameter(name).float()
            totals[index] += (gradients[index].float() * change).sum().cpu()
    return (totals / samples_NT.numel()).tolist()

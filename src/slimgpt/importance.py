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

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.calibrate import Activations
from slimgpt.families import Sublayer, bind, family_of
from slimgpt.schedule import BlockWidths

# Settings of LoRAPrune, but for the last three, which suit the few samples of a calibration.
LORA_RANK, LORA_ALPHA, LEARNING_RATE = 8, 16, 1e-4
NUM_STEPS, MOVING_AVERAGE, FULLY_MASKED = 16, 0.9, 0.8


def magnitude(sublayer: Sublayer, _: Activations) -> Tensor:
    """Squared norm of all weights of a unit."""
    return unit_sums(sublayer, lambda linear: linear.weight.float().square())


def wanda_sp(sublayer: Sublayer, activations: Activations) -> Tensor:
    """Σ |W_ij|·‖x_j‖ over the output projection's columns (Wanda-sp, in FLAP, section 4)."""
    norms_I = activations.hessian_II.diagonal().sqrt()
    sums_I = sublayer.output.weight.float().abs().sum(dim=0).to(norms_I.device)
    return (sums_I * norms_I).view(sublayer.num_units, -1).sum(dim=1)


def fluctuation(sublayer: Sublayer, activations: Activations) -> Tensor:
    """Σ Var(x_j)·‖w_j‖² over the output projection's columns (FLAP, WIFV).

    FLAP puts the scores of all layers on one scale to choose the widths too; here the schedule
    does that.
    """
    variance_I = activations.hessian_II.diagonal() - activations.mean_I.square()
    sums_I = sublayer.output.weight.float().square().sum(dim=0).to(variance_I.device)
    return (sums_I * variance_I).view(sublayer.num_units, -1).sum(dim=1)


LOCAL_SCORES: dict[str, Callable[[Sublayer, Activations], Tensor]] = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "flap": fluctuation,
}


def random(
    model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths], seed: int
) -> list[Tensor]:
    """Uniform random numbers; the samples and widths do not matter.

    Returns
    -------
    list of Tensor
        scores_U for the attention of the first block, its FFN, the attention of the second, …
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(s.num_units, generator=generator) for s in _sublayers(model)]


def taylor(
    model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths], seed: int
) -> list[Tensor]:
    """Σ |w·∂L/∂w| over all weights of a unit (LLM-Pruner, first order, element-wise, summed).

    L is the loss of the language model, summed over the samples. LLM-Pruner takes ten of them; here
    all of the calibration count.

    Parameters
    ----------
    model : PreTrainedModel
        A dense model in memory; its weights get gradients.
    samples_NT : Tensor
        int64, calibration tokens.
    widths, seed
        Do not matter.

    Returns
    -------
    list of Tensor
        As of `random`.
    """
    sublayers = _sublayers(model)
    for sublayer in sublayers:
        for linear in (*sublayer.inputs.values(), sublayer.output):
            linear.weight.requires_grad_()
    for sample_T in samples_NT:
        _add_gradient(model, sample_T)
    return [unit_sums(sublayer, _first_order) for sublayer in sublayers]


def lora_gradient(
    model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths], seed: int
) -> list[Tensor]:
    """Σ (w·ĝ)² over all weights of a unit, ĝ from the gradients of adapters (LoRAPrune).

    While adapters B A are trained on the samples, ĝ = ∂B A + B ∂A − ∂B ∂A estimates the gradient
    of the weight W + B A. The scores are moving averages, and the units of the lowest ones are
    masked as the training goes on, until as many are masked as shall go. LoRAPrune trains on much
    more text and keeps the adapters; here they are for the scores only, and recovery is a
    step of its own.

    Parameters
    ----------
    model : PreTrainedModel
        A dense model in memory; adapters are put into it.
    samples_NT : Tensor
        int64, calibration tokens.
    widths : sequence of BlockWidths
        What each block will keep.
    seed : int
        For the adapters.

    Returns
    -------
    list of Tensor
        As of `random`; −inf for units that go.
    """
    from peft import LoraConfig, inject_adapter_in_model

    sublayers = _sublayers(model)
    num_keep = [n for width in widths for n in (width.num_groups, width.num_channels)]
    adapted = family_of(model.config.model_type).linears
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=adapted)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    scores = [torch.zeros(s.num_units, dtype=torch.float64) for s in sublayers]
    for sublayer, scores_U in zip(sublayers, scores, strict=True):
        projection: Any = sublayer.module.get_submodule(sublayer.spec.output)
        projection.register_forward_pre_hook(partial(_mask, scores_U))
    batches = samples_NT.split(math.ceil(len(samples_NT) / NUM_STEPS))
    for step, batch_NT in enumerate(batches):
        optimizer.zero_grad()
        for sample_T in batch_NT:
            _add_gradient(model, sample_T)
        progress = min((step + 1) / len(batches) / FULLY_MASKED, 1)
        masked = 1 - (1 - progress) ** 3  # the share that is masked grows as a cubic
        for sublayer, keep, scores_U in zip(sublayers, num_keep, scores, strict=True):
            new_U = unit_sums(sublayer, _lora_gradient_squared)
            scores_U.mul_(MOVING_AVERAGE).add_(new_U, alpha=1 - MOVING_AVERAGE)
            num_masked = round(masked * (sublayer.num_units - keep))
            scores_U[scores_U.argsort(stable=True)[:num_masked]] = -torch.inf
        optimizer.step()
    return scores


GLOBAL_SCORES: dict[
    str, Callable[[PreTrainedModel, Tensor, Sequence[BlockWidths], int], list[Tensor]]
] = {"random": random, "taylor": taylor, "loraprune": lora_gradient}
NEEDS_GRADIENTS = {"taylor", "loraprune"}


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


def _sublayers(model: PreTrainedModel) -> list[Sublayer]:
    return [sublayer for block in bind(model) for sublayer in block.sublayers]


def _add_gradient(model: PreTrainedModel, sample_T: Tensor) -> None:
    """Add the gradient of the loss on one sample, which is all that is in memory."""
    sample_NT = sample_T[None].to(model.device)
    model(sample_NT, labels=sample_NT, use_cache=False).loss.backward()


def _first_order(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight.detach() * linear.weight.grad).abs()


def _lora_gradient_squared(adapted: Any) -> Tensor:
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    gradient_OI = b.grad @ a.detach() + b.detach() @ a.grad - b.grad @ a.grad
    weight_OI = adapted.base_layer.weight + adapted.get_delta_weight("default").detach()
    return (weight_OI * gradient_OI).square()


def _mask(scores_U: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Let nothing of the units of score −inf into an output projection."""
    (hidden_NTI,) = args
    mask_U1 = scores_U.isfinite().to(hidden_NTI)[:, None]
    return ((hidden_NTI.unflatten(-1, (len(scores_U), -1)) * mask_U1).flatten(-2),)

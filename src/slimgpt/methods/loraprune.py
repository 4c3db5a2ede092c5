"""LoRAPrune: first-order change of the loss from the gradients of LoRA adapters."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import add_gradient, sublayers_of, unit_sums
from slimgpt.models.family import family_of

# Settings of LoRAPrune, but for the last three, which suit the few samples of a calibration.
LORA_RANK, LORA_ALPHA, LEARNING_RATE = 8, 16, 1e-4

NUM_STEPS, MOVING_AVERAGE, FULLY_MASKED = 16, 0.9, 0.8


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

    sublayers = sublayers_of(model)
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
            add_gradient(model, sample_T)
        progress = min((step + 1) / len(batches) / FULLY_MASKED, 1)
        masked = 1 - (1 - progress) ** 3  # the share that is masked grows as a cubic
        for sublayer, keep, scores_U in zip(sublayers, num_keep, scores, strict=True):
            new_U = unit_sums(sublayer, _lora_gradient_squared)
            scores_U.mul_(MOVING_AVERAGE).add_(new_U, alpha=1 - MOVING_AVERAGE)
            num_masked = round(masked * (sublayer.num_units - keep))
            scores_U[scores_U.argsort(stable=True)[:num_masked]] = -torch.inf
        optimizer.step()
    return scores


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

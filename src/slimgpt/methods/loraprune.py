"""LoRAPrune: first-order change of the loss from the gradients of LoRA adapters.

References
----------
Zhang et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
arXiv 2305.18403.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import (
    ScoringMethod,
    add_adapters,
    add_gradient,
    scaled_units,
    sublayers_of,
    unit_sums,
)
from slimgpt.models.sublayers import Projection

# The first is LoRAPrune's; the others are chosen for few calibration samples.
LEARNING_RATE, NUM_STEPS, MOVING_AVERAGE, FULLY_MASKED = 1e-4, 16, 0.9, 0.8


class LoRAPrune(ScoringMethod):
    """Importance from the gradients of LoRA adapters, while units are masked step by step."""

    package = "peft"
    needs_gradients = True
    removes = frozenset({"groups", "channels"})

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Σ (w·ĝ)² over all weights of a unit; −inf for units to remove.

        Adapters B A are trained on the samples; ĝ = ∂B A + B ∂A − ∂B ∂A estimates the gradient of
        the weight W + B A. The scores are moving averages. Training masks more and more of the
        units with the lowest scores, up to the number to remove. LoRAPrune trains on much more text
        and keeps the adapters; here the adapters only give the scores, and recovery is a separate
        command. See `Method.score_model`.
        """
        sublayers = sublayers_of(model)
        kept = [number for width in widths for number in width]
        optimizer = torch.optim.AdamW(add_adapters(model, self.config.seed), LEARNING_RATE)
        scores = {s.name: torch.zeros(s.num_units, dtype=torch.float64) for s in sublayers}
        for sublayer in sublayers:
            projection: Any = sublayer.module.get_submodule(sublayer.spec.output)
            projection.register_forward_pre_hook(partial(_mask, scores[sublayer.name]))
        batches = samples_NT.split(math.ceil(len(samples_NT) / NUM_STEPS))
        for step, batch_NT in enumerate(batches):
            optimizer.zero_grad()
            for sample_T in batch_NT:
                add_gradient(model, sample_T)
            progress = min((step + 1) / len(batches) / FULLY_MASKED, 1)
            masked = 1 - (1 - progress) ** 3  # the masked share grows as a cubic
            for sublayer, width in zip(sublayers, kept, strict=True):
                scores_U = scores[sublayer.name]
                new_U = unit_sums(sublayer, _lora_gradient_squared)
                scores_U.mul_(MOVING_AVERAGE).add_(new_U, alpha=1 - MOVING_AVERAGE)
                assert isinstance(width, int)  # only measured widths may be of another kind
                num_masked = round(masked * (sublayer.num_units - width))
                scores_U[scores_U.argsort(stable=True)[:num_masked]] = -torch.inf
            optimizer.step()
        return scores


def _lora_gradient_squared(adapted: Any) -> Tensor:
    """(w·ĝ)² in the shape of the layer's weight."""
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    gradient_OI = b.grad @ a.detach() + b.detach() @ a.grad - b.grad @ a.grad
    weight = adapted.base_layer.weight + adapted.get_delta_weight("default").detach()
    return (weight * Projection(adapted.base_layer).oriented(gradient_OI)).square()


def _mask(scores_U: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Zero the inputs of an output projection that belong to units with score −inf."""
    return (scaled_units(args[0], scores_U.isfinite()),)

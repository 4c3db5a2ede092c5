"""Compresso: gates of the units, learnt together with LoRA adapters.

References
----------
Guo et al. 2023, "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large
Language Models", arXiv 2310.05015.

Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization",
arXiv 1712.01312.

Shape suffixes: ``U`` units, ``N`` samples, ``T`` tokens, ``I`` columns of an output projection.
"""

import math
from collections.abc import Sequence

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
)

# Of the hard concrete distribution (Louizos et al.).
TEMPERATURE, LOWEST, HIGHEST = 2 / 3, -0.1, 1.1

# Chosen for few calibration samples. The gates start nearly open.
LOG_ALPHA, ADAPTER_RATE, GATE_RATE, MULTIPLIER_RATE, WARM_UP = 2.5, 1e-4, 0.1, 0.1, 0.5


class Compresso(ScoringMethod):
    """Importance from gates that are trained to close until enough parameters are gone."""

    package = "peft"
    needs_gradients = True
    removes = frozenset({"groups", "channels"})

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Log α of the gate of each unit.

        Each sample is one step. The loss is that of language modelling with gates z drawn from
        hard concrete distributions, plus λ₁ d + λ₂ d², where d is the expected removed fraction of
        the parameters minus the wanted one, which rises to that of `widths` in the first half. λ₁
        and λ₂ are raised along their gradients (augmented Lagrangian). Compresso trains on much
        more text, adds a prompt, cuts by one threshold for all layers and keeps the adapters; here
        the gates only rank the units of each sublayer. See `Method.score_model`.
        """
        sublayers = sublayers_of(model)
        shapes = [sublayer.shape for sublayer in sublayers]
        num_params = sum(shape.params for shape in shapes)
        kept = [number for width in widths for number in width]
        left = sum(shape.kept_params(n) for shape, n in zip(shapes, kept, strict=True))
        adapters = add_adapters(model, self.config.seed)
        gates = [Gates(sublayer.num_units) for sublayer in sublayers]
        for sublayer, gate in zip(sublayers, gates, strict=True):
            output = sublayer.module.get_submodule(sublayer.spec.output)
            output.register_forward_pre_hook(gate)
        multipliers = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.AdamW(
            [
                {"params": adapters, "lr": ADAPTER_RATE},
                {"params": [gate.log_alpha_U for gate in gates], "lr": GATE_RATE},
            ],
            weight_decay=0.0,
        )
        ascent = torch.optim.Adam([multipliers], MULTIPLIER_RATE, maximize=True)
        generator = torch.Generator().manual_seed(self.config.seed)
        for step, sample_T in enumerate(samples_NT, start=1):
            for gate in gates:
                gate.draw(generator)
            add_gradient(model, sample_T)
            closed = [
                shape.unit_params * (1 - gate.open_probability()).sum()
                for shape, gate in zip(shapes, gates, strict=True)
            ]
            wanted = (1 - left / num_params) * min(step / len(samples_NT) / WARM_UP, 1)
            excess = torch.stack(closed).sum() / num_params - wanted
            (multipliers[0] * excess + multipliers[1] * excess.square()).backward()
            for stepped in (optimizer, ascent):
                stepped.step()
                stepped.zero_grad()
        return {
            sublayer.name: gate.log_alpha_U.detach().double()
            for sublayer, gate in zip(sublayers, gates, strict=True)
        }


class Gates:
    """Gates of the units of a sublayer; a forward pre-hook of its output projection.

    Attributes
    ----------
    log_alpha_U : Tensor
        Parameters of the distributions, on the CPU.
    """

    def __init__(self, num_units: int) -> None:
        self.log_alpha_U = torch.full((num_units,), LOG_ALPHA, requires_grad=True)
        self._open_U = torch.ones(num_units)

    def draw(self, generator: torch.Generator) -> None:
        """Draw the gates: min(1, max(0, s (ζ − γ) + γ)), s = σ((ln u − ln(1 − u) + ln α) / β)."""
        noise_U = torch.rand(len(self.log_alpha_U), generator=generator).clamp(1e-6, 1 - 1e-6)
        soft_U = ((noise_U.logit() + self.log_alpha_U) / TEMPERATURE).sigmoid()
        self._open_U = (soft_U * (HIGHEST - LOWEST) + LOWEST).clamp(0, 1)

    def open_probability(self) -> Tensor:
        """Probability that each gate is not 0: σ(ln α − β ln(−γ/ζ))."""
        return (self.log_alpha_U - TEMPERATURE * math.log(-LOWEST / HIGHEST)).sigmoid()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply the inputs of the projection by the gates of their units."""
        return (scaled_units(args[0], self._open_U),)

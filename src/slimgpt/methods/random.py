"""Random scores: the lower bound in a comparison of methods."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import ScoringMethod, sublayers_of


class Random(ScoringMethod):
    """Uniform random numbers."""

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Draw the scores; samples and widths are unused. See `Method.score_model`."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return {s.name: torch.rand(s.num_units, generator=generator) for s in sublayers_of(model)}

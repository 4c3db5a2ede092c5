"""Random scores: the lower bound in a comparison of methods."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import Stream
from slimgpt.methods.base import Method, ScoringMethod, sublayers_of
from slimgpt.models.experts import Experts


class Random(ScoringMethod):
    """Uniform random numbers."""

    removes = Method.removes | {"experts"}

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Draw the scores; samples and widths are unused. See `Method.score_model`."""
        generator = torch.Generator().manual_seed(self.config.seed)
        sublayers = sublayers_of(model)
        for sublayer in [s for s in sublayers if isinstance(s, Experts)]:
            sublayers += map(sublayer.expert, range(sublayer.num_units))
        return {s.name: torch.rand(s.num_units, generator=generator) for s in sublayers}

    def score_experts(self, experts: Experts, stream: Stream) -> Tensor:
        """Look up the scores, see `Method.score_experts`."""
        return self.scores[experts.name]

"""Random scores, the lower bound of a comparison."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import sublayers_of


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
    return [torch.rand(s.num_units, generator=generator) for s in sublayers_of(model)]

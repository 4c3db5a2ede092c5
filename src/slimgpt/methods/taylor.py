"""Taylor: first-order change of the loss, as in LLM-Pruner.

References
----------
Ma, Fang & Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models",
arXiv 2305.11627.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import ScoringMethod, add_gradient, sublayers_of, unit_sums


class Taylor(ScoringMethod):
    """First-order importance of the weights, summed over each unit."""

    needs_gradients = True
    removes = frozenset({"groups", "channels"})

    def score_model(
        self, model: PreTrainedModel, samples_NT: Tensor, widths: Sequence[BlockWidths]
    ) -> dict[str, Tensor]:
        """Σ |w·∂L/∂w| over all weights of a unit (LLM-Pruner, element-wise).

        L is the language-modelling loss, summed over the samples. LLM-Pruner uses ten samples; this
        implementation uses all calibration samples. See `Method.score_model`.
        """
        sublayers = sublayers_of(model)
        for sublayer in sublayers:
            for projection in (*sublayer.inputs.values(), sublayer.output):
                projection.module.weight.requires_grad_(True)
        for sample_T in samples_NT:
            add_gradient(model, sample_T)
        return {sublayer.name: unit_sums(sublayer, _first_order) for sublayer in sublayers}


def _first_order(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight.detach() * linear.weight.grad).abs()

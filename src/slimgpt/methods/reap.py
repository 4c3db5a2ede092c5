"""REAP: remove whole experts with the smallest router weight times norm of the output.

References
----------
Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
arXiv 2510.13999.
"""

from torch import Tensor

from slimgpt.calibration.activations import Stream
from slimgpt.calibration.routing import weighted_norms
from slimgpt.methods.base import ScoringMethod
from slimgpt.models.experts import Experts


class Reap(ScoringMethod):
    """Removes experts only; the others and the router's rows stay as they are."""

    removes = frozenset({"experts"})

    def score_experts(self, experts: Experts, stream: Stream) -> Tensor:
        """Mean router weight times norm of the output, see `Method.score_experts`."""
        return weighted_norms(experts, stream)

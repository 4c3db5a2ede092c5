"""Taylor: first-order change of the loss, as in LLM-Pruner."""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.allocation.shapes import BlockWidths
from slimgpt.methods.base import add_gradient, sublayers_of, unit_sums


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
    sublayers = sublayers_of(model)
    for sublayer in sublayers:
        for linear in (*sublayer.inputs.values(), sublayer.output):
            linear.weight.requires_grad_()
    for sample_T in samples_NT:
        add_gradient(model, sample_T)
    return [unit_sums(sublayer, _first_order) for sublayer in sublayers]


def _first_order(linear: nn.Linear) -> Tensor:
    assert linear.weight.grad is not None
    return (linear.weight.detach() * linear.weight.grad).abs()

"""Slicing: remove the rows and columns of pruned units from a live sublayer."""

from torch import Tensor, nn

from slimgpt.models.family import Sublayer
from slimgpt.models.unit_slices import unit_columns


def slice_sublayer(sublayer: Sublayer, kept_units: Tensor, output_weight: Tensor) -> None:
    """Slice a sublayer to the kept units, in place.

    Parameters
    ----------
    sublayer : Sublayer
        The dense sublayer.
    kept_units : Tensor
        int64, sorted.
    output_weight : Tensor
        (out features, kept columns), the compensated weight of the output projection.
    """
    for name, linear in sublayer.inputs.items():
        rows = unit_columns(kept_units, linear.out_features // sublayer.num_units)
        bias = None if linear.bias is None else linear.bias[rows]
        sublayer.module.set_submodule(name, _linear(linear.weight[rows], bias))
    output = _linear(output_weight, sublayer.output.bias)
    sublayer.module.set_submodule(sublayer.spec.output, output)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear

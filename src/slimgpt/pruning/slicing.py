"""Slicing: remove the rows and columns of pruned units from a live sublayer."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept


def slice_sublayer(sublayer: Sublayer, kept: Kept, output_weight: Tensor) -> None:
    """Slice a sublayer to the kept units, in place.

    Parameters
    ----------
    sublayer : Sublayer
        The dense sublayer.
    kept : Kept
        The units to keep.
    output_weight : Tensor
        (out features, kept columns), the compensated weight of the output projection.
    """
    output = f"{sublayer.spec.output}.weight"
    for name, (axis, indices) in sublayer.slices(kept).items():
        path, _, attribute = name.rpartition(".")
        owner = sublayer.module.get_submodule(path)
        parameter = getattr(owner, attribute)
        if name == output:
            sliced = sublayer.output.oriented(output_weight)
        else:
            sliced = parameter.index_select(axis, indices.to(parameter.device))
        setattr(owner, attribute, nn.Parameter(sliced.contiguous(), requires_grad=False))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, Conv1D):
            owner.nx, owner.nf = owner.weight.shape
    module: Any = sublayer.module
    if kept.parts is not None and hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = len(kept.parts) // len(kept.units)

"""Slicing: remove the rows and columns of pruned units from a live sublayer; or mask them."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimgpt.models.experts import Experts
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
        (out features, kept columns), the compensated weight of the output projection; of experts,
        those of all kept experts, see `slimgpt.models.experts.Experts.slice`.
    """
    if isinstance(sublayer, Experts):
        sublayer.slice(kept, output_weight)
        return
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


def masked_sublayer(sublayer: Sublayer, kept: Kept, output_weight: Tensor) -> Sublayer:
    """Copy a sublayer with all its units, of which the removed ones have no effect.

    It computes the same as the sliced sublayer, except where the units depend on each other.

    Parameters
    ----------
    sublayer, kept, output_weight
        As in `slice_sublayer`.
    """
    masked = replace(sublayer, module=copy.deepcopy(sublayer.module))
    if isinstance(masked, Experts):
        masked = replace(masked, routed_E=kept.units)
        down_proj = masked.weights.down_proj
        zeros_ECI = torch.zeros_like(down_proj[kept.units])
        columns_ECI = masked.channels(kept)[:, None].expand_as(output_weight)
        down_proj.index_copy_(0, kept.units, zeros_ECI.scatter_(2, columns_ECI, output_weight))
        return masked
    masked_OI = torch.zeros_like(masked.output.weight)
    masked_OI[:, sublayer.columns(kept)] = output_weight
    masked.output.weight.copy_(masked_OI)
    return masked

"""Rows and columns of a tensor that belong to a unit."""

import torch
from torch import Tensor


def unit_columns(kept_units: Tensor, unit_size: int) -> Tensor:
    """Compute the indices of the rows or columns of the kept units.

    Parameters
    ----------
    kept_units : Tensor
        int64, sorted.
    unit_size : int
        Rows or columns per unit.

    Returns
    -------
    Tensor
        int64, (units · unit_size,), sorted.
    """
    offsets = torch.arange(unit_size, device=kept_units.device)
    return (kept_units[:, None] * unit_size + offsets).flatten()

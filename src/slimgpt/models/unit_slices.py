"""Which rows and columns of a tensor belong to a unit."""

import torch
from torch import Tensor


def unit_columns(kept_units: Tensor, unit_size: int) -> Tensor:
    """Indices of the rows or columns of the kept units.

    Parameters
    ----------
    kept_units : Tensor
        int64, sorted.
    unit_size : int
        Rows or columns that each unit owns.

    Returns
    -------
    Tensor
        int64, (units · unit_size,), sorted.
    """
    offsets = torch.arange(unit_size, device=kept_units.device)
    return (kept_units[:, None] * unit_size + offsets).flatten()

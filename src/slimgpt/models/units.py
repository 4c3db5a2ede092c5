"""Rows and columns of a tensor that belong to a unit."""

from collections.abc import Mapping, Sequence

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


def unit_rows(num_rows: int, segments: Sequence[str], counts: Mapping[str, int]) -> list[Tensor]:
    """Compute the rows of each unit in a tensor of fused projections.

    Parameters
    ----------
    num_rows : int
        Rows of the tensor.
    segments : sequence of str
        What the rows belong to, from top to bottom: ``head`` and ``group`` of attention, or
        ``channel``. The fused projection of queries, keys and values is head, group, group. By
        default all rows are one segment.
    counts : mapping of str to int
        How many of each there are. The first entry counts the units; all are multiples of it.

    Returns
    -------
    list of Tensor
        int64, (units, rows of a unit), one for each segment.
    """
    first, num_units = next(iter(counts.items()))
    segments = segments or [first]
    share = num_rows // sum(counts[kind] for kind in segments)
    rows, start = [], 0
    for kind in segments:
        end = start + share * counts[kind]
        rows.append(torch.arange(start, end).view(num_units, -1))
        start = end
    return rows

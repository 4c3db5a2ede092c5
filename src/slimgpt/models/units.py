"""Rows and columns of a tensor that belong to a unit."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Units that a sublayer keeps.

    Attributes
    ----------
    units : Tensor
        int64, sorted.
    parts : Tensor or None
        int64, sorted, if these units lose parts too: the query heads that the groups keep, or the
        channels that the experts keep, both counted through all units.
    """

    units: Tensor
    parts: Tensor | None = None

    def to(self, device: torch.device) -> "Kept":
        """Move the indices to a device."""
        return Kept(self.units.to(device), None if self.parts is None else self.parts.to(device))


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


def segment_rows(
    num_rows: int, segments: Sequence[str], counts: Mapping[str, int], repeats: int = 1
) -> list[tuple[str, Tensor]]:
    """Compute the rows of each head, group or channel in a tensor of fused projections.

    Parameters
    ----------
    num_rows : int
        Rows of the tensor.
    segments : sequence of str
        What the rows belong to, from top to bottom: ``head`` and ``group`` of attention, or
        ``channel``. The fused projection of queries, keys and values is head, group, group.
    counts : mapping of str to int
        How many of each there are.
    repeats : int
        How often the segments repeat. Each time they have the next rows of the same number of
        heads, groups or channels.

    Returns
    -------
    list of tuple
        For each segment, what its rows belong to, and their indices: int64, (how many, rows of
        each).
    """
    share = num_rows // sum(counts[kind] for kind in segments)
    sizes = [share * counts[kind] // repeats for kind in segments]
    rows = torch.arange(repeats * sum(sizes)).view(repeats, -1).split(sizes, dim=1)
    return [(kind, r.reshape(counts[kind], -1)) for kind, r in zip(segments, rows, strict=True)]

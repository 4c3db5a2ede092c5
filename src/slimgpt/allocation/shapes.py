"""Shapes and widths of a block: the prunable units of each sublayer, and those that it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SublayerShape:
    """The prunable units of a sublayer, all of equal size.

    Attributes
    ----------
    kind : str
        ``attention`` or ``ffn``.
    num_units : int
        Key/value groups of attention, channels of an FFN.
    unit_params : int
        Parameters of a unit.
    """

    kind: str
    num_units: int
    unit_params: int

    def step(self, multiple_of: int) -> int:
        """Step of the sublayer's width: `multiple_of` for channels, 1 for groups."""
        return multiple_of if self.kind == "ffn" else 1


@dataclass(frozen=True)
class BlockShape:
    """The prunable units of a block: its sublayers, in the order of computation."""

    sublayers: tuple[SublayerShape, ...]

    @property
    def params(self) -> int:
        """Number of prunable parameters."""
        return sum(sublayer.num_units * sublayer.unit_params for sublayer in self.sublayers)


# Units that a block keeps, for each of its sublayers.
BlockWidths = tuple[int, ...]


def removed_params(shape: BlockShape, widths: Sequence[int]) -> int:
    """Number of parameters removed from a block that keeps these widths."""
    return sum(
        (sublayer.num_units - num_keep) * sublayer.unit_params
        for sublayer, num_keep in zip(shape.sublayers, widths, strict=True)
    )

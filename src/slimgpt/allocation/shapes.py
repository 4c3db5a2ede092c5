"""What can be removed from a block, and what it keeps: a list of sublayers of equal units."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SublayerShape:
    """What can be removed from a sublayer.

    Attributes
    ----------
    kind : str
        ``attention`` or ``ffn``.
    num_units : int
        Key/value groups of attention, channels of an FFN.
    unit_params : int
        Parameters that go with a unit.
    """

    kind: str
    num_units: int
    unit_params: int

    def step(self, multiple_of: int) -> int:
        """Number that the units left must be a multiple of: only for channels is it not 1."""
        return multiple_of if self.kind == "ffn" else 1


@dataclass(frozen=True)
class BlockShape:
    """What can be removed from a block: its sublayers, in the order of computation."""

    sublayers: tuple[SublayerShape, ...]

    @property
    def params(self) -> int:
        """All parameters that can be removed."""
        return sum(sublayer.num_units * sublayer.unit_params for sublayer in self.sublayers)


# Units that a block keeps, for each of its sublayers.
BlockWidths = tuple[int, ...]


def removed_params(shape: BlockShape, widths: Sequence[int]) -> int:
    """Parameters that a block of these widths has lost."""
    return sum(
        (sublayer.num_units - num_keep) * sublayer.unit_params
        for sublayer, num_keep in zip(shape.sublayers, widths, strict=True)
    )

"""Shapes and widths of a block: the prunable units of each sublayer, and those that it keeps."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SublayerShape:
    """The units of a sublayer, all of equal size.

    Attributes
    ----------
    kind : str
        ``attention``, ``ffn`` or ``experts``.
    num_units : int
        Key/value groups of attention, channels of an FFN, or experts.
    unit_params : int
        Parameters of a unit.
    is_fixed : bool
        Whether the sublayer keeps all its units, because its family has no place for fewer.
    parts, part_params : int
        What each unit can lose equally many of, and the parameters of one: query heads of a group;
        channels of an expert. 1 and 0 where there is no choice.
    fewest, multiple : int
        Fewest units that can be left, and what their number must be a multiple of.
    """

    kind: str
    num_units: int
    unit_params: int
    is_fixed: bool = False
    parts: int = 1
    part_params: int = 0
    fewest: int = 1
    multiple: int = 1

    @property
    def params(self) -> int:
        """Parameters of all units."""
        return self.num_units * self.unit_params

    def kept_params(self, width: "Width") -> int:
        """Parameters of so many units."""
        if isinstance(width, int):
            return width * self.unit_params
        units, parts = width
        return units * (self.unit_params - (self.parts - parts) * self.part_params)

    def step(self, multiple_of: int) -> int:
        """Step of the sublayer's width: `multiple_of` for channels, 1 for groups."""
        return multiple_of if self.kind == "ffn" else 1

    @property
    def smallest_step(self) -> "Width":
        """Width after the smallest step of attention: one head less, of each group if possible."""
        if self.parts > 1:
            return self.num_units, self.parts - 1
        return max(self.num_units - 1, 1)


@dataclass(frozen=True)
class BlockShape:
    """The prunable units of a block: its sublayers, in the order of computation."""

    sublayers: tuple[SublayerShape, ...]

    @property
    def params(self) -> int:
        """Number of prunable parameters."""
        return sum(sublayer.params for sublayer in self.sublayers if not sublayer.is_fixed)


# Units that a sublayer keeps: groups or channels; 0 if the sublayer is gone. If the groups of an
# attention lose query heads too: (groups, query heads of each).
Width = int | tuple[int, int]

# The same for each sublayer of a block. A block whose sublayers are all gone is dropped.
BlockWidths = tuple[Width, ...]


def is_dropped(widths: BlockWidths) -> bool:
    """Whether a block with these widths is left out of the model."""
    return not any(widths)


def written_width(width: Width) -> Width:
    """Width with which a sublayer is written: one unit stays, with zeros, where it is gone."""
    return width or 1


def has_experts(shapes: Sequence[BlockShape]) -> bool:
    """Whether some blocks have experts."""
    return any(sublayer.kind == "experts" for shape in shapes for sublayer in shape.sublayers)


def removed_params(shape: BlockShape, widths: Sequence[Width]) -> int:
    """Number of prunable parameters removed from a block that keeps these widths."""
    if is_dropped(tuple(widths)):
        return shape.params
    return sum(
        sublayer.params - sublayer.kept_params(written_width(width))
        for sublayer, width in zip(shape.sublayers, widths, strict=True)
    )


def whole_widths(shape: BlockShape) -> BlockWidths:
    """Widths of a block that keeps all its units."""
    return tuple(sublayer.num_units for sublayer in shape.sublayers)

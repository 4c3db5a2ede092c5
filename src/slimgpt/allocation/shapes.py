"""What can be removed from a block, and what it keeps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """What can be removed from one block.

    Attributes
    ----------
    num_groups, num_channels : int
        Key/value groups of attention and channels of the FFN.
    group_params, channel_params : int
        Parameters that go with one of them.
    """

    num_groups: int
    group_params: int
    num_channels: int
    channel_params: int

    @property
    def params(self) -> int:
        """Prunable parameters of the block."""
        return self.num_groups * self.group_params + self.num_channels * self.channel_params


@dataclass(frozen=True)
class BlockWidths:
    """How many key/value groups and FFN channels a block keeps."""

    num_groups: int
    num_channels: int


def removed_params(shape: BlockShape, widths: BlockWidths) -> int:
    """Parameters that a block of these widths has lost."""
    return (shape.num_groups - widths.num_groups) * shape.group_params + (
        shape.num_channels - widths.num_channels
    ) * shape.channel_params

"""From one pruning ratio to the integer widths of every block. Pure arithmetic.

References
----------
Ling, Wang & Liu 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110,
section 3.4 (Incremental Pruning Ratio).
"""

import math
from collections.abc import Collection, Sequence

from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params
from slimgpt.errors import ConfigError


def curve(schedule: str, num_blocks: int) -> list[float]:
    """Position of each block's ratio between the smallest (0) and the largest (1).

    ``log``: ln(1 + i)/ln(n) for block i of n (SlimGPT, section 3.4). ``linear``: i/(n − 1). The
    ``_decrease`` schedules are these from the last block to the first.
    """
    shape, _, decrease = schedule.partition("_")
    if num_blocks == 1 or shape == "uniform":
        return [1.0] * num_blocks
    if shape == "log":
        rising = [math.log(1 + i) / math.log(num_blocks) for i in range(num_blocks)]
    else:
        rising = [i / (num_blocks - 1) for i in range(num_blocks)]
    return rising[::-1] if decrease else rising


def layer_ratios(
    shapes: Sequence[BlockShape], ratio: float, schedule: str, min_ratio: float | None = None
) -> list[float]:
    """Ratio of each block, such that their mean, weighted by parameters, is the target.

    Parameters
    ----------
    shapes : sequence of BlockShape
        The blocks, first to last.
    ratio : float
        Fraction of all prunable parameters to remove, in [0, 1).
    schedule : {"log", "linear", "uniform", "log_decrease", "linear_decrease"}
        See `curve`.
    min_ratio : float, optional
        The smallest ratio r_0; ``ratio / 8`` if not given. The largest one follows from it.

    Returns
    -------
    list of float
        r_i = r_0 + (r_max − r_0)·curve_i.
    """
    smallest = ratio / 8 if min_ratio is None else min_ratio
    positions = curve(schedule, len(shapes))
    total = sum(shape.params for shape in shapes)
    weighted = sum(shape.params * s for shape, s in zip(shapes, positions, strict=True))
    spread = (ratio - smallest) * total / weighted
    return [smallest + spread * s for s in positions]


def plan_widths(
    shapes: Sequence[BlockShape],
    ratio: float,
    schedule: str = "log",
    min_ratio: float | None = None,
    multiple_of: int = 8,
    uniform_groups: Collection[int] | None = None,
    given: Sequence[float] = (),
    attention_share: float = 1.0,
) -> list[BlockWidths]:
    """Integer widths of every block that together meet the target ratio.

    A block loses as many groups as the ratio of its attention covers in whole, more where the FFN
    cannot make up for that, and keeps at least one; the FFN takes up the difference (a group more
    costs far more, see docs/method.md). Channels are rounded to multiples, and what rounding left
    over is carried to the next block, so that the whole model misses the target by half a step of
    the last block at most (more only where a group has more parameters than the FFN of its block
    can make up for).

    Parameters
    ----------
    shapes, ratio, schedule, min_ratio
        See `layer_ratios`.
    multiple_of : int
        FFN widths are multiples of this, or the original width.
    uniform_groups : collection of int, optional
        If given, all blocks get the same widths, with a number of groups from this collection;
        nothing is carried over. The schedule must be uniform too.
    given : sequence of float, optional
        Ratios of the first blocks; the others keep all. The ratio and the schedule do not matter
        then.
    attention_share : float
        Ratio of attention over that of its block, from 0 to 1.

    Returns
    -------
    list of BlockWidths
        First block to last.

    Raises
    ------
    ConfigError
        If some block would lose more than it can; names the largest feasible ratio. If uniform
        widths are asked for and the blocks differ. If more ratios are given than there are blocks.
    """
    if len(given) > len(shapes):
        raise ConfigError(
            f"layer_ratios has {len(given)} ratios, but there are {len(shapes)} layers",
            hint=f"give {len(shapes)} ratios at most",
        )
    if uniform_groups is not None and len(set(shapes)) > 1:
        raise ConfigError(
            "uniform widths need blocks that are all alike, but the blocks of this model differ",
            hint="prune the original model, or leave out --uniform",
        )
    limits = [largest_ratio(shape, multiple_of, uniform_groups) for shape in shapes]
    if given:
        ratios = [*given, *[0.0] * (len(shapes) - len(given))]
    else:
        ratios = layer_ratios(shapes, ratio, schedule, min_ratio)
    worst = max(range(len(shapes)), key=lambda i: ratios[i] - limits[i])
    if ratios[worst] > limits[worst] and given:
        raise ConfigError(
            f"layer_ratios takes {ratios[worst]:.1%} of block {worst}, which can lose "
            f"{limits[worst]:.1%} at most",
            hint="give that block a smaller ratio: one group and one step of channels stay",
        )
    if ratios[worst] > limits[worst]:
        feasible = _largest_feasible(shapes, limits, schedule, min_ratio)
        raise ConfigError(
            f"ratio={ratio} with schedule={schedule!r} takes {ratios[worst]:.1%} of block {worst}, "
            f"which can lose {limits[worst]:.1%} at most",
            hint="no ratio is feasible with these options: lower --min-ratio"
            if feasible is None
            else f"the largest feasible ratio with these options is {feasible:.3f}; "
            "a higher --min-ratio or --schedule uniform allows more",
        )
    widths, carried = [], 0.0
    for shape, block_ratio in zip(shapes, ratios, strict=True):
        budget = block_ratio * shape.params + carried
        attention_ratio = attention_share * block_ratio
        width = _block_widths(shape, attention_ratio, budget, multiple_of, uniform_groups)
        if uniform_groups is None and not given:
            carried = budget - removed_params(shape, width)
        widths.append(width)
    return widths


def _block_widths(
    shape: BlockShape,
    attention_ratio: float,
    budget: float,
    multiple_of: int,
    group_counts: Collection[int] | None,
) -> BlockWidths:
    """Groups next above the exact number, if the FFN can take the rest, and that rest."""

    def exact_channels(groups: int) -> float:
        from_ffn = budget - (shape.num_groups - groups) * shape.group_params
        return shape.num_channels - from_ffn / shape.channel_params

    def preference(groups: int) -> tuple[float, bool, float]:
        channels = exact_channels(groups)
        beyond = max(least - channels, channels - shape.num_channels) - multiple_of / 2
        return max(beyond, 0.0), groups < exact_groups, abs(groups - exact_groups)

    least = min(multiple_of, shape.num_channels)
    exact_groups = shape.num_groups * (1 - attention_ratio) - 1e-9
    counts = range(1, shape.num_groups + 1) if group_counts is None else group_counts
    groups = min(counts, key=preference)
    channels = exact_channels(groups)
    lower = max(math.floor(channels / multiple_of) * multiple_of, least)
    steps = (min(lower + multiple_of, shape.num_channels), min(lower, shape.num_channels))
    return BlockWidths(groups, min(steps, key=lambda step: abs(step - channels)))


def largest_ratio(
    shape: BlockShape, multiple_of: int, group_counts: Collection[int] | None = None
) -> float:
    """Ratio of a block that keeps the least number of groups and `multiple_of` channels."""
    groups = 1 if group_counts is None else min(group_counts)
    channels = min(multiple_of, shape.num_channels)
    return removed_params(shape, BlockWidths(groups, channels)) / shape.params


def _largest_feasible(
    shapes: Sequence[BlockShape], limits: Sequence[float], schedule: str, min_ratio: float | None
) -> float | None:
    """Largest ratio, in thousandths, that leaves every block within its limit."""

    def feasible(ratio: float) -> bool:
        ratios = layer_ratios(shapes, ratio, schedule, min_ratio)
        return all(r <= limit for r, limit in zip(ratios, limits, strict=True))

    smallest = 0 if schedule == "uniform" else math.ceil((min_ratio or 0.0) * 1000)
    thousandths = (n / 1000 for n in range(999, smallest - 1, -1))
    return next(filter(feasible, thousandths), None)

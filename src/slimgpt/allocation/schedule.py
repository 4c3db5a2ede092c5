"""Turn one pruning ratio into layer ratios and the integer widths of every block.

References
----------
Ling, Wang & Liu 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110,
section 3.4 (Incremental Pruning Ratio).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from slimgpt.allocation.shapes import BlockShape, BlockWidths, SublayerShape, Width, removed_params
from slimgpt.errors import ConfigError


def curve(schedule: str, num_blocks: int) -> list[float]:
    """Position of each block's ratio between the smallest (0) and the largest (1).

    ``log``: ln(1 + i)/ln(n) for block i of n (SlimGPT, section 3.4). ``linear``: i/(n − 1). The
    ``_decrease`` schedules reverse the order of the blocks.
    """
    shape, _, decrease = schedule.partition("_")
    if num_blocks == 1 or shape == "uniform":
        return [1.0] * num_blocks
    if shape == "log":
        rising = [math.log(1 + i) / math.log(num_blocks) for i in range(num_blocks)]
    else:
        rising = [i / (num_blocks - 1) for i in range(num_blocks)]
    return rising[::-1] if decrease else rising


@dataclass(frozen=True)
class Schedule:
    """The target ratio and how it varies over the blocks, see `layer_ratios`."""

    ratio: float
    curve: str = "log"
    min_ratio: float | None = None


def layer_ratios(shapes: Sequence[BlockShape], schedule: Schedule) -> list[float]:
    """Ratio of each block. Their mean, weighted by parameters, is the target ratio.

    Parameters
    ----------
    shapes : sequence of BlockShape
        The blocks, first to last.
    schedule : Schedule
        ``ratio`` is the fraction of all prunable parameters to remove, in [0, 1). ``curve`` is
        ``log``, ``linear``, ``uniform``, ``log_decrease`` or ``linear_decrease``, see `curve`.
        ``min_ratio`` is the smallest ratio r_0, by default ``ratio / 8``; it determines the largest
        ratio r_max.

    Returns
    -------
    list of float
        r_i = r_0 + (r_max − r_0)·curve_i.
    """
    smallest = schedule.ratio / 8 if schedule.min_ratio is None else schedule.min_ratio
    positions = curve(schedule.curve, len(shapes))
    total = sum(shape.params for shape in shapes)
    weighted = sum(shape.params * s for shape, s in zip(shapes, positions, strict=True))
    spread = (schedule.ratio - smallest) * total / weighted
    return [smallest + spread * s for s in positions]


@dataclass(frozen=True)
class WidthRules:
    """Which widths a block may have.

    Attributes
    ----------
    multiple_of : int
        FFN widths are multiples of this, or the original width.
    group_counts : collection of int, optional
        If given, all blocks get the same widths, apart from sublayers that cannot be pruned, with
        a number of key/value groups from this collection. The ratios must be uniform too.
    attention_share : float
        Attention's pruning ratio relative to its block's, from 0 to 1.
    expert_units : {"channels", "experts", "both"}
        What a sublayer with experts loses: channels of each expert, whole experts, or of both the
        same number of parameters.
    """

    multiple_of: int = 8
    group_counts: Collection[int] | None = None
    attention_share: float = 1.0
    expert_units: str = "channels"

    def loses_channels(self, shape: SublayerShape) -> bool:
        """Whether the experts of a sublayer lose channels."""
        return shape.parts > 1 and self.expert_units != "experts"

    def loses_experts(self, shape: SublayerShape) -> bool:
        """Whether a sublayer loses whole experts, because of the option or of its family."""
        return shape.parts == 1 or self.expert_units != "channels"

    def least(self, shape: SublayerShape) -> Width:
        """Smallest width of a sublayer."""
        if shape.kind != "experts" or shape.is_fixed:
            return min(self.counts(shape))
        units = shape.fewest if self.loses_experts(shape) else shape.num_units
        step = min(self.multiple_of, shape.parts)
        return (units, step) if self.loses_channels(shape) else units

    def counts(self, shape: SublayerShape) -> Collection[int]:
        """Numbers of units that a sublayer other than experts may keep."""
        if self.group_counts is not None and shape.kind == "attention":
            return self.group_counts
        least, step = shape.least(self.multiple_of), shape.step(self.multiple_of)
        return [*range(least, shape.num_units, step), shape.num_units]

    def step_params(self, shape: SublayerShape) -> int:
        """Parameters of a sublayer's smallest step."""
        if shape.kind != "experts":
            return shape.step(self.multiple_of) * shape.unit_params
        if self.loses_channels(shape):
            return self.multiple_of * shape.num_units * shape.part_params
        return shape.multiple * shape.unit_params


def scheduled_widths(
    shapes: Sequence[BlockShape], schedule: Schedule, rules: WidthRules
) -> list[BlockWidths]:
    """Integer widths of every block that together meet the target ratio.

    A block's number of removed groups is rounded down, because one group more costs far more (see
    docs/method.md). More groups are removed only if the FFN cannot absorb the difference. At least
    one group stays. The FFN absorbs the difference, with channels rounded to multiples. The
    remaining rounding error is carried to the next block. The whole model therefore misses the
    target by at most half a step of the last block; by more only if a group has more parameters
    than the FFN of its block can absorb.

    Returns
    -------
    list of tuple of int
        Units that each block keeps, first block to last, by sublayer.

    Raises
    ------
    ConfigError
        If a block cannot lose as much; the hint names the largest feasible ratio. Also if uniform
        widths are requested and the blocks have different numbers of units.
    """
    if rules.group_counts is None:
        return _scheduled_widths(shapes, schedule, rules)
    whole = _joined(shapes)
    (width,) = _scheduled_widths([whole], schedule, rules)
    kept = {sub.kind: units for sub, units in zip(whole.sublayers, width, strict=True)}
    return [
        tuple(sub.num_units if sub.is_fixed else kept[sub.kind] for sub in shape.sublayers)
        for shape in shapes
    ]


def _joined(shapes: Sequence[BlockShape]) -> BlockShape:
    """Join blocks to one, whose units are units of all blocks that have the sublayer."""
    prunable = [[sub for sub in shape.sublayers if not sub.is_fixed] for shape in shapes]
    every = [sub for sublayers in prunable for sub in sublayers]
    kinds = sorted({sub.kind for sub in every}, key=("attention", "ffn", "experts").index)
    if len({(sub.kind, sub.num_units, sub.parts) for sub in every}) > len(kinds):
        raise ConfigError(
            "uniform widths need as many units in all blocks, but the blocks of this model differ",
            hint="prune the original model, or leave out --uniform",
        )
    joined = []
    for kind in kinds:
        alike = [sub for sub in every if sub.kind == kind]
        unit, part = sum(sub.unit_params for sub in alike), sum(sub.part_params for sub in alike)
        joined.append(replace(alike[0], unit_params=unit, part_params=part))
    return BlockShape(tuple(joined))


def _scheduled_widths(
    shapes: Sequence[BlockShape], schedule: Schedule, rules: WidthRules
) -> list[BlockWidths]:
    limits = [largest_ratio(shape, rules) for shape in shapes]
    ratios = layer_ratios(shapes, schedule)
    worst = max(range(len(shapes)), key=lambda i: ratios[i] - limits[i])
    if ratios[worst] > limits[worst]:
        feasible = _largest_feasible(shapes, limits, schedule)
        raise ConfigError(
            f"ratio={schedule.ratio} with schedule={schedule.curve!r} takes {ratios[worst]:.1%} of "
            f"block {worst}, which can lose {limits[worst]:.1%} at most",
            hint="no ratio is feasible with these options: lower --min-ratio"
            if feasible is None
            else f"the largest feasible ratio with these options is {feasible:.3f}; "
            "a higher --min-ratio or --schedule uniform allows more",
        )
    widths, carried = [], 0.0
    for shape, ratio in zip(shapes, ratios, strict=True):
        budget = ratio * shape.params + carried
        width = _block_widths(shape, ratio, budget, rules)
        carried = budget - removed_params(shape, width)
        widths.append(width)
    return widths


def given_widths(
    shapes: Sequence[BlockShape], ratios: Sequence[float], rules: WidthRules
) -> list[BlockWidths]:
    """Integer widths for given ratios of the first blocks; the other blocks keep all.

    Raises
    ------
    ConfigError
        If a block cannot lose as much, or there are more ratios than blocks.
    """
    if len(ratios) > len(shapes):
        raise ConfigError(
            f"layer_ratios has {len(ratios)} ratios, but there are {len(shapes)} layers",
            hint=f"give {len(shapes)} ratios at most",
        )
    limits = [largest_ratio(shape, rules) for shape in shapes]
    worst = max(range(len(ratios)), key=lambda i: ratios[i] - limits[i])
    if ratios[worst] > limits[worst]:
        raise ConfigError(
            f"layer_ratios takes {ratios[worst]:.1%} of block {worst}, which can lose "
            f"{limits[worst]:.1%} at most",
            hint="give that block a smaller ratio: one group and one step of channels stay",
        )
    filled = [*ratios, *[0.0] * (len(shapes) - len(ratios))]
    return [
        _block_widths(shape, ratio, ratio * shape.params, rules)
        for shape, ratio in zip(shapes, filled, strict=True)
    ]


def largest_ratio(shape: BlockShape, rules: WidthRules) -> float:
    """Pruning ratio of a block that keeps as few units as possible in each sublayer."""
    least = [rules.least(sub) for sub in shape.sublayers]
    return removed_params(shape, least) / shape.params


def _block_widths(shape: BlockShape, ratio: float, budget: float, rules: WidthRules) -> BlockWidths:
    """Round each sublayer's units up from the exact number; the last sublayer absorbs the rest."""
    *others, last = shape.sublayers
    step = rules.step_params(last) / last.unit_params
    least = last.kept_params(rules.least(last)) / last.unit_params
    widths: list[Width] = []
    for sublayer in others:
        share = rules.attention_share if sublayer.kind == "attention" else 1.0
        exact = sublayer.num_units * (1 - share * ratio) - 1e-9
        counts = rules.counts(sublayer)
        preferences = []
        for count in counts:
            rest = budget - (sublayer.num_units - count) * sublayer.unit_params
            left = last.num_units - rest / last.unit_params
            beyond = max(least - left, left - last.num_units) - step / 2
            preferences.append((max(beyond, 0.0), count < exact, abs(count - exact), count))
        count = min(preferences)[-1]
        budget -= (sublayer.num_units - count) * sublayer.unit_params
        widths.append(count)
    return (*widths, _absorbed(last, budget, rules))


def _absorbed(shape: SublayerShape, budget: float, rules: WidthRules) -> Width:
    """Width of a sublayer that loses about as many parameters."""
    if shape.kind != "experts" or shape.is_fixed:
        left = shape.num_units - budget / shape.unit_params
        step, least = shape.step(rules.multiple_of), shape.least(rules.multiple_of)
        return _nearest(left, step, range(least, shape.num_units + 1))
    loses_channels, num_experts = rules.loses_channels(shape), shape.num_units
    if rules.loses_experts(shape):
        share = budget / 2 if loses_channels else budget
        left = shape.num_units - share / shape.unit_params
        num_experts = _nearest(left, shape.multiple, range(shape.fewest, shape.num_units + 1))
    if not loses_channels:
        return num_experts
    rest = budget - (shape.num_units - num_experts) * shape.unit_params
    left = shape.parts - rest / (num_experts * shape.part_params)
    step = min(rules.multiple_of, shape.parts)
    channels = _nearest(left, step, range(step, shape.parts + 1))
    return num_experts if channels == shape.parts else (num_experts, channels)


def _nearest(exact: float, step: int, allowed: range) -> int:
    """The multiple of a step nearest to a number; the largest allowed one counts as a multiple."""
    lower = max(math.floor(exact / step) * step, allowed[0])
    candidates = (min(lower + step, allowed[-1]), min(lower, allowed[-1]))
    return min(candidates, key=lambda candidate: abs(candidate - exact))


def _largest_feasible(
    shapes: Sequence[BlockShape], limits: Sequence[float], schedule: Schedule
) -> float | None:
    """Largest ratio, in thousandths, that leaves every block within its limit."""

    def feasible(ratio: float) -> bool:
        ratios = layer_ratios(shapes, replace(schedule, ratio=ratio))
        return all(r <= limit for r, limit in zip(ratios, limits, strict=True))

    smallest = 0 if schedule.curve == "uniform" else math.ceil((schedule.min_ratio or 0.0) * 1000)
    thousandths = (n / 1000 for n in range(999, smallest - 1, -1))
    return next(filter(feasible, thousandths), None)

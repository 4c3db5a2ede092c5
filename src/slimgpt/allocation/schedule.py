"""Turn one pruning ratio into layer ratios and the integer widths of every block.

References
----------
Ling et al. 2024, "SlimGPT: Layer-wise Structured Pruning for LLMs", arXiv 2412.18110,
section 3.4 (Incremental Pruning Ratio).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache

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


# Rows of experts fill 16 bytes in bfloat16, which the grouped products of torch need.
EXPERT_STEP = 8


@dataclass(frozen=True)
class WidthRules:
    """Which widths a block may have.

    Attributes
    ----------
    multiple_of : int
        FFN widths are multiples of this, or the original width. If several devices share a layer,
        that holds for each device's part of the channels.
    group_counts : collection of int, optional
        If given, all blocks get the same widths, apart from sublayers that cannot be pruned, with
        a number of key/value groups from this collection. The ratios must be uniform too.
    attention_share : float
        Attention's pruning ratio relative to its block's, from 0 to 1.
    expert_units : {"channels", "experts", "both"}
        What a sublayer with experts loses: channels of each expert, whole experts, or of both the
        same number of parameters.
    tensor_parallel : int
        Number of devices that share each layer, by channels and by key/value groups. Each gets as
        many channels, and as many groups; or, if the block has fewer groups than devices, a group
        may be on several devices, on each with as many of its query heads.
    """

    multiple_of: int = 8
    group_counts: Collection[int] | None = None
    attention_share: float = 1.0
    expert_units: str = "channels"
    tensor_parallel: int = 1

    def step(self, sublayer: SublayerShape) -> int:
        """Step of the sublayer's width: some channels, or 1 for groups, not all of them allowed."""
        return sublayer.step(self.multiple_of * self.tensor_parallel)

    def allows(self, sublayer: SublayerShape, width: Width) -> bool:
        """Whether the sublayer may have this width, of those that `step` allows."""
        if sublayer.is_fixed:
            return width == sublayer.num_units
        units, heads = (width, sublayer.parts) if isinstance(width, int) else width
        if units % self.tensor_parallel == 0:
            return True
        is_replicated = sublayer.kind == "attention" and sublayer.num_units < self.tensor_parallel
        return (
            is_replicated
            and self.tensor_parallel % units == 0
            and units * heads % self.tensor_parallel == 0
        )

    def widths(self, sublayer: SublayerShape) -> tuple[Width, ...]:
        """Widths that the sublayer may have, smallest first.

        Raises
        ------
        ConfigError
            If there is none.
        """
        groups = self.group_counts
        return _widths(replace(self, group_counts=None if groups is None else (*groups,)), sublayer)


@cache
def _widths(rules: WidthRules, sublayer: SublayerShape) -> tuple[Width, ...]:
    if sublayer.kind == "experts" and not sublayer.is_fixed:
        return _widths_of_experts(rules, sublayer)
    step = rules.step(sublayer)
    counts = {*range(step, sublayer.num_units + 1, step), sublayer.num_units}
    if rules.group_counts is not None and sublayer.kind == "attention":
        counts = set(rules.group_counts)
    if found := sorted(count for count in counts if rules.allows(sublayer, count)):
        return tuple(found)
    names = {"attention": "key/value groups", "ffn": "channels"}
    raise ConfigError(
        f"of {sublayer.num_units:,} {names.get(sublayer.kind, 'units')} of {sublayer.kind}, no "
        f"number can be shared by {rules.tensor_parallel} devices in multiples of {step}",
        hint="choose a smaller --tensor-parallel or --multiple-of",
    )


def _widths_of_experts(rules: WidthRules, experts: SublayerShape) -> tuple[Width, ...]:
    """With both units, about as many parameters go with experts as with channels of the others."""
    whole = experts.num_units
    step = math.lcm(rules.multiple_of, EXPERT_STEP) * rules.tensor_parallel
    is_shared = experts.part_params == 0 or experts.parts % rules.tensor_parallel == 0
    if rules.expert_units == "experts" or experts.parts == 1:
        if not is_shared:
            raise ConfigError(
                f"experts of {experts.parts:,} channels cannot be shared by "
                f"{rules.tensor_parallel} devices",
                hint="choose --expert-units channels, or a smaller --tensor-parallel",
            )
        return tuple(range(experts.fewest, whole + 1, experts.multiple))
    widths: list[Width] = []
    for channels in range(step, experts.parts, step):
        lost = (experts.parts - channels) * experts.part_params
        exact = whole * experts.unit_params / (lost + experts.unit_params)
        number = max(round(exact / experts.multiple) * experts.multiple, experts.fewest)
        widths.append((whole if rules.expert_units == "channels" else number, channels))
    if is_shared or not widths:
        widths.append(whole)
    return tuple(widths)


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
        If a block cannot lose as much; the hint names the largest feasible ratio. If the blocks
        must lose more. Also if uniform widths are requested and the blocks have different numbers
        of units.
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
    _check_feasible(shapes, ratios, limits, schedule, rules)
    widths, carried = [], 0.0
    for shape, ratio in zip(shapes, ratios, strict=True):
        budget = ratio * shape.params + carried
        width = _block_widths(shape, ratio, budget, rules)
        carried = budget - removed_params(shape, width)
        widths.append(width)
    return widths


def _check_feasible(
    shapes: Sequence[BlockShape],
    ratios: Sequence[float],
    limits: Sequence[float],
    schedule: Schedule,
    rules: WidthRules,
) -> None:
    """Check that no block loses more than it can, and all together as much as they must."""
    total = sum(shape.params for shape in shapes)
    forced = sum(removed_params(s, widest_widths(s, rules)) for s in shapes) / total
    worst = max(range(len(shapes)), key=lambda i: ratios[i] - limits[i])
    if forced <= schedule.ratio and ratios[worst] <= limits[worst]:
        return
    smallest = math.ceil(1000 * forced) / 1000
    largest = _largest_feasible(shapes, limits, schedule)
    known = largest is not None and largest >= smallest
    none = "no ratio is feasible with these options"
    if schedule.ratio < forced:
        raise ConfigError(
            f"ratio={schedule.ratio} is below {forced:.2%}, which must go for "
            f"tensor_parallel={rules.tensor_parallel}",
            hint=f"the smallest feasible ratio with these options is {smallest:.3f}"
            if known
            else f"{none}: choose another --tensor-parallel",
        )
    raise ConfigError(
        f"ratio={schedule.ratio} with schedule={schedule.curve!r} takes {ratios[worst]:.1%} of "
        f"block {worst}, which can lose {limits[worst]:.1%} at most",
        hint=f"the largest feasible ratio with these options is {largest:.3f}; "
        "a higher --min-ratio or --schedule uniform allows more"
        if known
        else f"{none}: lower --min-ratio",
    )


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
    for index, shape in enumerate(shapes):
        forced = removed_params(shape, widest_widths(shape, rules)) / shape.params
        ratio = ratios[index] if index < len(ratios) else 0.0
        if ratio < forced:
            raise ConfigError(
                f"layer_ratios takes {ratio:.1%} of block {index}, which must lose {forced:.1%} "
                f"for tensor_parallel={rules.tensor_parallel}",
                hint="give that block a larger ratio, or choose another --tensor-parallel",
            )
    filled = [*ratios, *[0.0] * (len(shapes) - len(ratios))]
    return [
        _block_widths(shape, ratio, ratio * shape.params, rules)
        for shape, ratio in zip(shapes, filled, strict=True)
    ]


def largest_ratio(shape: BlockShape, rules: WidthRules) -> float:
    """Pruning ratio of a block that keeps as few units as possible in each sublayer."""
    least = [rules.widths(sublayer)[0] for sublayer in shape.sublayers]
    return removed_params(shape, least) / shape.params


def widest_widths(shape: BlockShape, rules: WidthRules) -> BlockWidths:
    """Widths of a block that loses as little as possible."""
    return tuple(rules.widths(sublayer)[-1] for sublayer in shape.sublayers)


def feasible_ratio(
    shapes: Sequence[BlockShape], schedule: Schedule, rules: WidthRules
) -> float | None:
    """Largest ratio, in thousandths, that a schedule allows, if there is one."""
    if rules.group_counts is not None:
        shapes = [_joined(shapes)]
    return _largest_feasible(shapes, [largest_ratio(s, rules) for s in shapes], schedule)


def _block_widths(shape: BlockShape, ratio: float, budget: float, rules: WidthRules) -> BlockWidths:
    """Round each sublayer's units up from the exact number; the last sublayer absorbs the rest."""
    *others, last = shape.sublayers
    kept = {width: last.kept_params(width) / last.unit_params for width in rules.widths(last)}
    least, second = [*kept.values(), last.num_units][:2]
    step = second - least if last.kind == "experts" else rules.step(last)
    widths: list[Width] = []
    for sublayer in others:
        share = rules.attention_share if sublayer.kind == "attention" else 1.0
        exact = sublayer.num_units * (1 - share * ratio) - 1e-9
        preferences = []
        for count in rules.widths(sublayer):
            assert isinstance(count, int)  # experts come last
            rest = budget - (sublayer.num_units - count) * sublayer.unit_params
            left = last.num_units - rest / last.unit_params
            beyond = max(least - left, left - last.num_units) - step / 2
            preferences.append((max(beyond, 0.0), count < exact, abs(count - exact), count))
        count = min(preferences)[-1]
        budget -= (sublayer.num_units - count) * sublayer.unit_params
        widths.append(count)
    left = last.num_units - budget / last.unit_params
    return (*widths, min(kept, key=lambda width: (abs(kept[width] - left), -kept[width])))


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

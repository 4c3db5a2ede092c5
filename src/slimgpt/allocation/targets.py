"""Widths that meet a target: a number of parameters, of bytes, of key/value heads, or a time."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Self

from slimgpt.allocation.schedule import (
    Schedule,
    WidthRules,
    feasible_ratio,
    scheduled_widths,
    widest_widths,
)
from slimgpt.allocation.shapes import (
    BlockShape,
    BlockWidths,
    SublayerShape,
    Width,
    removed_params,
    whole_widths,
)
from slimgpt.errors import ConfigError

HALVINGS = 40  # of the interval of ratios


@dataclass(frozen=True)
class Price:
    """What a sublayer's parameters cost: `price` for each `params` of them, begun ones included."""

    price: int
    params: int = 1

    def of(self, sublayer: SublayerShape, width: Width) -> int:
        """Cost of a sublayer with this width."""
        return math.ceil(sublayer.kept_params(width) / self.params) * self.price


@dataclass(frozen=True)
class PriceCurve:
    """Cost of a sublayer that was measured at some widths.

    Attributes
    ----------
    points : tuple of tuple of int
        Kept parameters and the cost, from few parameters to many. Costs do not fall. In between
        they are linear; below the first point they stay, and without any parameters they are 0.
    """

    points: tuple[tuple[int, int], ...]

    @classmethod
    def fitted(cls, sublayer: SublayerShape, measured: Sequence[tuple[int, int]]) -> Self:
        """Fit a curve that does not fall to the measured costs.

        It is the isotonic regression with the smallest sum of absolute differences, which ignores
        single outliers: neighbours in the wrong order are replaced by their median.

        Parameters
        ----------
        sublayer : SublayerShape
            Which sublayer was measured.
        measured : sequence of tuple of int
            Widths, each larger than the one before, and the cost at each.
        """
        pools: list[list[int]] = []
        for _, cost in measured:
            pools.append([cost])
            while len(pools) > 1 and median_low(pools[-2]) > median_low(pools[-1]):
                last = pools.pop()
                pools[-1] += last
        kept = (sublayer.kept_params(width) for width, _ in measured)
        costs = (median_low(pool) for pool in pools for _ in pool)
        return cls(tuple(zip(kept, costs, strict=True)))

    def of(self, sublayer: SublayerShape, width: Width) -> int:
        """Cost of a sublayer with this width, rounded up."""
        kept = sublayer.kept_params(width)
        if kept == 0:
            return 0
        after = bisect_left(self.points, (kept,))
        if after == len(self.points):
            return self.points[-1][1]
        (high, most), (low, least) = self.points[after], self.points[max(after - 1, 0)]
        if kept == high or after == 0:
            return most
        return least - (least - most) * (kept - low) // (high - low)


@dataclass(frozen=True)
class Target:
    """A limit on what a model costs: parameters, bytes, entries of the KV cache, or nanoseconds.

    Attributes
    ----------
    option : str
        Name of the option that asks for it.
    asked : float
        Its value.
    limit : int
        Largest cost.
    fixed : int
        What everything but the prunable units costs.
    prices : tuple of tuple of Price or PriceCurve
        Of each sublayer, by block.
    whole : int
        Cost of which `asked` is a fraction, or 0 if it is a cost.
    unit : str
        Name of what is counted.
    only_attention : bool
        Whether all other sublayers keep all their units.
    """

    option: str
    asked: float
    limit: int
    fixed: int
    prices: tuple[tuple[Price | PriceCurve, ...], ...]
    whole: int = 0
    unit: str = "parameters"
    only_attention: bool = False

    def cost(self, shapes: Sequence[BlockShape], widths: Sequence[BlockWidths]) -> int:
        """Cost of a model whose blocks keep these widths."""
        return self.fixed + sum(
            price.of(sublayer, width)
            for shape, block, prices in zip(shapes, widths, self.prices, strict=True)
            for sublayer, width, price in zip(shape.sublayers, block, prices, strict=True)
        )

    def value(self, cost: int) -> float:
        """Value of the option that a cost stands for."""
        return cost / self.whole if self.whole else cost

    def shown(self, cost: int) -> str:
        """Format a cost as a value of the option that is not below it."""
        if self.whole:
            return f"{math.ceil(10**4 * cost / self.whole) / 10**4:g}x {self.unit}"
        return f"{cost:,} {self.unit}"

    def prunable(self, shapes: Sequence[BlockShape]) -> list[BlockShape]:
        """Blocks whose units are fixed where the target does not concern them."""
        if not self.only_attention:
            return list(shapes)
        return [
            BlockShape(
                tuple(
                    replace(sub, is_fixed=sub.is_fixed or sub.kind != "attention")
                    for sub in shape.sublayers
                )
            )
            for shape in shapes
        ]


def target_widths(
    shapes: Sequence[BlockShape], target: Target, schedule: Schedule, rules: WidthRules
) -> list[BlockWidths]:
    """Scheduled widths with the smallest ratio that meets a target.

    Then units are put back while they fit, so that what is left of the limit is less than a step of
    any sublayer that lost units; with uniform widths, than a step of all blocks.

    Parameters
    ----------
    shapes : sequence of BlockShape
        The blocks.
    target : Target
        The limit, and what units cost.
    schedule : Schedule
        How ratios vary with depth. Its ratio is ignored.
    rules : WidthRules
        Which widths a block may have.

    Raises
    ------
    ConfigError
        If the target is above the cost of the dense model, or below what can be reached. The
        message says what can.
    """
    shapes = target.prunable(shapes)
    if (whole := target.cost(shapes, list(map(whole_widths, shapes)))) < target.limit:
        raise ConfigError(
            f"{target.option}={target.asked:,} leaves nothing to remove: the model has "
            f"{target.shown(whole)}",
            hint="ask for less",
        )
    low, high = _ratios(shapes, schedule, rules)
    widths = _scheduled(shapes, schedule, rules, high)
    if (least := target.cost(shapes, widths)) > target.limit:
        raise ConfigError(
            f"{target.option}={target.asked:,} cannot be reached: the least with these options "
            f"is {target.shown(least)}",
            hint=f"ask for {target.shown(least)} or more; --schedule uniform, a smaller "
            "--multiple-of or --tensor-parallel, or another --attention-share can reach less",
        )
    if schedule.min_ratio:
        most = target.cost(shapes, _scheduled(shapes, schedule, rules, low))
        if most < target.limit:
            raise ConfigError(
                f"min_ratio={schedule.min_ratio} leaves {target.shown(most)}, fewer than "
                f"{target.option}={target.asked:,} asks for",
                hint="lower --min-ratio",
            )
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        found = _scheduled(shapes, schedule, rules, ratio)
        if target.cost(shapes, found) <= target.limit:
            high, widths = ratio, found
        else:
            low = ratio
    return _filled(shapes, target, rules, widths)


def _ratios(
    shapes: Sequence[BlockShape], schedule: Schedule, rules: WidthRules
) -> tuple[float, float]:
    """The smallest and the largest ratio that the options allow."""
    shapes = [shape for shape in shapes if shape.params]
    params = sum(shape.params for shape in shapes)
    forced = sum(removed_params(shape, widest_widths(shape, rules)) for shape in shapes)
    lowest = max(forced / params * (1 + 1e-12), schedule.min_ratio or 0.0) if shapes else 0.0
    highest = feasible_ratio(shapes, schedule, rules) if shapes else None
    return lowest, max(highest or 0.0, lowest)


def _scheduled(
    shapes: Sequence[BlockShape], schedule: Schedule, rules: WidthRules, ratio: float
) -> list[BlockWidths]:
    """Scheduled widths of the blocks that have something to prune; the others stay as they are."""
    pruned = [shape for shape in shapes if shape.params]
    found = iter(scheduled_widths(pruned, replace(schedule, ratio=ratio), rules) if pruned else ())
    return [next(found) if shape.params else whole_widths(shape) for shape in shapes]


def _filled(
    shapes: Sequence[BlockShape],
    target: Target,
    rules: WidthRules,
    widths: Sequence[BlockWidths],
) -> list[BlockWidths]:
    """Put units back while they fit: channels first, in large steps, where the most are gone."""
    kept = list(widths)
    left = target.limit - target.cost(shapes, widths)
    alone = [range(block, block + 1) for block in range(len(shapes))]
    together = [range(len(shapes))] if rules.group_counts is not None else alone
    while True:
        fitting = [
            step
            for blocks in together
            for step in _wider(shapes, target, rules, kept, blocks)
            if step.cost <= left
        ]
        if not fitting:
            return kept
        step = min(fitting, key=lambda step: (not step.is_ffn, -step.cost, step.share))
        left -= step.cost
        for block in step.blocks:
            kept[block] = (*kept[block][: step.index], step.width, *kept[block][step.index + 1 :])


@dataclass(frozen=True)
class _Step:
    """The next larger width of a sublayer in some blocks that are all alike."""

    blocks: Sequence[int]
    index: int
    width: Width
    share: float
    cost: int
    is_ffn: bool


def _wider(
    shapes: Sequence[BlockShape],
    target: Target,
    rules: WidthRules,
    kept: Sequence[BlockWidths],
    blocks: Sequence[int],
) -> Iterator[_Step]:
    """Steps of all sublayers of these blocks that do not keep all they can."""
    first = blocks[0]
    for index, (sublayer, before) in enumerate(
        zip(shapes[first].sublayers, kept[first], strict=True)
    ):
        wider = rules.widths(sublayer)
        if (position := wider.index(before) + 1) < len(wider):
            prices = (target.prices[block][index] for block in blocks)
            cost = sum(p.of(sublayer, wider[position]) - p.of(sublayer, before) for p in prices)
            share = sublayer.kept_params(before) / sublayer.params
            yield _Step(blocks, index, wider[position], share, cost, sublayer.kind != "attention")

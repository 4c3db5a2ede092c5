"""Reallocate units among sublayers by the results of the sensitivity pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimgpt.allocation.schedule import WidthRules, widest_widths
from slimgpt.allocation.shapes import (
    BlockShape,
    BlockWidths,
    Width,
    removed_params,
    whole_widths,
)
from slimgpt.allocation.targets import Target

# Widths of a sublayer, each smaller than the one before, with the error at each.
Curve = Sequence[tuple[Width, float]]

# The sensitivity pass prunes with every fourth sample. The gradient pass uses at most 16 held-out
# samples, cut to 512 tokens.
SENSITIVITY_SHARE = 4
MAX_PROBES, PROBE_TOKENS = 16, 512


def samples_needed(shapes: Sequence[BlockShape], seqlen: int) -> int:
    """Fewest calibration samples that give the sensitivity pass one token per channel.

    With fewer tokens, any subset of an FFN's channels fits them and all its errors are near 0.
    """
    most_units = max(sublayer.num_units for shape in shapes for sublayer in shape.sublayers)
    return SENSITIVITY_SHARE * (math.ceil(most_units / seqlen) - 1) + 1


def probe_samples(num_samples: int) -> list[int]:
    """Indices of held-out samples for the gradient pass.

    They are disjoint from the samples of the sensitivity pass, unless there is only one sample.
    """
    step = 2 * SENSITIVITY_SHARE * math.ceil(num_samples / (2 * SENSITIVITY_SHARE * MAX_PROBES))
    return list(range(1 % num_samples, num_samples, step))


def measured_removals(num_units: int, num_keep: int, step: int = 1) -> range:
    """Numbers of removed units at which the sensitivity pass records a sublayer's error.

    Each leaves a multiple of `step` units. The largest is at most twice the number that the pass
    removes, because the first-order estimate need not hold further away.
    """
    most = min(2 * (num_units - num_keep), num_units - step)
    return range(num_units % step or step, most + 1, step)


def move_units(
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    curves: Sequence[Sequence[Curve]],
    prices: Sequence[Sequence[float]],
    *,
    rules: WidthRules | None = None,
    target: Target | None = None,
) -> list[BlockWidths]:
    """Reallocate the removed parameters to the sublayers where removal costs least.

    Units are removed in steps, always from the sublayer with the lowest cost per parameter. The
    cost of a step is never below that of the sublayer's previous steps. This minimises
    Σ price · error if the errors are convex. As many parameters are removed as the initial widths
    remove, rounded to the nearest step. With a target, as much is removed as it takes, rounded up:
    then more FFN steps follow if needed, and the steps that cost most are undone if they fit.

    Parameters
    ----------
    shapes, widths : sequence of BlockShape, sequence of BlockWidths
        The blocks and their initial widths.
    curves : sequence of sequences of Curve
        By block and sublayer, the measured widths, each smaller than the one before, and the error
        at each.
    prices : sequence of sequences of float
        By block and sublayer, the cost of an error of 1.
    rules : WidthRules, optional
        Which widths a block may have, as many as the curves have. Where it may not keep all its
        units, the first step is always taken.
    target : Target, optional
        The limit that the result meets.
    """
    steps = _steps(shapes, curves, prices, rules, target)
    if target is None:
        budget = sum(removed_params(s, w) for s, w in zip(shapes, widths, strict=True))
    else:
        budget = target.cost(shapes, [whole_widths(shape) for shape in shapes]) - target.limit
    taken, rest = [], []
    closed = set()  # a sublayer takes no step after one that it could not take
    for step in steps:
        if step.is_forced or (step.freed <= 2 * budget and step.place not in closed):
            budget -= step.freed
            taken.append(step)
        else:
            closed.add(step.place)
            rest.append(step)
    if target is not None:
        taken = _rounded_up(taken, rest, budget)
    kept = [list(whole_widths(shape)) for shape in shapes]
    for step in taken:
        block, index = step.place
        kept[block][index] = step.width
    return [tuple(width) for width in kept]


@dataclass(frozen=True)
class _Step:
    """A removal from a sublayer, given by block and index.

    `freed` counts parameters, or what a target counts. A forced step is always taken.
    """

    place: tuple[int, int]
    width: Width
    freed: int
    is_ffn: bool
    is_forced: bool


def _steps(
    shapes: Sequence[BlockShape],
    curves: Sequence[Sequence[Curve]],
    prices: Sequence[Sequence[float]],
    rules: WidthRules | None,
    target: Target | None,
) -> list[_Step]:
    """All steps of all sublayers: the forced ones, then those of least cost per parameter."""
    steps = []
    for block, shape in enumerate(shapes):
        widest = widest_widths(shape, rules) if rules else whole_widths(shape)
        for index, (sublayer, curve) in enumerate(zip(shape.sublayers, curves[block], strict=True)):
            price, highest, error_before = prices[block][index], 0.0, 0.0
            before: Width = sublayer.num_units
            for position, (width, error) in enumerate(curve):
                freed = sublayer.kept_params(before) - sublayer.kept_params(width)
                highest = max(highest, price * (error - error_before) / freed)
                if target is not None:
                    of = target.prices[block][index].of
                    freed = of(sublayer, before) - of(sublayer, width)
                is_forced = position == 0 and widest[index] != sublayer.num_units
                step = _Step((block, index), width, freed, sublayer.kind == "ffn", is_forced)
                steps.append(((not is_forced, highest, block, index, position), step))
                before, error_before = width, error
    return [step for _, step in sorted(steps, key=lambda pair: pair[0])]


def _rounded_up(taken: Sequence[_Step], rest: Sequence[_Step], budget: int) -> list[_Step]:
    """Take steps, those of an FFN first, until the budget is used; undo what is not needed."""
    result = list(taken)
    for step in sorted(rest, key=lambda step: not step.is_ffn):
        if budget <= 0:
            break
        budget -= step.freed
        result.append(step)
    stuck, undone = set(), set()
    for step in reversed(result):
        if step.is_forced or step.freed > -budget or step.place in stuck:
            stuck.add(step.place)
        else:
            budget += step.freed
            undone.add(step)
    return [step for step in result if step not in undone]


def nested_widths(
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    limits: Sequence[BlockWidths],
    rules: WidthRules,
) -> list[BlockWidths]:
    """Reduce widths to those of a larger model; put channels back where most are gone.

    Parameters
    ----------
    shapes, widths : sequence of BlockShape, sequence of BlockWidths
        The blocks, and widths without query heads.
    limits : sequence of BlockWidths
        Widths of the larger model.
    rules : WidthRules
        Which widths a block may have.

    Returns
    -------
    list of BlockWidths
        None is above its limit. They remove as many parameters as `widths`, to the nearest step, or
        more if nothing can be put back.
    """
    kept = [list(map(min, *pair)) for pair in zip(widths, limits, strict=True)]
    excess = sum(
        removed_params(shape, now) - removed_params(shape, block)
        for shape, now, block in zip(shapes, kept, widths, strict=True)
    )
    while rules.group_counts is None:  # else all blocks have the same widths
        steps = []
        for block, shape in enumerate(shapes):
            for index, sublayer in enumerate(shape.sublayers):
                now, limit = kept[block][index], limits[block][index]
                assert isinstance(now, int)
                assert isinstance(limit, int)
                allowed = (w for w in rules.widths(sublayer) if isinstance(w, int))
                wider = next((w for w in allowed if now < w <= limit), None)
                if sublayer.kind != "ffn" or wider is None:
                    continue
                freed = sublayer.kept_params(wider) - sublayer.kept_params(now)
                if freed <= 2 * excess:
                    steps.append(
                        (sublayer.kept_params(now) / sublayer.params, block, index, wider, freed)
                    )
        if not steps:
            break
        _, block, index, kept[block][index], freed = min(steps)
        excess -= freed
    return [tuple(block) for block in kept]

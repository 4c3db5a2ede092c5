"""Reallocate units among sublayers by the results of the sensitivity pass."""

import math
from collections.abc import Sequence

from slimgpt.allocation.shapes import BlockShape, BlockWidths, Width, removed_params

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
) -> list[BlockWidths]:
    """Reallocate the removed parameters to the sublayers where removal costs least.

    Units are removed in steps, always from the sublayer with the lowest cost per parameter. The
    cost of a step is never below that of the sublayer's previous steps. This minimises
    Σ price · error if the errors are convex.

    Parameters
    ----------
    shapes, widths : sequence of BlockShape, sequence of BlockWidths
        The blocks and their initial widths.
    curves : sequence of sequences of Curve
        By block and sublayer, the measured widths, each smaller than the one before, and the error
        at each.
    prices : sequence of sequences of float
        By block and sublayer, the cost of an error of 1.
    """
    budget, steps = 0, []
    kept: list[list[Width]] = [[s.num_units for s in shape.sublayers] for shape in shapes]
    for block, (shape, width) in enumerate(zip(shapes, widths, strict=True)):
        budget += removed_params(shape, width)
        for index, (sublayer, curve) in enumerate(zip(shape.sublayers, curves[block], strict=True)):
            price, highest, error_before = prices[block][index], 0.0, 0.0
            before = sublayer.num_units * sublayer.unit_params
            for position, (smaller, error) in enumerate(curve):
                left = sublayer.kept_params(smaller)
                highest = max(highest, price * (error - error_before) / (before - left))
                steps.append((highest, block, index, position, smaller, before - left))
                before, error_before = left, error
    closed = set()  # a sublayer takes no step after one that it could not take
    for _, block, index, _, smaller, freed in sorted(steps, key=lambda step: step[:4]):
        if freed <= 2 * budget and (block, index) not in closed:
            budget -= freed
            kept[block][index] = smaller
        else:
            closed.add((block, index))
    return [tuple(width) for width in kept]

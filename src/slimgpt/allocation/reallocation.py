"""Reallocate units among sublayers by the results of the sensitivity pass."""

import math
from collections.abc import Sequence

from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params

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
    errors: Sequence[Sequence[Sequence[float]]],
    prices: Sequence[Sequence[float]],
    multiple_of: int,
) -> list[BlockWidths]:
    """Reallocate the removed parameters to the sublayers where removal costs least.

    Units are removed in steps, always from the sublayer with the lowest cost per parameter. The
    cost of a step is never below that of the sublayer's previous steps. This minimises
    Σ price · error if the errors are convex.

    Parameters
    ----------
    shapes, widths : sequence of BlockShape, sequence of BlockWidths
        The blocks and their initial widths.
    errors : sequence of sequences of sequences of float
        By block and sublayer, the error after each of `measured_removals`.
    prices : sequence of sequences of float
        By block and sublayer, the cost of an error of 1.
    multiple_of : int
        Step of channels, see `slimgpt.allocation.schedule.WidthRules`.
    """
    budget, steps = 0, []
    kept = [[sublayer.num_units for sublayer in shape.sublayers] for shape in shapes]
    for block, (shape, width) in enumerate(zip(shapes, widths, strict=True)):
        budget += removed_params(shape, width)
        for index, (sublayer, num_keep) in enumerate(zip(shape.sublayers, width, strict=True)):
            highest, before, error_before = 0.0, 0, 0.0
            removals = measured_removals(sublayer.num_units, num_keep, sublayer.step(multiple_of))
            for removed, error in zip(removals, errors[block][index], strict=True):
                freed = (removed - before) * sublayer.unit_params
                price = prices[block][index]
                highest = max(highest, price * (error - error_before) / freed)
                steps.append((highest, block, index, -(sublayer.num_units - removed), freed))
                before, error_before = removed, error
    for _, block, index, less, freed in sorted(steps):
        if freed <= 2 * budget:
            budget -= freed
            kept[block][index] = -less
    return [tuple(width) for width in kept]

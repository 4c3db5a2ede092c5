"""Move units between sublayers, to where they matter most."""

import math
from collections.abc import Sequence

from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params

SENSITIVITY_SHARE = 4  # the pass has one sample in so many; half as many others are probes
MAX_PROBES, PROBE_TOKENS = 16, 512  # number of these others at most, and tokens of each


def samples_needed(shapes: Sequence[BlockShape], seqlen: int) -> int:
    """Least number of calibration samples that give the sensitivity pass a token for each channel.

    With fewer tokens, what stays of an FFN fits them whatever goes: its errors are near 0.
    """
    most_units = max(sublayer.num_units for shape in shapes for sublayer in shape.sublayers)
    return SENSITIVITY_SHARE * (math.ceil(most_units / seqlen) - 1) + 1


def probe_samples(num_samples: int) -> list[int]:
    """Indices of held-out samples for the gradients.

    They are not among those of the sensitivity pass, if there are others.
    """
    step = 2 * SENSITIVITY_SHARE * math.ceil(num_samples / (2 * SENSITIVITY_SHARE * MAX_PROBES))
    return list(range(1 % num_samples, num_samples, step))


def measured_removals(num_units: int, num_keep: int, step: int = 1) -> range:
    """Numbers of removed units of a sublayer at which the sensitivity pass measures its error.

    They leave multiples of `step`. They go up to twice as many as the pass itself removes: further
    away, what it has measured need not hold.
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
    """Remove as many parameters in all, but from where they are cheapest.

    Units go step by step, always from the sublayer where a parameter costs least; in a sublayer a
    step is never cheaper than the one before. This minimises Σ price · error where the errors are
    convex.

    Parameters
    ----------
    shapes, widths : sequence of BlockShape, sequence of BlockWidths
        The blocks, and the widths to begin with.
    errors : sequence of sequences of sequences of float
        By block and sublayer, the error after each of `measured_removals`.
    prices : sequence of sequences of float
        By block and sublayer, what an error of 1 costs.
    multiple_of : int
        Of channels, see `slimgpt.allocation.schedule.WidthRules`.
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

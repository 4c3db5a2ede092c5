"""Move units between sublayers, to where they matter most."""

import math
from collections.abc import Sequence

from slimgpt.allocation.shapes import BlockShape, BlockWidths, removed_params


def surveyed_removals(num_units: int, num_keep: int, multiple_of: int = 1) -> range:
    """Numbers of removed units of a sublayer whose errors a survey measures.

    They leave multiples of `multiple_of`, and go up to twice as many as are removed in the survey
    itself: further away, what it has measured need not hold.
    """
    most = min(2 * (num_units - num_keep), num_units - multiple_of)
    return range(num_units % multiple_of or multiple_of, most + 1, multiple_of)


def move_units(
    shapes: Sequence[BlockShape],
    widths: Sequence[BlockWidths],
    errors: Sequence[Sequence[float]],
    prices: Sequence[float],
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
    errors : sequence of sequences of float
        For attention and FFN of each block in turn the error after each of `surveyed_removals`.
    prices : sequence of float
        For each of these sublayers what an error of 1 costs.
    multiple_of : int
        Of channels, see `plan_widths`.
    """
    budget, kept, steps = 0, [], []
    for shape, width in zip(shapes, widths, strict=True):
        budget += removed_params(shape, width)
        for num_units, num_keep, params, multiple in (
            (shape.num_groups, width.num_groups, shape.group_params, 1),
            (shape.num_channels, width.num_channels, shape.channel_params, multiple_of),
        ):
            highest, before, error_before, index = 0.0, 0, 0.0, len(kept)
            removals = surveyed_removals(num_units, num_keep, multiple)
            for removed, error in zip(removals, errors[index], strict=True):
                freed = (removed - before) * params
                highest = max(highest, prices[index] * (error - error_before) / freed)
                steps.append((highest, index, num_units - removed, freed))
                before, error_before = removed, error
            kept.append(num_units)
    for _, index, num_keep, freed in sorted(steps, key=lambda step: (step[0], step[1], -step[2])):
        if freed <= 2 * budget:
            budget -= freed
            kept[index] = num_keep
    return [BlockWidths(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]


SURVEY_SHARE = 4  # one sample in so many; half as many others show what errors cost

MAX_PROBES, PROBE_TOKENS = 16, 512  # of these others at most, and tokens of each


def samples_needed(shapes: Sequence[BlockShape], seqlen: int) -> int:
    """Least number of calibration samples of which a survey gets as many tokens as channels.

    With fewer tokens, what stays of an FFN fits them whatever goes: its errors are near 0.
    """
    num_channels = max(shape.num_channels for shape in shapes)
    return SURVEY_SHARE * (math.ceil(num_channels / seqlen) - 1) + 1


def probe_samples(num_samples: int) -> list[int]:
    """Some samples, other than those of the survey if there are others."""
    step = 2 * SURVEY_SHARE * math.ceil(num_samples / (2 * SURVEY_SHARE * MAX_PROBES))
    return list(range(1 % num_samples, num_samples, step))

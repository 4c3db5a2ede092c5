"""Layer ratios and integer widths against closed forms and exhaustive search."""

import itertools
import math
import re
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slimgpt.allocation import reallocation
from slimgpt.allocation import schedule as module
from slimgpt.allocation.reallocation import measured_removals, nested_widths
from slimgpt.allocation.schedule import Schedule, WidthRules, curve
from slimgpt.allocation.shapes import BlockShape, SublayerShape, removed_params
from slimgpt.errors import ConfigError


class Shape(BlockShape):
    """A block of attention and an FFN."""

    def __init__(self, num_groups: int, group_params: int, num_channels: int, channel_params: int):
        attention = SublayerShape("attention", num_groups, group_params)
        super().__init__((attention, SublayerShape("ffn", num_channels, channel_params)))

    num_groups = property(lambda self: self.sublayers[0].num_units)
    group_params = property(lambda self: self.sublayers[0].unit_params)
    num_channels = property(lambda self: self.sublayers[1].num_units)
    channel_params = property(lambda self: self.sublayers[1].unit_params)


class Widths(NamedTuple):
    num_groups: int
    num_channels: int


def layer_ratios(
    shapes: list[Shape], ratio: float, curve: str, min_ratio: float | None = None
) -> list[float]:
    return module.layer_ratios(shapes, Schedule(ratio, curve, min_ratio))


def largest_ratio(shape: Shape, multiple_of: int) -> float:
    return module.largest_ratio(shape, WidthRules(multiple_of))


def plan_widths(
    shapes: list[Shape],
    ratio: float,
    curve: str = "log",
    min_ratio: float | None = None,
    multiple_of: int = 8,
    **rules: Any,
) -> list[Widths]:
    found = module.scheduled_widths(
        shapes, Schedule(ratio, curve, min_ratio), WidthRules(multiple_of, **rules)
    )
    return [Widths(*width) for width in found]


def given_widths(shapes: list[Shape], ratios: tuple[float, ...], **rules: Any) -> list[Widths]:
    found = module.given_widths(shapes, ratios, WidthRules(**rules))
    return [Widths(*width) for width in found]


def move_units(
    shapes: list[Shape],
    widths: list[Widths],
    errors: list[list[float]],
    prices: list[float],
    multiple_of: int,
) -> list[Widths]:
    curves = []
    for index, measured in enumerate(errors):
        block, kind = divmod(index, 2)
        total, keep = shapes[block].sublayers[kind].num_units, widths[block][kind]
        removals = measured_removals(total, keep, multiple_of if kind else 1)
        curves.append([(total - n, error) for n, error in zip(removals, measured, strict=True)])
    pairs = ([values[i : i + 2] for i in range(0, len(errors), 2)] for values in (curves, prices))
    moved = reallocation.move_units(shapes, widths, *pairs)
    return [Widths(*width) for width in moved]


fixed = settings(derandomize=True, deadline=None, database=None, max_examples=100)
SCHEDULES = ["log", "linear", "uniform", "log_decrease", "linear_decrease"]
SMOLLM2 = [Shape(3, 294912, 1536, 1728)] * 30
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@st.composite
def block_shapes(draw: st.DrawFn, multiple_of: int = 8, aligned: bool = True) -> Shape:
    """A block whose FFN has at least twice the parameters of its attention."""
    num_groups = draw(st.integers(1, 8))
    channel_params = draw(st.integers(1, 5000))
    num_channels = multiple_of * draw(st.integers(16, 200))
    if not aligned:
        num_channels += draw(st.integers(1, multiple_of - 1))
    most = num_channels * channel_params // (2 * num_groups)
    return Shape(num_groups, draw(st.integers(1, most)), num_channels, channel_params)


models = st.lists(block_shapes(), min_size=1, max_size=12)


def total_params(shapes: list[Shape]) -> int:
    return sum(shape.params for shape in shapes)


def total_removed(shapes: list[Shape], widths: list[Widths]) -> int:
    return sum(removed_params(s, w) for s, w in zip(shapes, widths, strict=True))


def named_ratio(error: ConfigError) -> float:
    return float(re.search(r"feasible ratio.* is (\d\.\d+)", error.hint)[1])


# Curves and ratios


@pytest.mark.parametrize("num_blocks", [2, 3, 30, 32, 80])
def test_curves(num_blocks):
    log = [math.log(i + 1, num_blocks) for i in range(num_blocks)]
    linear = [i / (num_blocks - 1) for i in range(num_blocks)]
    assert curve("log", num_blocks) == pytest.approx(log)
    assert curve("linear", num_blocks) == pytest.approx(linear)
    assert curve("uniform", num_blocks) == [1.0] * num_blocks
    assert curve("log_decrease", num_blocks) == pytest.approx(log[::-1])
    assert curve("linear_decrease", num_blocks) == pytest.approx(linear[::-1])


def test_log_curve_of_four_blocks():
    assert curve("log", 4) == pytest.approx([0, 0.5, math.log(3) / math.log(4), 1])


@each_schedule
def test_curve_of_one_block(schedule):
    assert curve(schedule, 1) == [1.0]


@pytest.mark.parametrize("schedule", ["log", "linear"])
@fixed
@given(shapes=st.lists(block_shapes(), min_size=2, max_size=12), ratio=st.floats(0.01, 0.9))
def test_ratios_rise_from_the_smallest_to_the_largest(schedule, shapes, ratio):
    for given_ratio, smallest in ((None, ratio / 8), (ratio / 3, ratio / 3)):
        ratios = layer_ratios(shapes, ratio, schedule, given_ratio)
        assert ratios[0] == pytest.approx(smallest)
        assert ratios == sorted(ratios)
        assert ratios[-1] == max(ratios) > ratio


def test_largest_ratio_of_equal_blocks():
    n, ratio, smallest = 30, 0.5, 0.1
    log_mean = math.lgamma(n + 1) / (n * math.log(n))
    for schedule, mean in (("log", log_mean), ("linear", 0.5)):
        ratios = layer_ratios(SMOLLM2, ratio, schedule, smallest)
        assert ratios[0] == pytest.approx(smallest)
        assert ratios[-1] == pytest.approx(smallest + (ratio - smallest) / mean)


@each_schedule
@fixed
@given(shapes=models, ratio=st.floats(0, 0.99), fraction=st.none() | st.floats(0, 1))
def test_weighted_mean_is_the_target(schedule, shapes, ratio, fraction):
    smallest = None if fraction is None else fraction * ratio
    ratios = layer_ratios(shapes, ratio, schedule, smallest)
    removed = sum(r * s.params for r, s in zip(ratios, shapes, strict=True))
    assert removed / total_params(shapes) == pytest.approx(ratio, abs=1e-12)


@fixed
@given(shapes=models, ratio=st.floats(0, 0.99))
def test_uniform_ratios(shapes, ratio):
    assert layer_ratios(shapes, ratio, "uniform", 0) == pytest.approx([ratio] * len(shapes))


@pytest.mark.parametrize("schedule", ["log", "linear"])
@fixed
@given(shapes=models, ratio=st.floats(0, 0.99))
def test_decreasing_ratios_are_the_mirror_image(schedule, shapes, ratio):
    mirrored = layer_ratios(shapes[::-1], ratio, f"{schedule}_decrease")
    assert mirrored[::-1] == pytest.approx(layer_ratios(shapes, ratio, schedule))


# Widths


@each_schedule
@fixed
@given(shapes=models, ratio=st.floats(0, 0.7), fraction=st.floats(0, 1))
def test_widths_meet_the_target(schedule, shapes, ratio, fraction):
    try:
        widths = plan_widths(shapes, ratio, schedule, fraction * ratio)
    except ConfigError:
        assume(False)
    for shape, width in zip(shapes, widths, strict=True):
        assert 1 <= width.num_groups <= shape.num_groups
        assert 8 <= width.num_channels <= shape.num_channels
        assert width.num_channels % 8 == 0
    last, last_width = shapes[-1], widths[-1]
    if 8 < last_width.num_channels < last.num_channels:
        miss = total_removed(shapes, widths) - ratio * total_params(shapes)
        assert abs(miss) <= 4 * last.channel_params * (1 + 1e-6)


@pytest.mark.parametrize("multiple_of", [1, 8, 64])
@each_schedule
@pytest.mark.parametrize("ratio", [0.2, 0.33, 0.5])
def test_widths_of_unequal_blocks_meet_the_target(ratio, schedule, multiple_of):
    shapes = [Shape(4, 90_000, 1024 + 128 * (i % 5), 900 + 30 * i) for i in range(16)]
    widths = plan_widths(shapes, ratio, schedule, ratio / 2, multiple_of)
    miss = total_removed(shapes, widths) - ratio * total_params(shapes)
    assert abs(miss) <= multiple_of / 2 * shapes[-1].channel_params * (1 + 1e-6)
    assert all(w.num_channels % multiple_of == 0 for w in widths)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@fixed
@given(
    data=st.data(),
    ratio=st.floats(0, 0.85) | st.floats(0, 0.01),
    multiple_of=st.sampled_from([2, 8, 32]),
)
def test_one_block_takes_the_nearest_width(aligned, data, ratio, multiple_of):
    shape = data.draw(block_shapes(multiple_of, aligned))
    assume(ratio <= largest_ratio(shape, multiple_of))
    (width,) = plan_widths([shape], ratio, multiple_of=multiple_of)
    kept_groups = shape.num_groups * (1 - ratio)
    assert kept_groups - 1e-9 <= width.num_groups < max(kept_groups, 1) + 1

    def miss(num_channels: int) -> float:
        removed = removed_params(shape, Widths(width.num_groups, num_channels))
        return abs(removed - ratio * shape.params)

    allowed = {*range(multiple_of, shape.num_channels + 1, multiple_of), shape.num_channels}
    assert width.num_channels in allowed
    assert miss(width.num_channels) <= min(map(miss, allowed)) + 1e-6 * shape.channel_params


@fixed
@given(
    shape=block_shapes(),
    num_blocks=st.integers(1, 6),
    ratio=st.floats(0, 0.6),
    share=st.floats(0, 1),
)
def test_ffn_makes_up_for_attention(shape, num_blocks, ratio, share):
    widths = plan_widths([shape] * num_blocks, ratio, "uniform", attention_share=share)
    exact = shape.num_groups * (1 - share * ratio)
    if ratio * shape.params <= removed_params(shape, Widths(shape.num_groups, 16)):
        assert all(exact - 1e-9 <= w.num_groups < max(exact, 1) + 1 for w in widths)
    miss = total_removed([shape] * num_blocks, widths) - ratio * num_blocks * shape.params
    if 8 < widths[-1].num_channels < shape.num_channels:
        assert abs(miss) <= 4 * shape.channel_params * (1 + 1e-6)


def test_attention_stays_whole_as_far_as_the_ffn_reaches():
    kept = {
        ratio: {w.num_groups for w in plan_widths(SMOLLM2, ratio, "uniform", attention_share=0)}
        for ratio in (0.33, 0.7, 0.8, 0.9)
    }
    # The FFN has 3/4 of the parameters of a block, a group a twelfth.
    assert kept == {0.33: {3}, 0.7: {3}, 0.8: {2}, 0.9: {1}}


@pytest.mark.parametrize(("removed", "kept"), [(0, 1003), (1, 1003), (2, 1000), (6, 1000)])
def test_the_original_width_counts_as_a_step(removed, kept):
    shape = Shape(1, 1000, 1003, 10)
    (width,) = plan_widths([shape], 10 * removed / shape.params)
    assert width == Widths(1, kept)


@each_schedule
def test_one_block_model(schedule):
    shape = Shape(4, 1000, 512, 100)
    (width,) = plan_widths([shape], 0.5, schedule)
    # 0.5 · 55 200 = 27 600 parameters: 2 groups, 25 600/100 = 256 channels.
    assert width == Widths(2, 256)


def test_width_below_the_multiple_is_kept():
    shape = Shape(8, 1000, 5, 1)
    (width,) = plan_widths([shape], 0.5, multiple_of=8)
    assert width == Widths(4, 5)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@each_schedule
@fixed
@given(data=st.data())
def test_ratio_zero_removes_nothing(schedule, aligned, data):
    shapes = data.draw(st.lists(block_shapes(aligned=aligned), min_size=1, max_size=6))
    expected = [Widths(s.num_groups, s.num_channels) for s in shapes]
    assert plan_widths(shapes, 0.0, schedule) == expected
    counts = range(1, shapes[0].num_groups + 1)
    assert plan_widths(shapes[:1] * 3, 0.0, "uniform", group_counts=counts) == expected[:1] * 3


@fixed
@given(st.data(), block_shapes(), st.integers(1, 12), st.floats(0, 0.6))
def test_uniform_widths(data, shape, num_blocks, ratio):
    every_count = list(range(1, shape.num_groups + 1))
    counts = data.draw(st.lists(st.sampled_from(every_count), min_size=1, unique=True))
    try:
        widths = plan_widths([shape] * num_blocks, ratio, "uniform", group_counts=counts)
    except ConfigError:
        assume(False)
    assert len(widths) == num_blocks
    assert len(set(widths)) == 1
    groups, channels = widths[0].num_groups, widths[0].num_channels
    exact = shape.num_groups * (1 - ratio)
    assert groups in counts
    assert groups == min((c for c in counts if c >= exact - 1e-9), default=max(counts))
    if 8 < channels < shape.num_channels:
        miss = removed_params(shape, widths[0]) - ratio * shape.params
        assert abs(miss) <= 4 * shape.channel_params * (1 + 1e-6)


@fixed
@given(st.data(), block_shapes(), st.integers(0, 4), st.integers(1, 4), st.floats(0, 0.6))
def test_uniform_widths_of_a_hybrid(data, shape, before, after, ratio):
    """Blocks whose attention is fixed lose as many channels as the others, and no more."""
    hybrid = BlockShape((SublayerShape("attention", 1, 5000, is_fixed=True), shape.sublayers[1]))
    shapes = data.draw(st.permutations([hybrid] * before + [shape] * after))
    counts = range(1, shape.num_groups + 1)
    rules = WidthRules(8, counts)
    try:
        widths = module.scheduled_widths(shapes, Schedule(ratio, "uniform"), rules)
    except ConfigError:
        assume(False)
    assert len({channels for _, channels in widths}) == 1
    groups = {groups for shape, (groups, _) in zip(shapes, widths, strict=True) if shape != hybrid}
    assert len(groups) == 1
    assert all(width[0] == 1 for s, width in zip(shapes, widths, strict=True) if s == hybrid)
    if 8 < widths[0][1] < shape.num_channels:
        miss = total_removed(shapes, widths) - ratio * total_params(shapes)
        assert abs(miss) <= 4 * len(shapes) * shape.channel_params * (1 + 1e-6)


def test_uniform_widths_need_equal_blocks():
    shapes = [Shape(4, 1000, 512, 100), Shape(4, 1000, 504, 100)]
    with pytest.raises(ConfigError, match="differ") as caught:
        plan_widths(shapes, 0.5, "uniform", group_counts=[1, 2, 4])
    assert caught.value.hint


@pytest.mark.parametrize("ratio", [0.2, 0.33, 0.5])
@each_schedule
def test_smollm2(schedule, ratio):
    widths = plan_widths(SMOLLM2, ratio, schedule, ratio / 4)
    removed = total_removed(SMOLLM2, widths) / total_params(SMOLLM2)
    assert abs(removed - ratio) < 0.005
    assert abs(removed - ratio) * total_params(SMOLLM2) <= 4 * 1728 * (1 + 1e-6)


@pytest.mark.parametrize("counts", [[1, 2, 3], [1, 3], [3]])
@pytest.mark.parametrize("ratio", [0.2, 0.33, 0.5])
def test_smollm2_uniform(ratio, counts):
    widths = plan_widths(SMOLLM2, ratio, "uniform", group_counts=counts)
    assert len(set(widths)) == 1
    assert abs(total_removed(SMOLLM2, widths) / total_params(SMOLLM2) - ratio) < 0.005


def test_removed_params():
    shape = Shape(4, 1000, 512, 100)
    assert shape.params == 4 * 1000 + 512 * 100
    assert removed_params(shape, Widths(4, 512)) == 0
    assert removed_params(shape, Widths(1, 500)) == 3 * 1000 + 12 * 100


@pytest.mark.parametrize(("multiple_of", "channels"), [(8, 8), (512, 512), (1024, 512)])
def test_largest_ratio(multiple_of, channels):
    shape = Shape(4, 1000, 512, 100)
    assert largest_ratio(shape, multiple_of) == pytest.approx(1 - (1000 + channels * 100) / 55200)


def test_given_ratios_are_those_of_the_first_blocks():
    widths = given_widths(SMOLLM2, (0.25, 0.0, 0.5))
    removed = [removed_params(s, w) / s.params for s, w in zip(SMOLLM2, widths, strict=True)]
    assert removed == pytest.approx([0.25, 0.0, 0.5] + [0.0] * (len(SMOLLM2) - 3), abs=0.003)
    coarse = given_widths(SMOLLM2, (0.18,), multiple_of=100)
    assert {width.num_channels for width in coarse[1:]} == {SMOLLM2[0].num_channels}


# Infeasible ratios


def check_named_ratio(shapes: list[Shape], ratio: float, schedule: str, **options) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_widths(shapes, ratio, schedule, **options)
    assert str(ratio) in str(caught.value)
    named = named_ratio(caught.value)
    assert named < ratio
    plan_widths(shapes, named, schedule, **options)
    with pytest.raises(ConfigError):
        plan_widths(shapes, named + 0.01, schedule, **options)


@each_schedule
@pytest.mark.parametrize("min_ratio", [None, 0.0, 0.3])
def test_infeasible_ratio_of_smollm2(schedule, min_ratio):
    check_named_ratio(SMOLLM2, 0.95, schedule, min_ratio=min_ratio)


@pytest.mark.parametrize("schedule", ["linear", "linear_decrease"])
def test_half_of_smollm2_is_too_much_for_a_steep_line(schedule):
    # r_max = r_0 + 2·(0.5 − r_0) with r_0 = 0.5/8; one group and 8 channels must stay.
    assert 1 - (294912 + 8 * 1728) / SMOLLM2[0].params < 0.5 / 8 + 2 * (0.5 - 0.5 / 8)
    check_named_ratio(SMOLLM2, 0.5, schedule)


@each_schedule
@fixed
@given(shapes=models, multiple_of=st.sampled_from([1, 8, 64]))
def test_infeasible_ratio_of_unequal_blocks(schedule, shapes, multiple_of):
    check_named_ratio(shapes, 0.9999, schedule, multiple_of=multiple_of)


def test_message_names_the_block_that_loses_too_much():
    roomy, tight = Shape(1, 10, 64, 10), Shape(1, 640, 64, 10)
    assert largest_ratio(tight, 8) == pytest.approx(1 - 720 / 1280)
    with pytest.raises(ConfigError, match=r"50\.0% of block 1, which can lose 43\.8% at most"):
        plan_widths([roomy, tight, roomy], 0.5, "uniform")


def test_named_ratio_is_feasible_whatever_the_smallest_ratio():
    tight = Shape(1, 640, 64, 10)
    check_named_ratio([tight], 0.7, "uniform", min_ratio=0.6)


def test_uniform_ratio_is_infeasible_if_the_groups_must_stay():
    attention = 3 * 294912
    most = 1 - (attention + 8 * 1728) / SMOLLM2[0].params
    plan_widths(SMOLLM2, most - 0.001, "uniform", group_counts=[3])
    check_named_ratio(SMOLLM2, most + 0.05, "uniform", group_counts=[3])


def test_no_ratio_is_feasible():
    with pytest.raises(ConfigError) as caught:
        plan_widths([Shape(1, 640, 64, 10)] * 3, 0.7, min_ratio=0.6)
    assert "no ratio is feasible" in caught.value.hint


# Units moved between sublayers


@st.composite
def measurements(draw: st.DrawFn) -> tuple[list[Shape], list[Widths], list[list[float]]]:
    """Up to two blocks of few steps, with errors that rise ever faster."""
    shapes, widths, errors = [], [], []
    for _ in range(draw(st.integers(1, 2))):
        group_params, channel_params = draw(st.integers(1, 100)), draw(st.integers(1, 20))
        shape = Shape(
            draw(st.integers(1, 5)), group_params, draw(st.integers(9, 48)), channel_params
        )
        width = Widths(
            draw(st.integers(1, shape.num_groups)),
            8 * draw(st.integers(1, shape.num_channels // 8)),
        )
        for total, keep, step in (
            (shape.num_groups, width.num_groups, 1),
            (shape.num_channels, width.num_channels, 8),
        ):
            removals = measured_removals(total, keep, step)
            rises = sorted(draw(st.floats(0.01, 1)) for _ in removals)
            sizes = [b - a for a, b in itertools.pairwise([0, *removals])]
            rises = [rise * size for rise, size in zip(rises, sizes, strict=True)]
            errors.append(list(itertools.accumulate(rises)))
        shapes.append(shape)
        widths.append(width)
    return shapes, widths, errors


@fixed
@given(measurements(), st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_units_move_to_where_they_cost_least(measured, prices):
    shapes, widths, errors = measured
    moved = move_units(shapes, widths, errors, prices[: len(errors)], 8)
    steps = []
    for index, block_errors in enumerate(errors):
        shape, width = shapes[index // 2], widths[index // 2]
        total, keep, params, step = (
            (shape.num_channels, width.num_channels, shape.channel_params, 8)
            if index % 2
            else (shape.num_groups, width.num_groups, shape.group_params, 1)
        )
        removals = [0, *measured_removals(total, keep, step)]
        costs = [0.0, *(prices[index] * error for error in block_errors)]
        steps.append([(total - n, n * params, c) for n, c in zip(removals, costs, strict=True)])
    kept = [n for width in moved for n in (width.num_groups, width.num_channels)]
    chosen = [next(s for s in choices if s[0] == n) for choices, n in zip(steps, kept, strict=True)]
    freed = sum(choice[1] for choice in chosen)
    budget = total_removed(shapes, widths)
    assert freed == total_removed(shapes, moved)
    assert freed - budget <= max(s.group_params + 8 * s.channel_params for s in shapes) / 2
    # All steps that cost less than the cheapest one left out are taken, and no other choice that
    # frees as much as they do costs less. What is taken beyond them only fills up the budget.
    slopes = [
        [(after[2] - before[2]) / (after[1] - before[1]) for before, after in pairwise(choices)]
        for choices in steps
    ]
    taken = [choices.index(choice) for choices, choice in zip(steps, chosen, strict=True)]
    left_out = [s[n] for s, n in zip(slopes, taken, strict=True) if n < len(s)]
    limit = min(left_out, default=math.inf) * (1 - 1e-9)
    cheap = [sum(slope < limit for slope in s) for s in slopes]
    assert all(few <= n for few, n in zip(cheap, taken, strict=True))
    cost, freed = (
        sum(choices[n][i] for choices, n in zip(steps, cheap, strict=True)) for i in (2, 1)
    )
    for other in itertools.product(*steps):
        if sum(choice[1] for choice in other) >= freed:
            assert cost <= sum(choice[2] for choice in other) * (1 + 1e-9)


def test_nothing_moves_further_than_was_measured():
    shapes = [Shape(1, 10, 64, 1)] * 2
    widths = [Widths(1, 48), Widths(1, 24)]
    errors = [[], [1.0, 2.0, 3.0, 4.0], [], [9.0] * 7]
    assert [len(measured_removals(64, w.num_channels, 8)) for w in widths] == [4, 7]
    moved = move_units(shapes, widths, errors, [1.0] * 4, 8)
    assert [m.num_channels for m in moved] == [32, 40]


def test_a_group_that_does_not_fit_gives_way_to_channels():
    shapes, widths = [Shape(4, 100, 64, 1)], [Widths(3, 48)]
    errors = [[1.0, 2.0], [8.0, 16.0, 24.0, 32.0]]
    assert move_units(shapes, widths, errors, [1.0, 1.0], 8) == [Widths(3, 48)]


@given(st.data())
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
def test_nested_widths_stay_within_and_remove_as_much(data):
    rules = WidthRules(8)
    attention, ffn = SublayerShape("attention", 4, 64), SublayerShape("ffn", 64, 10)
    shapes = [BlockShape((attention, ffn))] * data.draw(st.integers(1, 5))
    drawn = st.tuples(st.integers(1, 4), st.integers(1, 8).map(lambda n: 8 * n))
    widths, limits = ([data.draw(drawn) for _ in shapes] for _ in range(2))
    found = nested_widths(shapes, widths, limits, rules)
    pairs = (zip(*block, strict=True) for block in zip(found, limits, strict=True))
    assert all(width <= most for pair in pairs for width, most in pair)
    removed = [sum(map(removed_params, shapes, w)) for w in (found, widths)]
    full = all(now[1] == most[1] for now, most in zip(found, limits, strict=True))
    assert full or removed[0] - removed[1] <= 40
    assert removed[1] - removed[0] <= 40

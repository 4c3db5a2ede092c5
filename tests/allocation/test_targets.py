"""Widths that meet a target, on random shapes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, combinations_with_replacement, pairwise, product
from operator import ge

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.allocation.reallocation import measured_removals, move_units
from slimgpt.allocation.schedule import Schedule, WidthRules, feasible_ratio, scheduled_widths
from slimgpt.allocation.shapes import (
    BlockShape,
    BlockWidths,
    SublayerShape,
    removed_params,
    whole_widths,
)
from slimgpt.allocation.targets import Price, PriceCurve, Target, target_widths
from slimgpt.errors import ConfigError

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=100)
SCHEDULES = ["log", "linear", "uniform", "log_decrease", "linear_decrease"]


@dataclass(frozen=True)
class Model:
    shapes: list[BlockShape]
    target: Target  # its limit is the cost of the dense model

    @property
    def whole(self) -> int:
        return self.target.limit

    def asking(self, limit: int) -> Target:
        return Target(
            "target_params",
            limit,
            limit,
            self.target.fixed,
            self.target.prices,
            only_attention=self.target.only_attention,
        )


@st.composite
def measured(draw: st.DrawFn, sublayer: SublayerShape) -> list[tuple[int, int]]:
    """Some widths of a sublayer, and times that mostly rise."""
    count = sublayer.num_units
    widths = sorted(draw(st.sets(st.integers(1, count), max_size=8)) | {count})
    rises = draw(st.lists(st.integers(-200, 2000), min_size=len(widths), max_size=len(widths)))
    return list(zip(widths, (max(t, 1) for t in accumulate(rises)), strict=True))


def price_curves(sublayer: SublayerShape) -> st.SearchStrategy[PriceCurve]:
    return measured(sublayer).map(partial(PriceCurve.fitted, sublayer))


@st.composite
def models(draw: st.DrawFn, alike: bool = False) -> Model:
    """Blocks, each with more parameters in the FFN, and any kind of price."""
    shapes = []
    for _ in range(draw(st.integers(1, 6))):
        groups, channels = draw(st.integers(1, 8)), draw(st.integers(128, 900))
        channel = draw(st.integers(1, 3000))
        group = draw(st.integers(1, channels * channel // (2 * groups)))
        attention = SublayerShape("attention", groups, group)
        shapes.append(BlockShape((attention, SublayerShape("ffn", channels, channel))))
    if alike:
        shapes = [shapes[0]] * len(shapes)
    kind = draw(st.sampled_from(["params", "bytes", "blocks of 32", "kv cache", "latency"]))
    curves: list[tuple[PriceCurve, ...]] = [()] * len(shapes)
    if kind == "latency":
        curves = [draw(st.tuples(*map(price_curves, shape.sublayers))) for shape in shapes]
    if alike:
        curves = [curves[0]] * len(shapes)
    prices = []
    for shape, curve in zip(shapes, curves, strict=True):
        attention, ffn = shape.sublayers
        prices.append(
            {
                "params": (Price(1), Price(1)),
                "bytes": (Price(2), Price(2)),
                "blocks of 32": (
                    Price(2 * attention.unit_params, 2 * attention.unit_params),
                    Price(34 * ffn.unit_params, 32 * ffn.unit_params),
                ),
                "kv cache": (Price(64, attention.unit_params), Price(0)),
                "latency": curve,
            }[kind]
        )
    first = Target("target_params", 0, 0, draw(st.integers(0, 10**6)), tuple(prices))
    whole = first.cost(shapes, list(map(whole_widths, shapes)))
    target = Target(
        "target_params", 0, whole, first.fixed, first.prices, only_attention=kind == "kv cache"
    )
    return Model(shapes, target)


def steps(model: Model, rules: WidthRules, widths: Sequence[BlockWidths]) -> list[int]:
    """Cost of the next larger width of each sublayer that lost units."""
    found = []
    shapes = model.target.prunable(model.shapes)
    for shape, block, prices in zip(shapes, widths, model.target.prices, strict=True):
        for sublayer, width, price in zip(shape.sublayers, block, prices, strict=True):
            wider = [count for count in rules.widths(sublayer) if count > width]
            if wider:
                found.append(price.of(sublayer, wider[0]) - price.of(sublayer, width))
    return found


def named_limit(error: ConfigError) -> int:
    return int(
        re.search(r"the least with these options is ([\d,]+)", str(error))[1].replace(",", "")
    )


def met(
    model: Model, target: Target, schedule: Schedule, rules: WidthRules
) -> tuple[Target, list[BlockWidths]]:
    """Widths for a target; if it is infeasible, for the one that the error names."""
    try:
        return target, target_widths(model.shapes, target, schedule, rules)
    except ConfigError as err:
        error = err
    least = named_limit(error)
    assert target.limit < least
    assert f"{least:,} parameters or more" in str(error.hint)
    target = model.asking(least)
    return target, target_widths(model.shapes, target, schedule, rules)


@pytest.mark.parametrize("schedule", SCHEDULES)
@fixed
@given(models(), st.floats(0.01, 1), st.sampled_from([1, 8, 64]))
def test_a_target_is_met_and_never_exceeded(schedule, model, share, multiple_of):
    rules, plan = WidthRules(multiple_of), Schedule(0.2, schedule)
    target = model.asking(math.floor(share * model.whole))
    target, widths = met(model, target, plan, rules)
    cost = target.cost(model.shapes, widths)
    assert cost <= target.limit
    slack = target.limit - cost
    assert all(slack < step for step in steps(model, rules, widths))
    if model.target.only_attention:
        kept = [width[1] for width in widths]
        assert kept == [shape.sublayers[1].num_units for shape in model.shapes]


@fixed
@given(models(alike=True), st.floats(0.1, 1))
def test_uniform_widths_meet_a_target(model, share):
    groups = model.shapes[0].sublayers[0].num_units
    rules, plan = WidthRules(group_counts=range(1, groups + 1)), Schedule(0.2, "uniform")
    target, widths = met(model, model.asking(math.floor(share * model.whole)), plan, rules)
    assert len(set(widths)) == 1
    cost = target.cost(model.shapes, widths)
    assert cost <= target.limit
    together = (len(model.shapes) * step for step in steps(model, rules, widths))
    assert all(target.limit - cost < step for step in together)


def test_what_the_target_is_worth():
    shape = BlockShape((SublayerShape("attention", 4, 100), SublayerShape("ffn", 64, 10)))
    prices = ((Price(3, 100), Price(0)),)
    target = Target("target_kv_cache", 0.5, 6, 1, prices, whole=13, unit="of the cache")
    assert target.cost([shape], [(4, 8)]) == 13
    assert target.cost([shape], [(2, 64)]) == 7
    assert target.value(7) == 7 / 13
    assert target.shown(7) == "0.5385x of the cache"
    q8 = Price(34, 320)  # 32 channels
    assert [q8.of(shape.sublayers[1], width) for width in (1, 32, 33, 64)] == [34, 34, 68, 68]


def test_more_than_there_is_cannot_be_asked_for():
    shape = BlockShape((SublayerShape("attention", 4, 100), SublayerShape("ffn", 64, 10)))
    target = Target("target_params", 2000, 2000, 0, ((Price(1), Price(1)),))
    with pytest.raises(ConfigError, match="nothing to remove: the model has 1,040 parameters"):
        target_widths([shape], target, Schedule(0.2), WidthRules())
    exact = Target("target_params", 1040, 1040, 0, ((Price(1), Price(1)),))
    assert target_widths([shape], exact, Schedule(0.2), WidthRules()) == [(4, 64)]


def test_a_smallest_ratio_above_the_target():
    shape = BlockShape((SublayerShape("attention", 4, 100), SublayerShape("ffn", 64, 10)))
    target = Target("target_params", 900, 900, 0, ((Price(1), Price(1)),))
    with pytest.raises(ConfigError, match=r"min_ratio=0.5 leaves \d+ parameters, fewer than"):
        target_widths([shape], target, Schedule(0.2, "log", 0.5), WidthRules())


def test_blocks_without_prunable_attention_keep_their_cache():
    ffn, lone = SublayerShape("ffn", 64, 10), SublayerShape("attention", 1, 100, is_fixed=True)
    shapes = [BlockShape((lone, ffn)), BlockShape((SublayerShape("attention", 4, 100), ffn))] * 2
    prices = ((Price(0), Price(0)), (Price(8, 100), Price(0))) * 2
    target = Target("target_kv_cache", 0.5, 32, 0, prices, whole=64, only_attention=True)
    widths = target_widths(shapes, target, Schedule(0.2, "uniform"), WidthRules())
    assert widths == [(1, 64), (2, 64)] * 2
    none = Target("target_kv_cache", 0.5, 4, 8, prices[:1], whole=8, only_attention=True)
    with pytest.raises(ConfigError, match="the least with these options is 1x"):
        target_widths(shapes[:1], none, Schedule(0.2, "uniform"), WidthRules())


# Measured times

sublayers = st.builds(
    SublayerShape, st.sampled_from(["attention", "ffn"]), st.integers(1, 400), st.integers(1, 3000)
)


@fixed
@given(st.data(), sublayers)
def test_a_curve_is_monotone_and_stays_between_its_points(data, sublayer):
    points = data.draw(measured(sublayer))
    curve = PriceCurve.fitted(sublayer, points)
    costs = [curve.of(sublayer, width) for width in range(sublayer.num_units + 1)]
    assert costs[0] == 0
    assert costs == sorted(costs)
    times = [cost for _, cost in points]
    assert all(min(times) <= cost <= max(times) for cost in costs[1:])
    if times == sorted(times):
        assert [curve.of(sublayer, width) for width, _ in points] == times
    smallest = points[0][0]
    assert set(costs[1:smallest]) <= {costs[smallest]}
    for (low, _), (high, _) in pairwise(points):
        for width in range(low, high + 1):
            exact = (costs[low] * (high - width) + costs[high] * (width - low)) / (high - low)
            assert exact <= costs[width] < exact + 1


def total(chosen: Sequence[int], times: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(chosen, times, strict=True))


@fixed
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_curve_is_the_closest_that_does_not_fall(times):
    sublayer = SublayerShape("ffn", len(times), 3)
    curve = PriceCurve.fitted(sublayer, list(enumerate(times, 1)))
    found = [curve.of(sublayer, width) for width in range(1, len(times) + 1)]
    rising = combinations_with_replacement(range(1, 7), len(times))
    assert total(found, times) == min(total(costs, times) for costs in rising)


def test_an_outlier_does_not_move_its_neighbours():
    sublayer = SublayerShape("ffn", 4, 10)
    curve = PriceCurve.fitted(sublayer, [(1, 10), (2, 900), (3, 30), (4, 40)])
    assert curve.points == ((10, 10), (20, 30), (30, 30), (40, 40))


def test_query_heads_cost_what_their_parameters_do():
    sublayer = SublayerShape("attention", 2, 100, parts=4, part_params=20)
    curve = PriceCurve(((100, 50), (200, 90)))
    assert curve.of(sublayer, (2, 3)) == 74  # 160 parameters
    assert curve.of(sublayer, (1, 3)) == curve.of(sublayer, 1) == 50


@fixed
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.floats(0.05, 1))
def test_no_larger_model_meets_the_time(data, groups, steps_of_channels, share):
    rules = WidthRules(8)
    shape = BlockShape(
        (SublayerShape("attention", groups, 50), SublayerShape("ffn", 8 * steps_of_channels, 40))
    )
    prices = tuple(data.draw(st.tuples(*map(price_curves, shape.sublayers))) for _ in range(2))
    shapes = [shape, shape]
    first = Target("target_latency", 1, 0, 20, prices)
    whole = first.cost(shapes, [whole_widths(shape)] * 2)
    limit = math.floor(share * whole)
    target = Target("target_latency", share, limit, 20, prices, whole=whole)
    per_block = list(product(*map(rules.widths, shape.sublayers)))
    feasible = [w for w in product(per_block, repeat=2) if target.cost(shapes, w) <= limit]
    schedule = Schedule(0.2, "uniform")
    most = feasible_ratio(shapes, schedule, rules)
    if target.cost(shapes, scheduled_widths(shapes, replace(schedule, ratio=most), rules)) > limit:
        with pytest.raises(ConfigError, match="cannot be reached"):
            target_widths(shapes, target, schedule, rules)
        return
    found = tuple(target_widths(shapes, target, schedule, rules))
    assert found in feasible
    kept = [*chain(*found)]
    larger = (w for w in feasible if all(map(ge, chain(*w), kept)))
    assert [*larger] == [found]


# Devices that share layers


@st.composite
def shared(draw: st.DrawFn) -> tuple[list[BlockShape], WidthRules]:
    devices = draw(st.sampled_from([2, 4, 8]))
    shapes = []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.sampled_from([2, 4, 8, 12]))
        heads = draw(st.sampled_from([4, 8]))
        channels = draw(st.integers(8 * devices, 600))
        unit = heads * 10 + 20
        attention = SublayerShape("attention", groups, unit, parts=heads, part_params=10)
        shapes.append(BlockShape((attention, SublayerShape("ffn", channels, 10))))
    return shapes, WidthRules(draw(st.sampled_from([1, 8])), tensor_parallel=devices)


def check_shared(shapes: Sequence[BlockShape], rules: WidthRules, widths) -> None:
    devices = rules.tensor_parallel
    for shape, (attention, channels) in zip(shapes, widths, strict=True):
        first, ffn = shape.sublayers
        groups, heads = (attention, first.parts) if isinstance(attention, int) else attention
        assert groups * heads % devices == 0
        assert groups % devices == 0 or (first.num_units < devices and devices % groups == 0)
        assert channels % devices == 0
        assert channels % (devices * rules.multiple_of) == 0 or channels == ffn.num_units


@fixed
@given(shared(), st.floats(0, 0.9))
def test_scheduled_widths_can_be_shared(model, ratio):
    shapes, rules = model
    plan = partial(scheduled_widths, shapes, rules=rules)
    try:
        check_shared(shapes, rules, plan(schedule=Schedule(ratio, "uniform")))
        return
    except ConfigError as err:
        error = err
    assert re.search("which can lose|which must go|no number can be shared", str(error))
    named = re.search(r"est feasible ratio with these options is (\d\.\d+)", str(error.hint))
    if named:
        check_shared(shapes, rules, plan(schedule=Schedule(float(named[1]), "uniform")))


def test_widths_for_two_devices():
    three = BlockShape((SublayerShape("attention", 3, 100), SublayerShape("ffn", 100, 10)))
    rules = WidthRules(8, tensor_parallel=2)
    assert rules.widths(three.sublayers[0]) == (2,)
    assert rules.widths(three.sublayers[1]) == (16, 32, 48, 64, 80, 96, 100)
    with pytest.raises(ConfigError, match=r"ratio=0\.05 is below 7\.69%, which must go"):
        scheduled_widths([three], Schedule(0.05), rules)
    few = SublayerShape("attention", 2, 100, parts=8, part_params=5)
    assert WidthRules(tensor_parallel=4).widths(few) == (1, 2)
    assert not WidthRules(tensor_parallel=4).allows(few, (1, 6))
    with pytest.raises(ConfigError, match="no number can be shared by 3 devices"):
        WidthRules(tensor_parallel=3).widths(few)


# Measured widths


@st.composite
def measurements(draw: st.DrawFn, devices: int = 1):
    """A model, a feasible target, its scheduled widths, and errors at the measured ones."""
    rules = WidthRules(8, tensor_parallel=devices)
    model = draw(models())
    target = model.asking(math.floor(draw(st.floats(0.2, 1)) * model.whole))
    try:
        widths = target_widths(model.shapes, target, Schedule(0.2), rules)
    except ConfigError as error:
        found = re.search(r"the least with these options is ([\d,]+)", str(error))
        if not found:
            return None
        target = model.asking(int(found[1].replace(",", "")))
        widths = target_widths(model.shapes, target, Schedule(0.2), rules)
    curves, prices = [], []
    for shape, block in zip(model.shapes, widths, strict=True):
        of_block = []
        for sublayer, width in zip(shape.sublayers, block, strict=True):
            total = sublayer.num_units
            kept = [total - n for n in measured_removals(total, width, rules.step(sublayer))]
            kept = [count for count in kept if rules.allows(sublayer, count)]
            rises = [draw(st.floats(0.01, 10)) for _ in kept[:20]] + [1.0] * len(kept[20:])
            of_block.append(list(zip(kept, accumulate(rises), strict=True)))
        curves.append(of_block)
        prices.append([draw(st.floats(0.1, 10)) for _ in block])
    return model, rules, target, widths, curves, prices


@pytest.mark.parametrize("devices", [1, 2])
@fixed
@given(data=st.data())
def test_measured_widths_meet_a_target(devices, data):
    measured = data.draw(measurements(devices))
    if measured is None:
        return
    model, rules, target, widths, curves, prices = measured
    moved = move_units(model.shapes, widths, curves, prices, rules=rules, target=target)
    cost = target.cost(model.shapes, moved)
    assert cost <= target.limit
    if target.limit < model.whole:
        assert all(target.limit - cost < step for step in steps(model, rules, moved))
    for shape, block in zip(model.shapes, moved, strict=True):
        for sublayer, width in zip(shape.sublayers, block, strict=True):
            is_left_alone = model.target.only_attention and sublayer.kind == "ffn"
            assert is_left_alone or width in rules.widths(sublayer)


@fixed
@given(shared(), st.floats(0.1, 0.5), st.randoms(use_true_random=False))
def test_measured_widths_can_be_shared(model, ratio, random):
    shapes, rules = model
    try:
        widths = scheduled_widths(shapes, Schedule(ratio, "uniform"), rules)
    except ConfigError:
        return
    curves = [
        [
            [
                (sub.num_units - n, float(n) ** 1.5 * random.uniform(0.5, 2))
                for n in measured_removals(sub.num_units, width, rules.step(sub))
                if rules.allows(sub, sub.num_units - n)
            ]
            for sub, width in zip(shape.sublayers, block, strict=True)
        ]
        for shape, block in zip(shapes, widths, strict=True)
    ]
    prices = [[random.uniform(0, 1) for _ in shape.sublayers] for shape in shapes]
    moved = move_units(shapes, widths, curves, prices, rules=rules)
    check_shared(shapes, rules, moved)
    before, after = (
        sum(removed_params(s, w) for s, w in zip(shapes, each, strict=True))
        for each in (widths, moved)
    )
    assert after > 0 or before == 0


def test_where_the_nearest_step_would_exceed_the_target_one_more_is_taken():
    shape = BlockShape((SublayerShape("attention", 4, 100), SublayerShape("ffn", 64, 1)))
    curves = [[[(3, 1.0), (2, 2.0)], [(56, 8.0), (48, 16.0), (40, 24.0), (32, 32.0)]]]
    ratio = [(3, 61)]
    assert move_units([shape], ratio, curves, [[1.0, 1.0]]) == [(3, 64)]
    target = Target("target_params", 361, 361, 0, ((Price(1), Price(1)),))
    assert move_units([shape], ratio, curves, [[1.0, 1.0]], target=target) == [(3, 56)]


def test_where_a_group_removes_too_much_channels_come_back():
    shape = BlockShape((SublayerShape("attention", 4, 20), SublayerShape("ffn", 64, 1)))
    curves = [[[(3, 30.0), (2, 90.0)], [(56, 1.0), (48, 3.0), (40, 6.0), (32, 90.0)]]]
    target = Target("target_params", 109, 109, 0, ((Price(1), Price(1)),))
    moved = move_units([shape], [(3, 48)], curves, [[1.0, 1.0]], target=target)
    assert moved == [(3, 48)]
    assert move_units([shape], [(3, 49)], curves, [[1.0, 1.0]]) == [(3, 40)]

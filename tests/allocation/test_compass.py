"""Compass search on functions whose minimum is known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimgpt.allocation.compass import Point, compass_search

STEPS = (0.5, 1.0, 0.25)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.lists(st.floats(0.5, 4), min_size=3))
def test_a_bowl_is_searched_to_the_last_step(centre: list[float], widths: list[float]) -> None:
    def value(point: Point) -> float:
        parts = zip(point, centre, widths, strict=False)
        return 1 + sum(width * (x - middle) ** 2 for x, middle, width in parts)

    found = compass_search(value, STEPS, 3, 0.0)
    for x, middle, step in zip(found, centre, STEPS, strict=True):
        assert abs(x - middle) <= step / 2**3 / 2 + 1e-9


def test_what_is_not_enough_is_not_kept() -> None:
    assert compass_search(lambda point: 1 - 0.009 * (point != (0.0,)), (1.0,), 3, 0.01) == (0.0,)
    assert compass_search(lambda point: 1 - 0.011 * (point != (0.0,)), (1.0,), 3, 0.01) != (0.0,)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_infinite_values_end_the_search(limit: int) -> None:
    seen: list[Point] = []

    def value(point: Point) -> float:
        if len(seen) == limit:
            return math.inf
        seen.append(point)
        return -float(len(seen))

    assert compass_search(value, STEPS, 2, 0.0) == seen[-1]

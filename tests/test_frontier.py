"""The frontier, the area under it, and the straight line, against brute force."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.frontier import above_the_line, area, frontier

Point = tuple[Fraction, Fraction]
# a coarse grid, so that points often are equal in cost or accuracy
POINTS = st.lists(
    st.tuples(st.integers(-2, 14).map(lambda n: Fraction(n, 2)), st.integers(-2, 12).map(lambda n: Fraction(n, 3))),
    max_size=12,
)
CHEAP: Point = (Fraction(1), Fraction(1))
DEAR: Point = (Fraction(5), Fraction(3))


def front(points: list[Point]) -> list[Point]:
    return frontier(points, lambda point: point[0], lambda point: point[1])


def dominated(point: Point, by: Point) -> bool:
    return by != point and by[0] <= point[0] and by[1] >= point[1]


@given(POINTS)
def test_the_frontier_is_every_point_that_no_other_dominates_once(points: list[Point]) -> None:
    expected = {point for point in points if not any(dominated(point, other) for other in points)}
    assert front(points) == sorted(expected)


@given(POINTS)
def test_along_the_frontier_cost_and_accuracy_rise(points: list[Point]) -> None:
    found = front(points)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))


def test_of_equal_items_the_first_stays() -> None:
    items = [("b", 1, 5), ("a", 1, 5), ("c", 2, 5), ("d", 2, 6), ("e", 2, 6)]
    assert [item[0] for item in frontier(items, lambda one: one[1], lambda one: one[2])] == ["b", "d"]


def integral(points: list[Point]) -> Fraction:
    """Brute force: thin slices of cost, in each the best accuracy that so much buys."""
    slices = 64  # every cost is a multiple of ½, so slices of 1/16 never straddle one
    everything = [*points, CHEAP, DEAR]
    total = Fraction(0)
    for number in range(slices):
        cost = CHEAP[0] + (DEAR[0] - CHEAP[0]) * Fraction(2 * number + 1, 2 * slices)
        best = max(accuracy for price, accuracy in everything if price <= cost)
        total += (best - CHEAP[1]) / (DEAR[1] - CHEAP[1]) / slices
    return total


@given(POINTS)
def test_the_area_is_the_integral_of_the_best_that_each_cost_buys(points: list[Point]) -> None:
    assert area(points, CHEAP, DEAR) == integral(points)


@given(POINTS, POINTS)
def test_more_points_never_make_the_area_smaller(points: list[Point], more: list[Point]) -> None:
    assert area(points + more, CHEAP, DEAR) >= area(points, CHEAP, DEAR) >= 0


@given(POINTS, st.integers(1, 9), st.integers(-9, 9))
def test_the_area_does_not_depend_on_units(points: list[Point], factor: int, shift: int) -> None:
    def other(point: Point) -> Point:
        return point[0] * factor, point[1] * factor + shift

    assert area([other(point) for point in points], other(CHEAP), other(DEAR)) == area(points, CHEAP, DEAR)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], 0.0),  # the smallest anchor's accuracy until the largest's cost
        ([CHEAP, DEAR], 0.0),
        ([(2.0, 2.0)], 0.75 * 0.5),
        ([(2.0, 2.0), (3.0, 3.0)], 0.25 * 0.5 + 0.5 * 1.0),
        ([(2.0, 2.0), (3.0, 1.5)], 0.75 * 0.5),
        ([(1.0, 3.0)], 1.0),
        ([(0.5, 3.0)], 1.0),  # smaller than the smallest anchor: counted from there
        ([(2.0, 4.0)], 0.75 * 1.5),  # better than the largest anchor
        ([(3.0, 0.0)], 0.0),  # worse than the smallest
        ([(6.0, 9.0)], 0.0),  # larger than the largest
        ([(5.0, 9.0)], 0.0),
    ],
)
def test_areas_worked_out_by_hand(points: list[tuple[float, float]], expected: float) -> None:
    assert area(points, (1.0, 1.0), (5.0, 3.0)) == pytest.approx(expected)


@pytest.mark.parametrize("largest", [(1.0, 3.0), (0.5, 3.0), (5.0, 1.0), (5.0, 0.5)])
def test_anchors_that_span_no_range_have_no_area(largest: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no range to scale to between"):
        area([], (1.0, 1.0), largest)


@given(POINTS, st.integers(1, 8))
def test_buckets_above_the_line_are_counted_like_by_hand(points: list[Point], buckets: int) -> None:
    width = (DEAR[0] - CHEAP[0]) / buckets
    above = held = 0
    for number in range(buckets):
        low, high = CHEAP[0] + number * width, CHEAP[0] + (number + 1) * width
        inside = [point for point in points if low <= point[0] < high and CHEAP[0] < point[0]]
        held += bool(inside)
        # the line from (1, 1) to (5, 3) is ½ + cost / 2
        above += any(accuracy > Fraction(1, 2) + cost / 2 for cost, accuracy in inside)
    assert above_the_line(points, CHEAP, DEAR, buckets) == (above, held)


def test_a_point_on_the_line_is_not_above_it() -> None:
    assert above_the_line([(3.0, 2.0)], (1.0, 1.0), (5.0, 3.0), 4) == (0, 1)
    assert above_the_line([(3.0, 2.1), (3.1, 0.0)], (1.0, 1.0), (5.0, 3.0), 4) == (1, 1)
    assert above_the_line([(1.0, 9.0), (5.0, 9.0)], (1.0, 1.0), (5.0, 3.0), 4) == (0, 0)


def test_the_frontier_does_not_import_torch() -> None:
    code = "import sys, klas_zoo.frontier; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

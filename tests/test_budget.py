"""The best within a budget, against a brute force."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.budget import Budget, Candidates

NUMBERS = st.integers(1, 4)
ITEMS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, st.sampled_from("abc")), max_size=7)


def candidates(items: list[tuple[float, float, int, str]]) -> Candidates[tuple[float, float, int, str]]:
    """Of items (latency, accuracy, size, name)."""
    return Candidates(
        items=items, latency_ms=lambda i: i[0], accuracy=lambda i: i[1], size_bytes=lambda i: i[2], name=lambda i: i[3]
    )


@given(items=ITEMS, latency=NUMBERS, accuracy=st.none() | NUMBERS, size=st.none() | NUMBERS)
def test_the_best_is_the_most_accurate_then_the_fastest_then_the_smallest_then_the_first(
    items: list[tuple[float, float, int, str]], latency: int, accuracy: int | None, size: int | None
) -> None:
    budget = Budget(latency_ms=latency, min_accuracy=accuracy, max_size_bytes=size)
    fitting = [
        one for one in items
        if one[0] <= latency and (accuracy is None or one[1] >= accuracy) and (size is None or one[2] <= size)
    ]  # fmt: skip
    found = candidates(items)
    assert found.within(budget) == fitting
    expected = sorted(fitting, key=lambda one: (-one[1], one[0], one[2], one[3]))
    assert found.best(budget) == (expected[0] if expected else None)
    nearest = found.nearest(budget)
    assert (nearest is None) == (not items)
    if fitting:
        assert nearest == expected[0]


@given(items=ITEMS)
def test_the_frontier_holds_what_no_other_is_at_least_as_fast_and_accurate_as(
    items: list[tuple[float, float, int, str]],
) -> None:
    found = candidates(items).frontier()
    points = {(ms, accuracy) for ms, accuracy, *_ in items}
    expected = {
        (ms, accuracy)
        for ms, accuracy in points
        if not any(a <= ms and b >= accuracy and (a, b) != (ms, accuracy) for a, b in points)
    }
    assert {(ms, accuracy) for ms, accuracy, *_ in found} == expected
    assert [one[0] for one in found] == sorted(one[0] for one in found)
    assert len(found) == len(expected)


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_an_unknown_latency_fits_no_budget_and_is_on_no_frontier(unknown: float) -> None:
    found = candidates([(unknown, 99.0, 1, "a"), (5.0, 1.0, 1, "b")])
    assert found.best(Budget(latency_ms=10)) == (5.0, 1.0, 1, "b")
    assert found.best(Budget(latency_ms=1)) is None
    assert found.nearest(Budget(latency_ms=1)) == (5.0, 1.0, 1, "b")
    assert found.frontier() == [(5.0, 1.0, 1, "b")]


def test_what_is_missed_is_relative_to_each_bound() -> None:
    budget = Budget(latency_ms=2, min_accuracy=80, max_size_bytes=100)
    assert budget.misses(2, 80, 100) == {}
    assert budget.misses(3, 60, 150) == {"latency": 0.5, "accuracy": 0.25, "size": 0.5}
    assert Budget(latency_ms=-1).misses(1, 0) == {"latency": math.inf}  # all of it was spent waiting


def test_a_budget_is_described_with_every_bound() -> None:
    budget = Budget(latency_ms=2, min_accuracy=80, max_size_bytes=100)
    assert budget.describe("p50", 1) == "within 2.00 ms (p50, batch 1), at least 80 % accurate, at most 100 B"

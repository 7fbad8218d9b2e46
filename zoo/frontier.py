"""The frontier of accuracy against cost, and the area under it. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

Item = TypeVar("Item")


def frontier(
    items: Iterable[Item], cost: Callable[[Item], float], accuracy: Callable[[Item], float]
) -> list[Item]:
    """The non-dominated items, from small to large: each costs more and is better than the one before.

    Of equal items the first stays.
    """
    kept: list[Item] = []
    for item in sorted(items, key=lambda one: (cost(one), -accuracy(one))):
        if not kept or accuracy(item) > accuracy(kept[-1]):
            kept.append(item)
    return kept


def area(points: Sequence[tuple[float, float]], smallest: tuple[float, float], largest: tuple[float, float]) -> float:
    """Area under the frontier as a step function, both axes scaled to the anchors' values.

    The KLAS paper's formula is not public. Ours: cost runs from the smallest anchor (0) to the
    largest (1), accuracy likewise; at each cost stands the best accuracy that cost can buy. 1 would be
    the largest anchor's accuracy at the smallest anchor's cost; routes better than the largest
    anchor can lift it above 1.

    Args:
        points: (cost, accuracy) of any routes; dominated ones change nothing.
        smallest, largest: (cost, accuracy) of the two anchors that span the range.

    Raises:
        ValueError: the anchors span no range of cost or accuracy.
    """
    low, high = smallest[0], largest[0]
    floor, span = smallest[1], largest[1] - smallest[1]
    if not (high > low and span > 0):
        raise ValueError(f"no range to scale to between {smallest} and {largest}")
    inside = [(c, a) for c, a in (*points, smallest, largest) if c <= high]
    steps = frontier(inside, lambda p: p[0], lambda p: p[1])
    edges = [(max(c, low), (a - floor) / span) for c, a in steps] + [(high, 0.0)]
    return sum(height * (after - before) / (high - low) for (before, height), (after, _) in pairwise(edges))


def above_the_line(
    points: Sequence[tuple[float, float]], small: tuple[float, float], large: tuple[float, float], buckets: int
) -> tuple[int, int]:
    """In how many cost buckets between two anchors a route beats the straight line between them.

    Returns:
        Buckets in which the best point lies above the line, and buckets that hold a point at all.
    """
    best: dict[int, float] = {}
    for cost, accuracy in points:
        share = (cost - small[0]) / (large[0] - small[0])
        if 0 < share < 1:
            margin = accuracy - (small[1] + share * (large[1] - small[1]))
            bucket = min(int(share * buckets), buckets - 1)
            best[bucket] = max(best.get(bucket, margin), margin)
    return sum(margin > 0 for margin in best.values()), len(best)

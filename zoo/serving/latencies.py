"""How long a batch is going to take: what was measured, between the measured sizes, as slow as the machine is now."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Collection, Mapping

_GAIN, _DEVIATION_GAIN, _DEVIATIONS = 1 / 8, 1 / 4, 2.0
"""How fast the slowdown and its spread follow (RFC 6298, section 2); how many spreads a deadline leaves room for."""
_MOST = 8.0  # one pause of the machine is no new speed of it


class LatencyModel:
    """Expected latencies of batches, milliseconds. Safe to use from many threads.

    What was measured is a property of an idle machine. How much slower calls are now is followed by a running mean
    and a running deviation of the ratio, as TCP follows round trips.
    """

    def __init__(self) -> None:
        self._known: Mapping[str, Mapping[int, float]] = {}
        self._asked: dict[tuple[str, int], float] = {}
        self._varying: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._slowdown, self._deviation = 1.0, 0.1

    def update(self, known: Mapping[str, Mapping[int, float]], varying: Collection[str] = ()) -> None:
        """Replaces what is known: by route and images in a batch, milliseconds.

        Args:
            varying: routes that may also take less, as cascades: they tell nothing of the machine's speed.
        """
        self._varying = frozenset(varying)
        self._known = {name: dict(sorted(sizes.items())) for name, sizes in known.items() if sizes}
        self._asked = {}

    def alone(self, route: str, images: int) -> float:
        """On an idle machine; 0 where nothing is known of the route.

        Between two measured sizes on the line through them; beyond the largest in proportion to it, which is an upper
        bound as long as larger batches do not take more for each image; below the smallest what that takes.
        """
        asked = self._asked
        found = asked.get((route, images))
        if found is None:
            found = asked[route, images] = self._interpolated(self._known.get(route, {}), images)
        return found

    def expected(self, route: str, images: int) -> float:
        """At the machine's present speed; as many calls take longer as not."""
        return self.alone(route, images) * self._slowdown

    def cautious(self, route: str, images: int) -> float:
        """At the machine's present speed; few calls take longer."""
        return self.alone(route, images) * (self._slowdown + _DEVIATIONS * self._deviation)

    def observe(self, route: str, images: int, took_ms: float) -> None:
        """Tells how long a batch took."""
        alone = self.alone(route, images)
        if not alone or route in self._varying:
            return
        ratio = min(took_ms / alone, _MOST)
        with self._lock:
            self._deviation += _DEVIATION_GAIN * (abs(ratio - self._slowdown) - self._deviation)
            self._slowdown += _GAIN * (ratio - self._slowdown)

    @property
    def slowdown(self) -> float:
        """How many times longer calls take now than when they were measured."""
        return self._slowdown

    @staticmethod
    def _interpolated(known: Mapping[int, float], images: int) -> float:
        sizes = list(known)
        if not sizes:
            return 0.0
        at = bisect_left(sizes, images)
        if at == len(sizes):
            return known[sizes[-1]] * images / sizes[-1]
        if at == 0 or sizes[at] == images:
            return known[sizes[at]]
        low, high = sizes[at - 1], sizes[at]
        return known[low] + (known[high] - known[low]) * (images - low) / (high - low)

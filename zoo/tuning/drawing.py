"""Which route a step of tuning takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from klas_zoo.routes import Route

_FAST, _SLOW = 0.2, 0.05  # shares of a new loss in two running means
_FLOOR = 0.25  # of the mean gain: the least that any route counts


class RouteDraw:
    """Draws routes at random: all alike, or in proportion to what each still gains.

    A route's gain is how far its recent losses lie below those before: the difference of a slow and a fast running
    mean. Until every route has a loss all are alike. The state is plain data.
    """

    def __init__(self, routes: Sequence[Route], sampling: Literal["uniform", "gain"], seed: int) -> None:
        self.routes, self.sampling = tuple(routes), sampling
        self._random = random.Random(seed)
        self._fast: dict[int, float] = {}
        self._slow: dict[int, float] = {}

    def next(self) -> Route:
        if self.sampling == "uniform" or len(self._fast) < len(self.routes):
            return self._random.choice(self.routes)
        return self._random.choices(self.routes, self.weights())[0]

    def weights(self) -> list[float]:
        """One for each route, above zero."""
        gains = [max(0.0, self._slow[index] - self._fast[index]) for index in range(len(self.routes))]
        mean = sum(gains) / len(gains)
        return [gain + _FLOOR * mean if mean > 0 else 1.0 for gain in gains]

    def learned(self, route: Route, loss: float) -> None:
        """Takes note of the loss of a step on a route."""
        index = self.routes.index(route)
        for means, share in ((self._fast, _FAST), (self._slow, _SLOW)):
            means[index] = loss if index not in means else (1 - share) * means[index] + share * loss

    def state(self) -> dict[str, Any]:
        version, numbers, gauss = self._random.getstate()
        return {"random": [version, list(numbers), gauss], "fast": dict(self._fast), "slow": dict(self._slow)}

    def restore(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
        self._fast, self._slow = dict(state["fast"]), dict(state["slow"])

"""Which cascades of a family are worth having: all pairs and triples of its routes.

Candidates are judged on held-out images alone. Kept are those that no cheaper candidate, static routes among them, is
as accurate as: by mean cost, and by the cost of an image that every stage executes. Images are sorted once by the
confidence of a route; every threshold is then a place in that order, and what it is worth a difference of running sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.costs import Costs
from klas_zoo.cascades.definition import Cascade, Measure, Stage
from klas_zoo.cascades.fitting import (
    FittedCascade,
    SharedBlocks,
    images_needed,
    outcome,
    temperatures_of,
    threshold_at,
)
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.frontier import frontier
from klas_zoo.routes import Route

GRID = tuple(round(0.05 * step, 2) for step in range(1, 19))
"""Shares of images that go on, 5 to 90 %."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What is tried.

    Attributes:
        measure: of confidence.
        shares: of the images that reach a stage and go on, 0..1 each; triples use every other one.
        triples: also cascades of three stages.
        continuing: only cascades in which a stage continues from the one before.
        most: how many cascades are kept on each of the two frontiers; None: all.
    """

    measure: Measure = "probability"
    shares: Sequence[float] = GRID
    triples: bool = True
    continuing: bool = False
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Cascades worth having, cheapest first.

    Attributes:
        by_mean, by_worst: the frontiers over mean cost and over worst cost.
        tried: how many candidates there were.
    """

    by_mean: tuple[FittedCascade, ...]
    by_worst: tuple[FittedCascade, ...]
    temperatures: Mapping[Route, float]
    tried: int = 0

    @property
    def cascades(self) -> tuple[FittedCascade, ...]:
        """Of both frontiers, each once."""
        return tuple({one.cascade: one for one in (*self.by_mean, *self.by_worst)}.values())


def search(
    heldout: RouteOutputs, costs: Costs, shared: SharedBlocks, settings: SearchSettings | None = None
) -> Found:
    """The frontiers of cascades of routes.

    Args:
        shared: how many blocks a stage may share with the one before.

    Raises:
        DataError: there are too few held-out images to fit a threshold; says how many are needed.
    """
    settings = settings or SearchSettings()
    temperatures = temperatures_of(heldout)
    searcher = _Searcher(heldout, costs, shared, settings, temperatures)
    candidates = [*searcher.pairs(), *(searcher.triples() if settings.triples else ())]
    if settings.continuing:
        candidates = [one for one in candidates if any(one.shared)]
    statics = [
        _Candidate(costs.routes[route], costs.routes[route], heldout.top1(route), (route,), (0,), ())
        for route in heldout.logits
    ]

    def best(cost: Callable[[_Candidate], float]) -> tuple[FittedCascade, ...]:
        # of equals the first stays: a static route is simpler
        kept = frontier([*statics, *candidates], cost, lambda one: one.top1)
        return tuple(searcher.fitted(one) for one in _thinned([k for k in kept if k.thresholds], settings.most))

    return Found(
        by_mean=best(lambda one: one.mean), by_worst=best(lambda one: one.worst), temperatures=temperatures,
        tried=len(candidates),
    )  # fmt: skip


class _Candidate(NamedTuple):
    mean: float
    worst: float
    top1: float
    routes: tuple[Route, ...]
    shared: tuple[int, ...]
    thresholds: tuple[float, ...]


class _Searcher:
    def __init__(
        self, heldout: RouteOutputs, costs: Costs, shared: SharedBlocks, settings: SearchSettings,
        temperatures: Mapping[Route, float],
    ) -> None:  # fmt: skip
        self._heldout, self._costs, self._shared, self._settings = heldout, costs, shared, settings
        self._temperatures = temperatures
        self._routes = sorted(heldout.logits, key=lambda route: costs.routes[route])
        self._right = {r: (heldout.logits[r].argmax(1) == heldout.labels).astype(np.int64) for r in self._routes}
        self._sure = {
            r: confidence(heldout.logits[r], settings.measure, temperatures[r]) for r in self._routes
        }

    def pairs(self) -> Iterator[_Candidate]:
        for first in self._routes:
            order, cuts = self._cuts(first, np.arange(len(self._heldout)), self._settings.shares)
            for second, shared in self._after(first, 0):
                yield from self._candidates((first, second), (0, shared), order, cuts, (), len(order), 0, 0.0)

    def triples(self) -> Iterator[_Candidate]:
        shares, needed = self._settings.shares[1::2], images_needed()
        count = len(self._heldout)
        for first in self._routes:
            order, cuts = self._cuts(first, np.arange(count), shares)
            for threshold, below in cuts:
                if below < needed:
                    continue
                kept_right = int(self._right[first][order[below:]].sum())
                spent = self._costs.routes[first] * count
                for second, shared in self._after(first, 0):
                    inner, inner_cuts = self._cuts(second, order[:below], shares)
                    for third, third_shared in self._after(second, shared):
                        yield from self._candidates(
                            (first, second, third), (0, shared, third_shared), inner, inner_cuts, (threshold,), below,
                            kept_right, spent,
                        )  # fmt: skip

    def fitted(self, one: _Candidate) -> FittedCascade:
        """A candidate as a cascade, and what became of the held-out images."""
        stages = tuple(
            Stage(route=route, threshold=threshold, temperature=self._temperatures[route], shared=shared)
            for route, shared, threshold in zip(one.routes, one.shared, (*one.thresholds, None), strict=True)
        )
        cascade = Cascade(stages=stages, measure=self._settings.measure)
        return FittedCascade(
            cascade=cascade, cost=self._costs.of(cascade), heldout=outcome(cascade, self._heldout)
        )

    def _candidates(
        self, routes: tuple[Route, ...], shared: tuple[int, ...], order: np.ndarray,
        cuts: Sequence[tuple[float, int]], thresholds: tuple[float, ...], reached: int, right: int, spent: float,
    ) -> Iterator[_Candidate]:  # fmt: skip
        """A last stage behind the images of `order`, which reach the stage before it, at every cut.

        Args:
            reached: how many images that are.
            right: answers of the stages before that stage, of all images.
            spent: cost of all images in those stages.
        """
        before, last = self._right[routes[-2]][order], self._right[routes[-1]][order]
        gained = np.concatenate([[0], np.cumsum(last - before)]) + int(before.sum()) + right
        count = len(self._heldout)
        step, end = (self._costs.behind(routes[k], shared[k]) for k in (-2, -1))
        worst = sum(self._costs.behind(route, blocks) for route, blocks in zip(routes, shared, strict=True))
        for threshold, below in cuts:
            if 0 < below < reached:
                mean = (spent + step * reached + end * below) / count
                top1 = 100 * float(gained[below]) / count
                yield _Candidate(mean, worst, top1, routes, shared, (*thresholds, threshold))

    def _cuts(
        self, route: Route, reaching: np.ndarray, shares: Sequence[float]
    ) -> tuple[np.ndarray, list[tuple[float, int]]]:
        """Images by confidence, the least first; each threshold, and how many of them are below it."""
        order = reaching[np.argsort(self._sure[route][reaching], kind="stable")]
        sure = self._sure[route][order]
        thresholds = dict.fromkeys(threshold_at(sure, share) for share in shares)
        return order, [(one, int(np.searchsorted(sure, one, side="left"))) for one in thresholds]

    def _after(self, before: Route, shared: int) -> Iterator[tuple[Route, int]]:
        """Larger routes, and how many blocks each may share with the stage before, which itself shares `shared`."""
        for route in self._routes:
            if self._costs.routes[route] > self._costs.routes[before]:
                blocks = self._shared(before, route)
                yield route, blocks if blocks >= shared else 0


def _thinned(kept: list[_Candidate], most: int | None) -> list[_Candidate]:
    """At most so many, evenly spread over the frontier, with both ends."""
    if most is None or len(kept) <= most:
        return kept
    if most == 1:
        return kept[-1:]
    return [kept[round(number * (len(kept) - 1) / (most - 1))] for number in range(most)]

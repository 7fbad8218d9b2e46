"""How long a session's routes and cascades take here, and which is the best within a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from klas_zoo.budget import Budget, Candidates
from klas_zoo.cascades.records import CascadeFacts
from klas_zoo.errors import NothingFits, UsageError
from klas_zoo.exporters.cascade_runner import CascadeRunner
from klas_zoo.exporters.manifest import PackagedRoute
from klas_zoo.exporters.packaged_cascades import PackagedCascade
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.profile import Statistics
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.runtime.controller import Rung
from klas_zoo.runtimes import CPU_PROVIDER, Session, parse_options
from klas_zoo.units import format_latency

UNPACKED = {"session.disable_prepacking": "1"}
"""The option of sessions that read weights from the mapped file instead of packing them."""


class Choices:
    """The routes and cascades of a session, with their latencies under its conditions.

    A package's latencies count where they were measured on such hardware with these threads, weights packed or not:
    that difference is small, and what a session measures itself replaces them.

    Args:
        sessions: of the routes, by name.
        threads: that the session was opened with.
    """

    def __init__(
        self, routes: Iterable[PackagedRoute], sessions: Mapping[str, Session], *, provider: str, threads: int
    ) -> None:
        self.routes, self._provider, self._threads = tuple(routes), provider, threads
        timed = any(latency.provider == provider for one in self.routes for latency in one.latencies)
        # only then: finding out about a GPU takes seconds
        self._hardware = resolve_device("cpu" if provider == CPU_PROVIDER else "cuda").hardware if timed else ""
        self._latencies = {
            route.name: {
                one.batch: {"p50": one.p50_ms, "p90": one.p90_ms, "p99": one.p99_ms}
                for one in route.latencies
                if self._is_here(one, sessions[route.name])
            }
            for route in self.routes
        }
        self._facts: dict[str, CascadeFacts] = {}
        self._paths: dict[str, dict[int, tuple[float, ...]]] = {}  # by cascade and batch size, medians in ms

    @property
    def cascades(self) -> tuple[str, ...]:
        """Names of the cascades that may be chosen."""
        return tuple(self._facts)

    def add_cascade(self, name: str, carried: PackagedCascade, runner: CascadeRunner) -> None:
        """A cascade that a package carries, judged on the images of its routes."""
        self._facts[name] = carried.facts
        self._paths[name] = {one.batch: one.paths_ms for one in carried.latencies if self._is_here(one, runner)}

    def note(self, route: str, batch: int, seen: Statistics) -> None:
        """What was measured of a route replaces what was known."""
        self._latencies[route][batch] = {"p50": seen.p50_ms, "p90": seen.p90_ms, "p99": seen.p99_ms}

    def note_paths(self, cascade: str, batch: int, paths_ms: tuple[float, ...]) -> None:
        """Median milliseconds of each path of a cascade replace what was known."""
        self._paths[cascade][batch] = paths_ms

    def latencies(self, *, batch: int, percentile: str) -> dict[str, float]:
        """Milliseconds for a batch of each route that was measured so.

        Raises:
            UsageError: none was.
        """
        known = {name: found[batch][percentile] for name, found in self._latencies.items() if batch in found}
        if not known:
            raise UsageError(
                f"No latency of a batch of {batch} on this machine with threads={self._threads} is known: call "
                f"calibrate(batch={batch}) first."
            )
        return known

    def paths(self, cascade: str, *, batch: int) -> tuple[float, ...]:
        """Median milliseconds of each path of a cascade; empty where they are not known."""
        return self._paths.get(cascade, {}).get(batch, ())

    def best(self, latency_ms: float, *, batch: int, percentile: str) -> str:
        """The most accurate of all whose latency fits, of a cascade that of its longest path.

        Raises:
            UsageError: no latency at this batch size is known.
            NothingFits: none is within the budget.
        """
        return _within(self._candidates(batch, percentile, cascades=True), latency_ms, f"{_images(batch)} within")

    def best_by_mean(self, mean_ms: float, *, batch: int) -> str:
        """The most accurate of all whose mean latency over images fits.

        Raises:
            UsageError: no latency at this batch size is known.
            NothingFits: none is within the limit.
        """
        candidates = self._candidates(batch, "p50", cascades=True, mean=True)
        return _within(candidates, mean_ms, f"{_images(batch)} in a mean of")

    def ladder(self, *, batch: int, cascades: bool) -> tuple[Rung, ...]:
        """Those that none faster is as accurate as, from fast to slow, with their milliseconds for a batch.

        Raises:
            UsageError: no latency at this batch size is known.
        """
        candidates = self._candidates(batch, "p50", cascades=cascades)
        return tuple((one.name, candidates.latency_ms(one)) for one in candidates.frontier())

    def _candidates(
        self, batch: int, percentile: str, *, cascades: bool, mean: bool = False
    ) -> Candidates[_Choice]:
        known = self.latencies(batch=batch, percentile=percentile)
        items = [_Choice(one.name, known.get(one.name, np.inf), accuracy_of(one)) for one in self.routes]
        for name, facts in self._facts.items() if cascades else ():
            paths = self.paths(name, batch=batch)
            if paths:
                shares = facts.heldout.shares
                mixed = sum(ms * share for ms, share in zip(paths, shares, strict=True)) if mean else paths[-1]
                items.append(_Choice(name, mixed, facts.test.top1))
        return Candidates(
            items=items, latency_ms=lambda one: one.latency_ms, accuracy=lambda one: one.accuracy,
            name=lambda one: one.name,
        )  # fmt: skip

    def _is_here(self, latency: LatencyRecord, session: Session | CascadeRunner) -> bool:
        """Whether it was measured under the conditions of a session."""
        return (
            (latency.provider, latency.hardware, latency.clock) == (self._provider, self._hardware, "host")
            and latency.threads in (session.threads, self._threads)  # GPU records have either 0 or those of the host
            and _without_packing(latency.options) == _without_packing(session.options)
        )


def accuracy_of(route: PackagedRoute) -> float:
    """What makes a route better than another: top-1, or work where none of them is trained."""
    return float(route.macs) if route.top1 is None else route.top1


@dataclass(frozen=True)
class _Choice:
    """A route or a cascade with what a choice is made by."""

    name: str
    latency_ms: float
    accuracy: float


def _within(candidates: Candidates[_Choice], limit_ms: float, what: str) -> str:
    budget = Budget(latency_ms=limit_ms)
    best = candidates.best(budget)
    if best is None:
        nearest = candidates.nearest(budget)
        assert nearest is not None  # a session has a route
        raise NothingFits(
            f"No route answers {what} {format_latency(limit_ms)}: the nearest, {nearest.name}, takes "
            f"{format_latency(nearest.latency_ms)}."
        )
    return best.name


def _images(batch: int) -> str:
    return f"{batch} image{'s' if batch > 1 else ''}"


def _without_packing(options: str) -> dict[str, str]:
    return {key: value for key, value in parse_options(options).items() if key not in UNPACKED}

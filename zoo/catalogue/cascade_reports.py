"""What is told of fitted cascades and of the routes beside them, and the best of them within limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from klas_zoo.budget import Budget, Candidates
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.records import Interval, Outcome
from klas_zoo.errors import NothingFits, UnknownName, UsageError
from klas_zoo.units import format_latency

PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, kw_only=True)
class CascadeReport:
    """A cascade, or a static route beside it, on images that decided nothing.

    Attributes:
        cascade: None for a static route.
        expected: intervals of the shares that go on, from the images that thresholds were fitted on; what
            `ElasticSession.add_cascade` takes.
        latency: one image at a time, by the shares of the images that thresholds were fitted on.
        calibration_before, calibration_after: expected calibration error of the first stage, 0..1, without and with its
            temperature; None for a static route.
        mean_macs, worst_macs: multiply-adds for one image.
    """

    name: str
    cascade: Cascade | None
    test: Outcome
    expected: tuple[Interval, ...]
    latency: MixedLatency
    mean_macs: float
    worst_macs: float
    calibration_before: float | None = None
    calibration_after: float | None = None

    def to_json(self) -> dict[str, Any]:
        cascade = None if self.cascade is None else self.cascade.to_json()
        return {**asdict(self), "cascade": cascade}

    def lines(self) -> list[str]:
        """For people: what it is worth, how often it goes on, and what it costs."""
        low, high = self.test.top1_interval
        found = [f"{self.name}: top-1 {self.test.top1:.2f} % ({low:.2f} to {high:.2f})"]
        if self.cascade is not None:
            shares = ", ".join(f"{100 * one:.1f} %" for one in self.test.escalated)
            found.append(f"  goes on  {shares} of the images; worst case {format_latency(self.latency.worst_ms)}")
        times = (("mean", self.latency.mean_ms), *((p, getattr(self.latency, f"{p}_ms")) for p in PERCENTILES))
        found.append("  latency  " + ", ".join(f"{name} {format_latency(value)}" for name, value in times))
        return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds in milliseconds, each included; None: unbounded.

    Attributes:
        latency_ms: of a percentile over images.
        mean_ms: of the mean over images.
        worst_ms: of the longest path's 99th percentile.
    """

    latency_ms: float | None = None
    percentile: str = "p50"
    mean_ms: float | None = None
    worst_ms: float | None = None

    def __post_init__(self) -> None:
        if self.percentile not in PERCENTILES:
            raise UnknownName("percentile", self.percentile, PERCENTILES)
        for _, bound in self._bounds:
            if not 0 < bound < math.inf:
                raise UsageError(f"A latency of {bound:g} ms is no limit: it has to be finite and above zero.")

    def __bool__(self) -> bool:
        return bool(self._bounds)

    @property
    def _bounds(self) -> list[tuple[str, float]]:
        named = ((f"{self.percentile}_ms", self.latency_ms), ("mean_ms", self.mean_ms), ("worst_ms", self.worst_ms))
        return [(name, bound) for name, bound in named if bound is not None]

    def best(self, reports: Sequence[CascadeReport]) -> CascadeReport:
        """The most accurate within every limit.

        Raises:
            NothingFits: there is none; names the nearest and what it takes.
        """
        if not self._bounds:
            return max(reports, key=lambda one: one.test.top1)
        (first, latency_ms), *others = self._bounds
        candidates = Candidates(
            items=reports, accuracy=lambda one: one.test.top1, name=lambda one: one.name,
            latency_ms=lambda one: cast(float, getattr(one.latency, first)),
            also=lambda one, name: cast(float, getattr(one.latency, name)),
        )  # fmt: skip
        budget = Budget(latency_ms=latency_ms, also=dict(others))
        best = candidates.best(budget)
        if best is not None:
            return best
        nearest = candidates.nearest(budget)
        if nearest is None:
            raise NothingFits("There is no route to choose from.")
        asked = ", ".join(f"{_named(name)} {format_latency(bound)}" for name, bound in self._bounds)
        takes = ", ".join(
            f"{_named(name)} {format_latency(getattr(nearest.latency, name))}" for name, _ in self._bounds
        )
        raise NothingFits(f"No route or cascade is within {asked}: the nearest, {nearest.name}, takes {takes}.")


def _named(name: str) -> str:
    return name.removesuffix("_ms")

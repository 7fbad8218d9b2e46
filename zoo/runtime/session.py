"""A whole family in one process: weights in memory once, the route chosen call by call.

Every route has a session of its own, open from the start, so that switching costs a look into a
dictionary. What sessions cost is memory: onnxruntime packs the weights of every matrix product anew for
each session, unless it is told not to; then all sessions read the one mapped weights file, a little
slower. Both ends are there, and what lies between: `packed` names the routes that get packed weights.
docs/packages.md has what was measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime

from klas_zoo.errors import NothingFits, PackageError, UnknownName, UsageError, VerificationError
from klas_zoo.exporters.manifest import PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.frontier import frontier
from klas_zoo.profiles.devices import CPU_PROVIDER, first_line, open_session, physical_cores
from klas_zoo.runtime.controller import Controller, ControllerCounters, ControllerSettings
from klas_zoo.units import format_latency

__all__ = ["Controller", "ControllerCounters", "ControllerSettings", "Counters", "ElasticSession"]

_SHARED = {
    "session.disable_prepacking": "1",
    # the threads of a session that has answered would spin where the next one computes
    "session.force_spinning_stop": "1",
}
_PACKED = {"session.force_spinning_stop": "1"}


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a session did so far.

    Attributes:
        calls: by the route's name.
        switches: calls that took another route than the one before.
        over_budget: calls with `latency_ms` that took longer.
        images: how many were answered.
    """

    calls: Mapping[str, int]
    switches: int
    over_budget: int
    images: int


class ElasticSession:
    """All routes of a package, open at once. Safe to use from many threads.

    Args:
        package: a package of ONNX graphs, or its folder, which is then checked.
        provider: onnxruntime's execution provider.
        threads: that compute one operator; None: one for each physical core.
        routes: names of the routes to open. Default: all that were verified.
        packed: names of the routes whose weights are packed: faster, and in memory once more each.
            `all` or `none` of them are the two ends.

    Raises:
        PackageError: the package is damaged, or has no graphs.
        UnknownName: it has no such route.
        ExportError: onnxruntime cannot load a graph.
    """

    def __init__(
        self,
        package: Package | Path | str,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        routes: Iterable[str] | None = None,
        packed: Collection[str] | Literal["all", "none"] = "none",
    ) -> None:
        self.package = package if isinstance(package, Package) else Package.open(package)
        if self.package.manifest.format != "onnx":
            raise PackageError(
                f"{self.package.folder} is a package of format {self.package.manifest.format}: an elastic session runs "
                "ONNX graphs, so export with --format onnx."
            )
        self.provider, self.threads = provider, threads or physical_cores()
        chosen = self._chosen(routes)
        names = [one.name for one in chosen]
        self.packed = frozenset({"all": names, "none": []}[packed] if isinstance(packed, str) else packed)
        for name in self.packed:
            if name not in names:
                raise UnknownName("route", name, names)
        self._sessions = {one.name: self._open(one) for one in chosen}
        self._routes = {one.name: one for one in chosen}
        self._input = next(iter(self._sessions.values())).get_inputs()[0].name
        self._latencies = {one.name: self._known(one) for one in chosen}
        self._lock = threading.Lock()
        self._calls = dict.fromkeys(names, 0)
        self._switches = self._over = self._images = 0
        self._last = ""

    @property
    def routes(self) -> tuple[PackagedRoute, ...]:
        """Those that are open, cheapest first."""
        return tuple(self._routes.values())

    def run(
        self,
        images: np.ndarray,
        *,
        latency_ms: float | None = None,
        route: str | None = None,
        controller: Controller | None = None,
        waited_ms: float = 0.0,
    ) -> np.ndarray:
        """Images (B, C, H, W), float32 → logits (B, classes), on the route that was asked for.

        Args:
            latency_ms: take the most accurate route whose known latency at this batch size fits.
            route: take this one.
            controller: take the one that this chooses, and tell it how long the call took.
            waited_ms: how long the call has waited so far; it counts.

        Raises:
            UsageError: not exactly one of the three, images of another shape, or no latency is known.
            UnknownName: no such route is open.
            NothingFits: no route is within the budget; the message names the nearest.
            VerificationError: onnxruntime failed.
        """
        images = self._checked(images)
        if sum(one is not None for one in (latency_ms, route, controller)) != 1:
            raise UsageError("Say one of latency_ms, route and controller.")
        name = self._name(route, latency_ms, controller, waited_ms, len(images))
        started = time.perf_counter()
        logits = self._answer(name, images)
        took_ms = waited_ms + 1e3 * (time.perf_counter() - started)
        with self._lock:
            self._calls[name] += 1
            self._switches += name != self._last and self._last != ""
            self._last = name
            self._images += len(images)
            self._over += latency_ms is not None and took_ms > latency_ms
        if controller is not None:
            controller.observe(name, took_ms)
        return logits

    def best(self, latency_ms: float, *, batch: int = 1, percentile: str = "p50") -> str:
        """The most accurate route within a budget; of networks that nobody trained, the one of most work.

        Raises:
            UsageError: no latency at this batch size is known.
            NothingFits: no route is within the budget.
        """
        known = self.latencies(batch=batch, percentile=percentile)
        fitting = [one for one in self.routes if known.get(one.name, np.inf) <= latency_ms]
        if not fitting:
            nearest = min(known, key=lambda name: known[name])
            raise NothingFits(
                f"No route answers {batch} image{'s' if batch > 1 else ''} within {format_latency(latency_ms)}: the "
                f"nearest, {nearest}, takes {format_latency(known[nearest])}."
            )
        return max(fitting, key=_accuracy).name

    def latencies(self, *, batch: int = 1, percentile: str = "p50") -> dict[str, float]:
        """Milliseconds for a batch of each route that was measured so, with these threads on such hardware.

        Raises:
            UsageError: none was.
        """
        known = {name: found[batch][percentile] for name, found in self._latencies.items() if batch in found}
        if not known:
            raise UsageError(
                f"No latency of a batch of {batch} on this machine with threads={self.threads} is known: call "
                f"calibrate(batch={batch}) first."
            )
        return known

    def calibrate(self, *, batch: int = 1, runs: int = 30) -> dict[str, float]:
        """Measures every open route here and now, in turns; its medians in ms replace what was known."""
        images = np.random.default_rng(0).standard_normal((batch, *self._shape), dtype=np.float32)
        taken: dict[str, list[float]] = {name: [] for name in self._sessions}
        for turn in range(runs + 2):
            for name in self._sessions:
                started = time.perf_counter()
                self._answer(name, images)
                if turn >= 2:  # the first ones page weights in
                    taken[name].append(1e3 * (time.perf_counter() - started))
        for name, found in taken.items():
            p50, p90, p99 = np.percentile(found, (50, 90, 99)).tolist()
            self._latencies[name][batch] = {"p50": p50, "p90": p90, "p99": p99}
        return self.latencies(batch=batch)

    def controller(
        self, target_ms: float, *, batch: int = 1, settings: ControllerSettings | None = None
    ) -> Controller:
        """One that keeps the tail latency of calls below a target, over the frontier of accuracy and latency.

        Raises:
            UsageError: no latency at this batch size is known.
        """
        known = self.latencies(batch=batch)
        timed = [one for one in self.routes if one.name in known]
        best = frontier(timed, lambda one: known[one.name], _accuracy)
        return Controller([(one.name, known[one.name]) for one in best], target_ms, settings)

    def counters(self) -> Counters:
        with self._lock:
            return Counters(
                calls=dict(self._calls), switches=self._switches, over_budget=self._over, images=self._images
            )

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.package.manifest.family.input_shape

    def _chosen(self, names: Iterable[str] | None) -> list[PackagedRoute]:
        if names is None:
            chosen = [one for one in self.package.routes if one.verification is not None]
        else:
            wanted = {self.package.route(name).name for name in names}
            chosen = [one for one in self.package.routes if one.name in wanted]
        if not chosen:
            raise PackageError(f"No route of {self.package.folder} was verified: none is opened unless it is named.")
        return chosen

    def _open(self, route: PackagedRoute) -> onnxruntime.InferenceSession:
        config = _PACKED if route.name in self.packed else _SHARED
        return open_session(self.package.engine(route), self.provider, self.threads, config)

    def _known(self, route: PackagedRoute) -> dict[int, dict[str, float]]:
        """By batch size and percentile, what the package knows of this provider, these threads, such hardware."""
        from klas_zoo.profiles.devices import resolve_device

        here = resolve_device("cpu").hardware if self.provider == CPU_PROVIDER else None
        return {
            one.batch: {"p50": one.p50_ms, "p90": one.p90_ms, "p99": one.p99_ms}
            for one in route.latencies
            if (one.provider, one.threads) == (self.provider, self.threads)
            and (here is None or one.hardware == here)
        }

    def _name(
        self, route: str | None, latency_ms: float | None, controller: Controller | None, waited_ms: float, batch: int
    ) -> str:
        if latency_ms is not None:
            return self.best(latency_ms - waited_ms, batch=batch)
        name = controller.route if controller is not None else str(route)
        if name not in self._sessions:
            raise UnknownName("route", name, self._sessions)
        return name

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[1:] != self._shape or not len(images):
            raise UsageError(f"Images are (B, {', '.join(map(str, self._shape))}), B from 1 on, not {images.shape}.")
        return np.ascontiguousarray(images, dtype=np.float32)

    def _answer(self, name: str, images: np.ndarray) -> np.ndarray:
        try:
            found: np.ndarray = self._sessions[name].run(None, {self._input: images})[0]
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            raise VerificationError(f"onnxruntime cannot run the route {name}: {first_line(error)}.") from error
        return found


def _accuracy(route: PackagedRoute) -> float:
    """What makes a route better than another: top-1, or work where nobody trained any of them."""
    return float(route.macs) if route.top1 is None else route.top1

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
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import ExportError, PackageError, UnknownName, UsageError, VerificationError
from klas_zoo.exporters.cascade_fitting import PathRunner
from klas_zoo.exporters.cascade_runner import CascadeCounters, CascadeRunner, Interval
from klas_zoo.exporters.held_files import HeldPackage
from klas_zoo.exporters.manifest import PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import read_cascades
from klas_zoo.hardware import physical_cores
from klas_zoo.memory import return_freed
from klas_zoo.profiles.runners import SessionRunner, images_of
from klas_zoo.profiles.timing import Method, Runner, statistics_of, time_in_turn
from klas_zoo.runtime.choosing import UNPACKED, Choices, accuracy_of
from klas_zoo.runtime.controller import Controller, ControllerCounters, ControllerSettings, Rung
from klas_zoo.runtimes import CPU_PROVIDER, Session, open_engine
from klas_zoo.runtimes.ort import WEIGHTS_FOLDER

__all__ = ["Controller", "ControllerCounters", "ControllerSettings", "Counters", "ElasticSession"]


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a session did so far.

    Attributes:
        calls: by the route's name.
        switches: calls that took another route than the one before.
        over_budget: calls with `latency_ms` that took longer.
        images: how many were answered.
        cascades: by name, what each cascade did.
    """

    calls: Mapping[str, int]
    switches: int
    over_budget: int
    images: int
    cascades: Mapping[str, CascadeCounters] = field(default_factory=dict)


class ElasticSession:
    """All routes of a package, open at once. Safe to use from many threads.

    Args:
        package: a package of ONNX graphs, or its folder. Its files are checked when they are opened, also where a
            `Package` was opened before.
        provider: onnxruntime's execution provider.
        threads: that compute one operator; None: one for each physical core.
        routes: names of the routes to open. Default: all that were verified.
        packed: names of the routes whose weights are packed: faster, and in memory once more each.
            `all` or `none` of them are the two ends.
        spinning: whether idle threads poll for work, see `klas_zoo.runtimes.open_engine`; False saves processor time
            in a service that is called a few times a second, for slightly slower calls.

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
        spinning: bool | None = None,
    ) -> None:
        self.package = package if isinstance(package, Package) else Package.open(package, content=False)
        if self.package.manifest.format != "onnx":
            raise PackageError(
                f"{self.package.folder} is a package of format {self.package.manifest.format}: an elastic session runs "
                "ONNX graphs, so export with --format onnx."
            )
        self.provider, self.threads, self.spinning = provider, threads or physical_cores(), spinning
        chosen = self._chosen(routes)
        names = [one.name for one in chosen]
        self.packed = frozenset({"all": names, "none": []}[packed] if isinstance(packed, str) else packed)
        for name in self.packed:
            if name not in names:
                raise UnknownName("route", name, names)
        self._files = HeldPackage(self.package)
        self._sessions: dict[str, Session] = {one.name: self._open(one) for one in chosen}
        self._files.check_opened()
        self._choices = Choices(chosen, self._sessions, provider=provider, threads=self.threads)
        self._cascades: dict[str, CascadeRunner] = {}
        self._lock = threading.Lock()
        self._calls = dict.fromkeys(names, 0)
        self._switches = self._over = self._images = 0
        self._last = ""

    @property
    def routes(self) -> tuple[PackagedRoute, ...]:
        """Those that are open, smallest first."""
        return self._choices.routes

    @property
    def cascades(self) -> tuple[str, ...]:
        """Names of the cascades that were added."""
        return tuple(self._cascades)

    def add_cascade(
        self, cascade: Cascade | str, *, name: str | None = None, expected: Sequence[Interval] | None = None
    ) -> str:
        """Opens a cascade of routes of this package; `run(images, route=name)` executes it.

        Stages that continue are cut out of the package's own engines, see `klas_zoo.exporters.cascade_graphs`.

        Args:
            cascade: or its name, such as `small ?p<0.83 -> small.1-4+base.5-8`.
            name: to run it by. Default: its own.
            expected: intervals of the shares that go on behind each stage but the last; see
                `klas_zoo.exporters.cascade_runner.CascadeRunner`.

        Returns:
            The name.

        Raises:
            UsageError: it is no cascade, or the name is taken.
            UnknownName: the package has no such route.
            ExportError: a stage shall continue from one whose weights it does not share.
        """
        found = self._parsed(cascade) if isinstance(cascade, str) else cascade
        name = str(found) if name is None else name
        if name in self._sessions or name in self._cascades:
            raise UsageError(f"The name {name} is taken: run it by that name, or give the cascade another one.")
        engines = {str(route): self._files.graph(self.package.route(str(route))) for route in found.routes}
        runner = CascadeRunner(
            found, engines, self.package.folder, provider=self.provider, threads=self.threads,
            options={} if self.packed else UNPACKED, spinning=self.spinning, expected=expected,
        )  # fmt: skip
        self._files.check_opened()
        with self._lock:
            self._cascades[name] = runner
            self._calls[name] = 0
        return name

    def add_package_cascades(self) -> tuple[str, ...]:
        """Opens the cascades that the package carries, of routes that are open; returns their names.

        `run(images, mean_ms=…)` chooses among them too, and `latency_ms` where even an image that every stage executes
        is within the budget. Their top-1 has to be of the images that the routes' are of; others run by name only.

        Raises:
            ExportError: onnxruntime cannot load a stage.
        """
        carried = read_cascades(self.package)
        comparable = carried.data.get("fingerprint", "") == self.package.manifest.data.get("fingerprint", "")
        names = []
        for one in carried.cascades:
            if not {str(route) for route in one.cascade.routes} <= self._sessions.keys():
                continue
            name = self.add_cascade(one.cascade, expected=one.facts.heldout.escalated_intervals)
            names.append(name)
            if comparable:
                self._choices.add_cascade(name, one, self._cascades[name])
        return tuple(names)

    def run(
        self,
        images: np.ndarray,
        *,
        latency_ms: float | None = None,
        mean_ms: float | None = None,
        route: str | None = None,
        controller: Controller | None = None,
        waited_ms: float = 0.0,
    ) -> np.ndarray:
        """Images (B, C, H, W), float32 → logits (B, classes), on the route that was asked for.

        Args:
            latency_ms: take the most accurate route whose known latency at this batch size fits; of a cascade that of
                its longest path.
            mean_ms: take the most accurate route or cascade whose mean over images fits.
            route: take this one, a route or a cascade that was added.
            controller: take the one that this chooses, and tell it how long the call took.
            waited_ms: how long the call has waited so far; it counts.

        Raises:
            UsageError: not exactly one of the four, images of another shape, or no latency is known.
            UnknownName: no such route is open.
            NothingFits: no route is within the budget; the message names the nearest.
            VerificationError: onnxruntime failed.
            DamagedPackage: somebody has written to the weights file since it was opened.
        """
        images = self._checked(images)
        if sum(one is not None for one in (latency_ms, mean_ms, route, controller)) != 1:
            raise UsageError("Pass one of latency_ms, mean_ms, route and controller.")
        if mean_ms is not None:
            route = self.best_by_mean(mean_ms, batch=len(images))
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
        """The most accurate route within a budget; of untrained networks, the one of most work.

        Raises:
            UsageError: no latency at this batch size is known.
            NothingFits: no route is within the budget.
        """
        return self._choices.best(latency_ms, batch=batch, percentile=percentile)

    def best_by_mean(self, mean_ms: float, *, batch: int = 1) -> str:
        """The most accurate route or cascade whose mean latency over images is within a limit.

        Of a cascade that is the mean of its paths by the shares of held-out images; of a route its median.

        Raises:
            UsageError: no latency at this batch size is known.
            NothingFits: nothing is within the limit.
        """
        return self._choices.best_by_mean(mean_ms, batch=batch)

    def latencies(self, *, batch: int = 1, percentile: str = "p50") -> dict[str, float]:
        """Milliseconds for a batch of each route that was measured so, with these threads on such hardware.

        Raises:
            UsageError: none was.
        """
        return self._choices.latencies(batch=batch, percentile=percentile)

    def calibrate(
        self, *, batch: int = 1, runs: int = 30, routes: Collection[str] | None = None
    ) -> dict[str, float]:
        """Measures open routes and the package's cascades here and now, in turns; medians replace what was known.

        Args:
            routes: their names. Default: all.

        Returns:
            The medians of all routes, milliseconds.

        Raises:
            UnknownName: no such route is open.
        """
        images, carried = images_of(batch, self._shape), self._choices.cascades
        names = (*self._sessions, *carried) if routes is None else routes
        runners: dict[tuple[str, int], Runner] = {}
        for name in names:
            if name in carried:
                cascade = self._cascades[name]
                stages = range(1, len(cascade.cascade.stages) + 1)
                runners |= {(name, count): PathRunner(cascade, count, images) for count in stages}
            else:
                runners[name, 0] = SessionRunner(self._sessions[self._opened(name)], images)
        method = Method(warmup_ms=0, min_runs=runs, min_ms=0, rounds=min(runs, 10))
        found = {key: statistics_of(times.host_ms) for key, times in time_in_turn(runners, method).items()}
        for name, stages_done in found:
            if not stages_done:
                self._choices.note(name, batch, found[name, 0])
            else:
                paths = tuple(seen.p50_ms for (one, _), seen in found.items() if one == name)
                self._choices.note_paths(name, batch, paths)
        return self.latencies(batch=batch)

    def is_comparable(self, cascade: str) -> bool:
        """Whether `mean_ms` and `latency_ms` may choose it: one of the package, judged on the images of its routes."""
        return cascade in self._choices.cascades

    def cascade_counters(self, cascade: str) -> CascadeCounters:
        """What a cascade did so far."""
        return self._cascades[cascade].counters()

    def paths(self, cascade: str, *, batch: int = 1) -> tuple[float, ...]:
        """Median milliseconds of each path of a cascade of the package, all images of a batch taking it.

        Empty where they were not measured, or the cascade is not one of the package.
        """
        return self._choices.paths(cascade, batch=batch)

    def controller(
        self, target_ms: float, *, batch: int = 1, settings: ControllerSettings | None = None
    ) -> Controller:
        """One that keeps the tail latency of calls below a target, over the frontier of accuracy and latency.

        Raises:
            UsageError: no latency at this batch size is known.
        """
        return Controller(self.ladder(batch=batch), target_ms, settings)

    def ladder(self, *, batch: int = 1, cascades: bool = False) -> tuple[Rung, ...]:
        """The routes that no faster one is as accurate as, from fast to slow, with their milliseconds for a batch.

        Args:
            cascades: of the package too, by their longest path.

        Raises:
            UsageError: no latency at this batch size is known.
        """
        return self._choices.ladder(batch=batch, cascades=cascades)

    @property
    def most_accurate(self) -> str:
        """The name of the most accurate open route; of untrained networks, the one of most work."""
        return max(self.routes, key=accuracy_of).name

    def release_memory(self) -> None:
        """Returns to the system what large batches took; onnxruntime holds on to it otherwise.

        Costs a run of one image on every route and through every stage of each cascade. The next large batch takes the
        memory anew.

        Raises:
            ExportError: onnxruntime failed.
        """
        for session in self._sessions.values():
            session.release_memory()
        for cascade in self._cascades.values():
            cascade.release_memory()
        return_freed()

    def counters(self) -> Counters:
        with self._lock:
            return Counters(
                calls=dict(self._calls), switches=self._switches, over_budget=self._over, images=self._images,
                cascades={name: runner.counters() for name, runner in self._cascades.items()},
            )  # fmt: skip

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

    def _open(self, route: PackagedRoute) -> Session:
        options = {} if route.name in self.packed else UNPACKED
        try:
            return open_engine(
                self._files.graph(route), provider=self.provider, threads=self.threads,
                options={**options, WEIGHTS_FOLDER: str(self.package.folder.absolute())}, spinning=self.spinning,
            )  # fmt: skip
        except ExportError as error:  # which knows no file's name
            raise type(error)(f"{self.package.engine(route)}: {error}") from error

    def _name(
        self, route: str | None, latency_ms: float | None, controller: Controller | None, waited_ms: float, batch: int
    ) -> str:
        if latency_ms is not None:
            return self.best(latency_ms - waited_ms, batch=batch)
        if route in self._cascades:
            return route
        return self._opened(controller.route if controller is not None else str(route))

    def _opened(self, name: str) -> str:
        if name not in self._sessions:
            raise UnknownName("route", name, (*self._sessions, *self._cascades))
        return name

    def _parsed(self, text: str) -> Cascade:
        return Cascade.parse(text, lambda name: self.package.route(name).route)

    def _checked(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[1:] != self._shape or not len(images):
            raise UsageError(f"Images are (B, {', '.join(map(str, self._shape))}), B from 1 on, not {images.shape}.")
        return np.ascontiguousarray(images, dtype=np.float32)

    def _answer(self, name: str, images: np.ndarray) -> np.ndarray:
        try:
            cascade = self._cascades.get(name)
            found = cascade.run(images)[0] if cascade is not None else self._sessions[name].run(images)
        except ExportError as error:
            raise VerificationError(f"Cannot run the route {name}: {error}.") from error
        self._files.check()
        return found

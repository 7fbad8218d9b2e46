"""What every server does with a request: a decoded request in, logits and a route's name out.

A server hands over each request when it arrives and gets a future; the queue, merging, the choice of the route, limits
and counts are the same behind all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from klas_zoo.cascades.definition import CONTINUES
from klas_zoo.errors import KlasZooError, NothingFits, Overloaded, UnknownName, UsageError
from klas_zoo.exporters.cascade_runner import CascadeCounters
from klas_zoo.exporters.package import Package
from klas_zoo.runtime import ElasticSession
from klas_zoo.runtime.controller import Controller
from klas_zoo.serving.batching import Answer, Batcher, Work
from klas_zoo.serving.latencies import LatencyModel
from klas_zoo.serving.metrics import Metrics, NoMetrics
from klas_zoo.serving.scheduling import Job, Scheduler
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import INPUT as INPUT
from klas_zoo.serving.validation import OUTPUT as OUTPUT
from klas_zoo.serving.validation import ROUTE as ROUTE
from klas_zoo.serving.validation import Tensor, Wish, read_images, read_wish
from klas_zoo.units import format_latency

_RUNS = 5
"""Of a route at a batch size that the package knows no latency of."""


class RequestHandler:
    """A package that answers requests. Safe to use from many threads.

    Args:
        package: its folder, or what `Package.open` gave.
        metrics: where requests are counted.

    Raises:
        PackageError: the package is damaged, or has no graphs.
        ExportError: onnxruntime cannot load a graph.
    """

    def __init__(
        self, package: Package | Path | str, settings: ServingSettings | None = None, *, metrics: Metrics | None = None
    ) -> None:
        self.settings, self._metrics = settings or ServingSettings(), metrics or NoMetrics()
        self.session = ElasticSession(package, threads=self.settings.threads or None)
        self._cascades = self.session.add_package_cascades()
        self._names = {one.name for one in self.session.routes}
        self._counted: dict[str, CascadeCounters] = {}
        self._latencies = LatencyModel()
        self._controller: Controller | None = None
        self._learn()
        self._batcher = Batcher(
            self._run, lambda: self._scheduler,
            latencies=self._latencies, metrics=self._metrics, queue_images=self.settings.queue_images,
            ceiling=lambda: None if self._controller is None else self._controller.route,
            idle_work=self._calibration() if self.settings.calibrate else None,
            release_memory=self.session.release_memory,
        )  # fmt: skip
        self._batcher.start()

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.session.package.manifest.family.input_shape

    @property
    def classes(self) -> int:
        return self.session.package.manifest.family.num_classes

    @property
    def controller(self) -> Controller | None:
        """The one that keeps `target_ms`; None where none is set, or while latencies are being measured."""
        return self._controller

    @property
    def is_calibrated(self) -> bool:
        """Whether every latency that is measured between requests has been."""
        return self._batcher.is_idle

    @property
    def slowdown(self) -> float:
        """How many times longer engines take now than when they were measured."""
        return self._latencies.slowdown

    def submit(
        self, tensors: Sequence[Tensor], parameters: Mapping[str, object], *, arrived_s: float | None = None
    ) -> Future[Answer]:
        """Checks a request and queues it; the future may raise `Overloaded` too.

        Args:
            arrived_s: when it came, by `time.monotonic`; its budget counts from then. Default: now.

        Raises:
            UsageError: it is malformed, or names a route that is not there.
            NothingFits: no route is within its budget, even if it had not to wait.
            Overloaded: the queue is full.
        """
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        try:
            images = read_images(tensors, self.input_shape, self.settings.largest_batch)
            job = self._job(images, read_wish(parameters), arrived_s)
            self._batcher.submit(job)
        except KlasZooError as error:
            self._metrics.add("klas_zoo_refusals_total", reason=_reason(error))
            raise
        return job.payload.future

    def answer(self, tensors: Sequence[Tensor], parameters: Mapping[str, object]) -> Answer:
        """`submit`, and waits for the answer."""
        return self.submit(tensors, parameters).result()

    def close(self) -> None:
        """Answers what waits with `Overloaded` and ends the computing thread."""
        self._batcher.close()

    def _job(self, images: np.ndarray, wish: Wish, arrived_s: float) -> Job:
        route, budget_ms = wish.route, wish.latency_ms
        if wish.mean_ms is not None:
            route = self._by_mean(wish.mean_ms, len(images))
        if route is not None:
            route = route.replace("->", CONTINUES)
            if route not in self._names and route not in self._cascades:
                raise UnknownName("route", route, {*self._names, *self._cascades})
        silent = route is None and budget_ms is None
        steered = silent and self.settings.target_ms is not None
        if budget_ms is not None:
            self._refuse_the_impossible(budget_ms, len(images))
        elif steered:
            budget_ms = self.settings.target_ms
        elif silent:
            route = self.session.most_accurate
        return Job(
            images=len(images), route=route, arrived_s=arrived_s, steered=steered,
            deadline_s=math.inf if budget_ms is None else arrived_s + budget_ms / 1e3,
            payload=Work(images=images, on_answer=self._observe if steered else _ignore),
        )  # fmt: skip

    def _by_mean(self, mean_ms: float, images: int) -> str:
        """The most accurate route or cascade; of a batch between two measured sizes the larger one counts.

        Raises:
            NothingFits: none has such a mean.
        """
        sizes = [size for size in self._sizes() if size >= images and self._known(size)]
        if not sizes:  # until something is known
            return self.session.routes[0].name
        return self.session.best_by_mean(mean_ms, batch=sizes[0])

    def _run(self, images: np.ndarray, route: str) -> np.ndarray:
        logits = self.session.run(images, route=route)
        if route in self._cascades:
            self._count_exits(route)
        return logits

    def _count_exits(self, route: str) -> None:
        """What a cascade has done since it was last looked at; only the computing thread runs one."""
        now = self.session.cascade_counters(route)
        before = self._counted.get(route)
        self._counted[route] = now
        for number, (images, ms) in enumerate(zip(now.images, now.milliseconds, strict=True)):
            labels = {"route": route, "stage": str(number + 1)}
            more = images - (before.images[number] if before else 0)
            took_ms = ms - (before.milliseconds[number] if before else 0.0)
            if more:
                self._metrics.add("klas_zoo_cascade_images_total", more, **labels)
            if took_ms:
                self._metrics.observe("klas_zoo_cascade_stage_seconds", took_ms / 1e3, **labels)
            if number < len(now.recent):
                self._metrics.set("klas_zoo_cascade_escalated", now.recent[number], **labels)
                self._metrics.set("klas_zoo_cascade_drift", float(number in now.drifted), **labels)

    def _refuse_the_impossible(self, budget_ms: float, images: int) -> None:
        fastest = self._scheduler.ladder[0]
        least_ms = self._latencies.alone(fastest, images)
        if least_ms > budget_ms:
            raise NothingFits(
                f"No route answers {images} image{'s' if images > 1 else ''} within {format_latency(budget_ms)}: the "
                f"nearest, {fastest}, takes {format_latency(least_ms)}."
            )

    def _observe(self, answer: Answer) -> None:
        controller = self._controller
        if controller is not None and answer.route in dict(controller.ladder):
            controller.observe(answer.route, answer.took_ms)

    def _sizes(self) -> list[int]:
        """Batch sizes whose latencies are looked up or measured: powers of two, and the largest."""
        powers = [2**k for k in range(self.settings.largest_batch.bit_length())]
        return sorted({*powers, self.settings.largest_batch})

    def _known(self, batch: int) -> dict[str, float]:
        try:
            return self.session.latencies(batch=batch)
        except UsageError:  # none of this size
            return {}

    def _learn(self) -> None:
        """Takes over what the session knows of latencies."""
        known: dict[str, dict[int, float]] = {name: {} for name in (*self._names, *self._cascades)}
        for batch in self._sizes():
            for name, latency_ms in self._known(batch).items():
                known[name][batch] = latency_ms
            for name in self._cascades:
                if paths := self.session.paths(name, batch=batch):
                    known[name][batch] = paths[-1]  # a deadline holds for every image
        self._latencies.update(known, varying=self._cascades)
        alone = self._known(1)
        # until something is known, the smallest route answers whoever has a budget
        # a controller steers routes, whose calls all take equally long
        ladder = self.session.ladder(cascades=self.settings.target_ms is None) if alone else ()
        names = [name for name, _ in ladder] or [self.session.routes[0].name]
        self._scheduler = Scheduler(
            ladder=tuple(names), latencies=self._latencies, largest_batch=self.settings.largest_batch
        )
        if self.settings.target_ms is not None and self._controller is None and alone.keys() == self._names:
            self._controller = self.session.controller(self.settings.target_ms)

    def _calibration(self) -> Iterator[None]:
        """Measures what is not known, a route at a batch size in a step: all alone, then the ladder's in batches."""
        for batch in self._sizes():
            names = [one.name for one in self.session.routes] if batch == 1 else list(self._scheduler.ladder)
            known = self._known(batch)
            names += [name for name in self._cascades if name not in names and self.session.is_comparable(name)]
            known |= {name: 0.0 for name in self._cascades if self.session.paths(name, batch=batch)}
            for name in names:
                if name not in known:
                    self.session.calibrate(batch=batch, runs=_RUNS, routes=[name])
                    self._learn()
                    yield


def _ignore(answer: Answer) -> None:
    """Of requests that no controller looks after."""


def _reason(error: KlasZooError) -> str:
    if isinstance(error, NothingFits):
        return "nothing fits"
    return "overload" if isinstance(error, Overloaded) else "malformed"


def is_clients_fault(error: KlasZooError) -> bool:
    """Whether a request has to be changed before it can be answered (4xx), not the server or its load (5xx)."""
    return isinstance(error, (UsageError, NothingFits))


def names_of(route: str, batch: int) -> np.ndarray:
    """A route's name for every image, (B, 1) of bytes, as servers send text."""
    return np.full((batch, 1), route.encode(), dtype=object)

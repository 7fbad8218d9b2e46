"""The stages of a build, each announced to a listener and timed. What they do lies in modules of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from klas_zoo.anchors import Family
from klas_zoo.chains import Chain
from klas_zoo.costs import part_costs
from klas_zoo.data import Batch, Data, Split, batches
from klas_zoo.engines import EngineMaker, RouteResult, time_anchors
from klas_zoo.errors import ExportError
from klas_zoo.evaluation import evaluate
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.profiles.devices import Device
from klas_zoo.records import BuildRecord, NewEngine
from klas_zoo.registry import Registry
from klas_zoo.routes import Route, Seam
from klas_zoo.selection.candidates import Cost, SelectionSettings
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.measuring import Advance, Images, measure
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.selection.selectors import find_selector
from klas_zoo.streams import images_of
from klas_zoo.supernet import Supernet
from klas_zoo.tuning import TuningSettings, tune


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything that determines a build, besides the family, the images and the device.

    `batch` is the number of images per forward pass outside tuning, `latency_batches` the batch
    sizes each engine is timed at, `threads` those of onnxruntime (None: one for each physical core).
    """

    probes: ProbeSettings
    selection: SelectionSettings
    tuning: TuningSettings
    batch: int
    latency_batches: tuple[int, ...]
    threads: int | None
    workers: int
    seed: int


class Listener(Protocol):
    """Told about a build as it goes. `stage` gives a function that takes work done and a remark."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...
    def say(self, sentence: str) -> None: ...


class Stages:
    """The stages of one build, each announced to the listener and timed."""

    def __init__(self, settings: BuildSettings, device: Device, listener: Listener) -> None:
        self.settings, self.device, self.listener = settings, device, listener
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        started = time.perf_counter()
        with self.listener.stage(name, total, unit) as advance:
            yield advance
        self.seconds[name] = time.perf_counter() - started

    def _alone(self, registry: Registry) -> AbstractContextManager[None]:
        """Two builds that time engines at once would measure each other."""
        waiting = f"Another build is timing engines for {registry.root}; waiting for it."
        return registry.writing(lambda: self.listener.say(waiting))

    def _batches(self, split: Split, size: int | None = None, **options: Any) -> Iterator[Batch]:
        return batches(
            split,
            size or self.settings.batch,
            device=self.device.torch_device,
            workers=self.settings.workers,
            **options,
        )

    def _images(self, data: Data) -> Images:
        settings = self.settings
        return images_of(
            data, probing=settings.probes, batch=settings.batch, init_images=settings.tuning.init_images,
            seed=settings.seed, device=self.device.torch_device, workers=settings.workers,
        )  # fmt: skip

    def measure(self, chains: dict[str, Chain], data: Data, macs: Cost) -> Measurements:
        """What the selector asks for, besides latency."""
        settings = self.settings.selection
        return measure(
            chains,
            find_selector(settings.selector).asks_for(settings) - {"latency_ms"},
            self._images(data),
            macs,
            settings,
            probing=self.settings.probes,
            stage=self._stage,
            warn=self.listener.say,
        )

    def price(
        self, family: Family, macs: Cost, registry: Registry
    ) -> tuple[Cost, str, dict[str, float] | None]:
        """What the selector cuts buckets over, its unit, and the anchors' latencies where it is by them."""
        if find_selector(self.settings.selection.selector).cost == "macs":
            return macs, "multiply-adds", None
        with (
            self._alone(registry),
            self._stage("time anchors", len(family.chains), "engines") as advance,
        ):
            anchors_ms = time_anchors(
                family,
                self.device,
                batch=self.settings.latency_batches[0],
                threads=self.settings.threads,
                on_anchor=lambda name: advance(1, name),
            )
        cost = latency_cost(part_costs(family), anchors_ms, macs)
        stitchable_pairs(family.chains, cost, self.settings.selection, unit="ms")
        return cost, "ms", anchors_ms

    def initialise(self, supernet: Supernet, data: Data) -> dict[Seam, float]:
        images = self._images(data)
        with self._stage("initialise", images.fit_count, "images") as advance:
            return initialise_stitches(supernet, images.fit(), on_batch=lambda n: advance(n, ""))

    def evaluate(self, name: str, supernet: Supernet, data: Data) -> dict[Route, float]:
        with self._stage(name, len(data.test), "images") as advance:
            return evaluate(
                supernet, supernet.routes, self._batches(data.test), on_batch=lambda n: advance(n, "")
            )

    def tune(self, supernet: Supernet, data: Data) -> None:
        tuning = self.settings.tuning
        steps = tuning.total_steps(len(data.train))
        with self._stage("tune", steps * tuning.batch, "images") as advance:
            endless = self._batches(
                data.augmented, tuning.batch, shuffle_seed=self.settings.seed, forever=True
            )
            tune(
                supernet, endless, steps, tuning, on_step=lambda p: advance(p.images, f"loss {p.loss:.3f}")
            )

    def make_engines(
        self,
        supernet: Supernet,
        family: Family,
        data: Data,
        results: list[RouteResult],
        folder: Path,
        registry: Registry,
    ) -> list[tuple[RouteResult, Path | None]]:
        """Engines of the frontier and of the anchors, verified first, then timed one at a time."""
        wanted = [r for r in results if r.on_frontier or r.route.is_anchor]
        made: dict[Route, tuple[RouteResult, Path | None]] = {r.route: (r, None) for r in results}
        with self._stage("export and verify", len(wanted), "engines") as advance:
            maker = EngineMaker(supernet, family, self.device, self.settings.threads)
            for result in wanted:
                made[result.route] = maker.make(result, batches(data.test, self.settings.batch), folder)
                advance(1, str(result.route))
        with (
            self._alone(registry),
            self._stage("latency", len(wanted), "engines") as advance,
        ):
            for result, file in [made[r.route] for r in wanted]:
                if file is not None:
                    timed = maker.time(file, self.settings.latency_batches)
                    made[result.route] = replace(result, latencies=timed), file
                advance(1, str(result.route))
        return list(made.values())

    def register(
        self, record: BuildRecord, made: list[tuple[RouteResult, Path | None]], data: Data, registry: Registry
    ) -> int:
        engines = [_new_engine(result, file, record, data) for result, file in made if file is not None]
        if not engines:
            first = next(result.rejected for result, _ in made if result.rejected)
            raise ExportError(f"No engine passed its checks, so nothing was registered; the first: {first}")
        with self._stage("register", 1, "family"):
            return registry.register(record, engines)


def _new_engine(result: RouteResult, file: Path, record: BuildRecord, data: Data) -> NewEngine:
    assert result.verification is not None
    latency = result.latencies[0]
    return NewEngine(
        family=record.family, route=result.route, device=record.device, runtime=latency.runtime,
        precision=latency.precision, macs=result.cost.macs, parameters=result.cost.parameters, top1=result.top1,
        images=len(data.test), input_shape=latency.shape[1:], verification=result.verification,
        latencies=result.latencies, weights=record.weights, dataset=record.dataset,
        data_fingerprint=record.data_fingerprint, file=file,
    )  # fmt: skip

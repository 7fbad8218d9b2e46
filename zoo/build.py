"""The main job: from a family and images to registered, verified, timed engines.

    family → probes → similarity → selection → supernet → tuning → evaluation
           → export → verification → latency → registry
"""

from __future__ import annotations

import platform
import random
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from klas_zoo.anchors import Family
from klas_zoo.chains import Chain
from klas_zoo.data import Batch, Data, Split, batches
from klas_zoo.engines import EngineMaker, RouteResult, time_anchors
from klas_zoo.errors import ExportError
from klas_zoo.evaluation import evaluate
from klas_zoo.frontier import frontier
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.macs import ChainCost, Cost, chain_cost, route_cost, seam_cost
from klas_zoo.records import BuildRecord, NewEngine
from klas_zoo.registry import Registry
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection, select
from klas_zoo.selection.candidates import Cost as RouteCost
from klas_zoo.selection.candidates import SelectionSettings
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


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build found and registered; `seconds` per stage, memory in bytes."""

    family: Family
    data: Data
    settings: BuildSettings
    measurements: Measurements
    selection: Selection
    unexplained: dict[Seam, float]
    results: tuple[RouteResult, ...]
    record: BuildRecord
    build_id: int
    seconds: dict[str, float]
    peak_memory_bytes: int

    @property
    def anchors(self) -> tuple[RouteResult, ...]:
        return tuple(result for result in self.results if result.route.is_anchor)


class Listener(Protocol):
    """Told about a build as it goes. `stage` gives a function that takes work done and a remark."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...
    def say(self, sentence: str) -> None: ...


def build(
    family: Family,
    data: Data,
    settings: BuildSettings,
    *,
    device: Device,
    registry: Registry,
    listener: Listener,
) -> BuildResult:
    """Stitches a family for a device and registers its engines. The family's weights are tuned in place.

    Raises:
        KlasZooError: any of its kinds; the registry stays as it was.
    """
    started = _now()
    settings = replace(settings, tuning=settings.tuning.on(device.torch_device))
    _seed_everything(settings.seed)
    stages = _Stages(settings, device, listener)
    cost_of = route_costs(family)

    def macs(route: Route) -> float:
        return cost_of(route).macs

    # both refuse before any time is spent on probes
    stitchable_pairs(family.chains, macs, settings.selection)
    cost, unit, anchors_ms = stages.price(family, macs, registry)
    chains = {name: chain.to(device.torch_device) for name, chain in family.chains.items()}
    measured = replace(stages.measure(chains, data, macs), latency_ms=anchors_ms)
    selection = select(chains, measured, cost, settings.selection, unit=unit)
    for sentence in selection.remarks():
        listener.say(sentence)
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    supernet = Supernet(chains, [*anchors, *selection.routes]).to(device.torch_device)
    unexplained = stages.initialise(supernet, data)
    before = stages.evaluate("evaluate untuned", supernet, data)
    stages.tune(supernet, data)
    after = stages.evaluate("evaluate tuned", supernet, data)
    best = frontier(supernet.routes, macs, lambda route: after[route])
    results = [
        RouteResult(route=r, cost=cost_of(r), top1_before=before[r], top1=after[r], on_frontier=r in best)
        for r in sorted(supernet.routes, key=macs)
    ]
    record = BuildRecord(
        family=family.name, device=device.name, weights=family.weights, dataset=data.description,
        data_fingerprint=data.test_fingerprint, command=shlex.join(["klas-zoo", *sys.argv[1:]]),
        settings=_plain(asdict(settings)), versions=versions(), hardware=device.hardware, started_at=started,
        finished_at="",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="klas-zoo-") as folder:
        made = stages.make_engines(supernet.cpu(), family, data, results, Path(folder), registry)
        record = replace(record, finished_at=_now())
        build_id = stages.register(record, made, data, registry)
    return BuildResult(
        family=family, data=data, settings=settings, measurements=measured, selection=selection,
        unexplained=unexplained, results=tuple(result for result, _ in made), record=record,
        build_id=build_id, seconds=stages.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


def part_costs(family: Family) -> dict[str, ChainCost]:
    """What the parts of every anchor cost."""
    return {name: chain_cost(chain, family.input_shape) for name, chain in family.chains.items()}


def route_costs(family: Family) -> Callable[[Route], Cost]:
    """A function that gives multiply-adds and parameters of any route of a family."""
    chains = family.chains
    costs = part_costs(family)

    def of_seam(seam: Seam) -> Cost:
        return seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])

    return lambda route: route_cost(route, costs, of_seam)


def versions() -> dict[str, str]:
    """Of Python and of every package that numbers can depend on."""
    packages = ("klas-zoo", "torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "fvcore", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


class _Stages:
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

    def measure(self, chains: dict[str, Chain], data: Data, macs: RouteCost) -> Measurements:
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
        self, family: Family, macs: RouteCost, registry: Registry
    ) -> tuple[RouteCost, str, dict[str, float] | None]:
        """What the selector cuts buckets over, its unit, and the anchors' latencies where it is by them."""
        if find_selector(self.settings.selection.selector).cost == "macs":
            return macs, "multiply-adds", None
        waiting = f"Another build is timing engines for {registry.root}; waiting for it."
        with (
            registry.writing(lambda: self.listener.say(waiting)),
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
        waiting = f"Another build is timing engines for {registry.root}; waiting for it."
        # two builds that time at once would measure each other
        with (
            registry.writing(lambda: self.listener.say(waiting)),
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


def _seed_everything(seed: int) -> None:
    # timm's augmentations draw from all three
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _plain(value: Any) -> Any:
    """Settings as JSON can hold them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

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
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klas_zoo import tuned
from klas_zoo.anchors import Family
from klas_zoo.costs import route_costs
from klas_zoo.data import Data
from klas_zoo.engines import RouteResult
from klas_zoo.frontier import frontier
from klas_zoo.profiles.devices import Device
from klas_zoo.records import BuildRecord
from klas_zoo.registry import Registry
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection, select
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.stages import BuildSettings, Listener, Stages
from klas_zoo.supernet import Supernet


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
    stages = Stages(settings, device, listener)
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
    results = [result for result, _ in made]
    tuned.keep(registry.root, supernet, record, build_id, results, len(data.test), family.data_config)
    return BuildResult(
        family=family, data=data, settings=settings, measurements=measured, selection=selection,
        unexplained=unexplained, results=tuple(results), record=record,
        build_id=build_id, seconds=stages.seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and of every package that numbers can depend on."""
    packages = ("klas-zoo", "torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "fvcore", "numpy")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


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

"""What a build knows of one route and its engines, and the latency of whole anchors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from klas_zoo.exporters.records import Verification
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import measure_engine
from klas_zoo.profiles.macs import RouteCost
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry.records import Status
from klas_zoo.routes import Route
from klas_zoo.runtimes import VERIFIED
from klas_zoo.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """One engine of a route.

    Attributes:
        package: the name of its package's folder among those of the build.
        file: in that folder.
        size_bytes: of the graph and of the weights it reads.
        status: `refused` where it is another function than its route: then it has no file.
        reason: of any status but `verified`.
    """

    format: str
    runtime: str
    precision: str
    package: str
    file: str
    size_bytes: int
    status: Status | str
    reason: str = ""
    verification: Verification | None = None
    latencies: tuple[LatencyRecord, ...] = ()

    @property
    def exists(self) -> bool:
        return self.status != "refused"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineResult:
        """From what `asdict` gave."""
        seen = values["verification"]
        latencies = (LatencyRecord(**{**one, "shape": tuple(one["shape"])}) for one in values["latencies"])
        verification = Verification.from_json(seen) if seen else None
        return cls(**{**values, "verification": verification, "latencies": tuple(latencies)})


@dataclass(frozen=True, kw_only=True)
class RouteResult:
    """What a build knows of one route.

    Attributes:
        top1_before, top1: per cent, with closed-form stitching layers and after tuning.
        on_frontier: whether no other route costs as little and is more accurate.
        predicted_ms: latency on the device by a profile or a roofline, `predicted_by` which.
        engines: none for a route that is neither on the frontier nor an anchor.
    """

    route: Route
    cost: RouteCost
    top1_before: float
    top1: float
    on_frontier: bool
    predicted_ms: float | None = None
    predicted_by: str = ""
    engines: tuple[EngineResult, ...] = field(default=())

    @property
    def wanted(self) -> bool:
        """Whether there should be engines of it."""
        return self.on_frontier or self.route.is_anchor

    @property
    def engine(self) -> EngineResult | None:
        """The engine that stands for the route in tables and plots: the first, which is fp32 where there is one."""
        return next((one for one in self.engines if one.exists), None)

    @property
    def rejected(self) -> str:
        """Why there is no engine although there should be one; empty where there is one."""
        refused = [one.reason for one in self.engines if not one.exists]
        return refused[0] if refused and self.engine is None else ""

    @property
    def latencies(self) -> tuple[LatencyRecord, ...]:
        return self.engine.latencies if self.engine else ()

    @property
    def latency_ms(self) -> float | None:
        """The median: as it was measured, else as it was predicted."""
        return self.latencies[0].p50_ms if self.latencies else self.predicted_ms

    def to_json(self) -> dict[str, Any]:
        """All fields, the route as its segments."""
        return {**asdict(self), "route": self.route.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RouteResult:
        """From what `to_json` gave."""
        return cls(
            **{
                **values,
                "route": Route.from_json(values["route"]),
                "cost": RouteCost(**values["cost"]),
                "engines": tuple(map(EngineResult.from_json, values["engines"])),
            }
        )


def is_verified(engine: EngineResult) -> bool:
    return engine.status == VERIFIED


def time_anchors(
    family: Family,
    device: Device,
    *,
    batch: int,
    threads: int | None,
    on_anchor: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Median ms of every whole anchor as an fp32 engine in onnxruntime on the device.

    The chains return to the devices they were on.

    Raises:
        ExportError: an anchor cannot be exported to ONNX, or does not run.
    """
    homes = {name: next(chain.parameters()).device for name, chain in family.chains.items()}
    routes = {name: Route.anchor(name, chain.depth) for name, chain in family.chains.items()}
    exporter = RouteExporter(Supernet(family.chains, routes.values()).cpu().eval(), family.input_shape)
    found = {}
    with tempfile.TemporaryDirectory(prefix="klas-zoo-") as folder:
        for name, route in routes.items():
            file = Path(folder) / f"{name}.onnx"
            exporter.export(route, file, metadata={})
            found[name] = measure_engine(
                file, runtime="onnxruntime", precision="fp32", device=device, input_shape=family.input_shape,
                batch=batch, threads=threads,
            ).p50_ms  # fmt: skip
            on_anchor(name)
    for name, chain in family.chains.items():
        chain.to(homes[name])
    return found

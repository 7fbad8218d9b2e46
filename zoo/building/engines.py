"""One route of a tuned supernet turned into an engine: exported, verified, timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from klas_zoo.data.loading import Batch
from klas_zoo.errors import ExportError
from klas_zoo.exporters.records import Verification
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.exporters.verify import explain, verify
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import measure
from klas_zoo.profiles.macs import Cost
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class RouteResult:
    """What a build knows of one route; the fields after `predicted_by` belong to its engine.

    Attributes:
        top1_before, top1: per cent, with closed-form stitching layers and after tuning.
        on_frontier: whether no other route is at least as cheap and more accurate.
        predicted_ms: latency on the device where a profile or a roofline tells it, `predicted_by` which.
        rejected: why there is no engine although there should be one.
    """

    route: Route
    cost: Cost
    top1_before: float
    top1: float
    on_frontier: bool
    predicted_ms: float | None = None
    predicted_by: str = ""
    size_bytes: int | None = None
    verification: Verification | None = None
    latencies: tuple[LatencyRecord, ...] = ()
    rejected: str = ""

    @property
    def latency_ms(self) -> float | None:
        """The median: as it was measured, else as it was predicted."""
        return self.latencies[0].p50_ms if self.latencies else self.predicted_ms

    @property
    def wanted(self) -> bool:
        """Whether there should be an engine of it."""
        return self.on_frontier or self.route.is_anchor

    def to_json(self) -> dict[str, Any]:
        """All fields, the route as its segments."""
        return {**asdict(self), "route": self.route.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RouteResult:
        """What `to_json` gave."""
        seen = values["verification"]
        latencies = (LatencyRecord(**{**one, "shape": tuple(one["shape"])}) for one in values["latencies"])
        return cls(
            **{
                **values,
                "route": Route.from_json(values["route"]),
                "cost": Cost(**values["cost"]),
                "verification": Verification.from_json(seen) if seen else None,
                "latencies": tuple(latencies),
            }
        )


class EngineMaker:
    """Makes engines of one supernet, whose weights must not change any more, for one device.

    Raises:
        ExportError: the supernet cannot be translated to ONNX at all.
    """

    def __init__(self, supernet: Supernet, family: Family, device: Device, threads: int | None) -> None:
        self.supernet = supernet.eval()
        self.family, self.device, self.threads = family, device, threads
        self.exporter = RouteExporter(supernet, family.input_shape)

    def make(
        self, result: RouteResult, images: Iterable[Batch], folder: Path
    ) -> tuple[RouteResult, Path | None]:
        """Exports one route and compares it with torch on real images; the path is None if it fails."""
        file = folder / f"{result.route}.onnx"
        facts = {
            "family": self.family.name,
            "route": str(result.route),
            "weights": self.family.weights,
            "klas_zoo": metadata.version("klas-zoo"),
        }
        try:
            self.exporter.export(result.route, file, metadata=facts)
            found = verify(
                file,
                self.supernet.network(result.route),
                (batch for batch, _ in images),
                provider=self.device.provider,
                threads=self.threads,
            )
        except ExportError as error:
            return replace(result, rejected=str(error)), None
        result = replace(result, verification=found, size_bytes=file.stat().st_size)
        if not found.passed:
            return replace(result, rejected=f"{result.route}: {explain(found)}"), None
        return result, file


def time_engine(
    file: Path, family: Family, device: Device, *, batch_sizes: Iterable[int], threads: int | None
) -> tuple[LatencyRecord, ...]:
    """Latency at each batch size; one session is alive at a time."""
    return tuple(
        measure(file, device=device, input_shape=family.input_shape, batch=batch, threads=threads)
        for batch in batch_sizes
    )


def time_anchors(
    family: Family,
    device: Device,
    *,
    batch: int,
    threads: int | None,
    on_anchor: Callable[[str], None] = lambda name: None,
) -> dict[str, float]:
    """Median ms of every whole anchor as an engine on the device. The chains come back where they were.

    Raises:
        ExportError: an anchor cannot be translated to ONNX, or does not run.
    """
    homes = {name: next(chain.parameters()).device for name, chain in family.chains.items()}
    routes = {name: Route.anchor(name, chain.depth) for name, chain in family.chains.items()}
    maker = EngineMaker(Supernet(family.chains, routes.values()).cpu(), family, device, threads)
    found = {}
    with tempfile.TemporaryDirectory(prefix="klas-zoo-") as folder:
        for name, route in routes.items():
            file = Path(folder) / f"{name}.onnx"
            maker.exporter.export(route, file, metadata={})
            found[name] = time_engine(file, family, device, batch_sizes=(batch,), threads=threads)[0].p50_ms
            on_anchor(name)
    for name, chain in family.chains.items():
        chain.to(homes[name])
    return found

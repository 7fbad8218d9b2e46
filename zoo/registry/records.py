"""What a build hands to the registry, and what the registry gives back. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.routes import Route

if TYPE_CHECKING:
    from klas_zoo.families.specs import Weights

Percentile = Literal["p50", "p90", "p99"]

PERCENTILES: tuple[Percentile, ...] = ("p50", "p90", "p99")


def percentile_ms(latency: LatencyRecord, percentile: Percentile) -> float:
    """That percentile of a measurement, in milliseconds per batch."""
    return cast(float, getattr(latency, f"{percentile}_ms"))


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What is known of an engine wherever its file lies.

    Attributes:
        macs: multiply-adds for one image.
        parameters: how many numbers the route's weights are.
        top1: accuracy in per cent, 0..100, over `images` test images.
        input_shape: one image, `(C, H, W)`.
        latencies: one record per batch size; may be empty, then nothing can pick the engine.
        weights: `random` when nobody trained the anchors, so that `top1` means nothing.
        dataset: where the test images come from, for people.
        data_fingerprint: of those images; accuracies compare only where it is the same.

    Raises:
        ValueError: a number that no measurement can give, or two latencies at one batch size.
    """

    family: str
    route: Route
    device: str
    runtime: str
    precision: str
    macs: int
    parameters: int
    top1: float
    images: int
    input_shape: tuple[int, ...]
    verification: Verification
    latencies: tuple[LatencyRecord, ...]
    weights: Weights
    dataset: str
    data_fingerprint: str

    def __post_init__(self) -> None:
        if not 0 <= self.top1 <= 100:
            raise ValueError(f"top1 is per cent, 0..100, not {self.top1}")
        for latency in self.latencies:
            known = [percentile_ms(latency, p) for p in PERCENTILES]
            if latency.origin == "roofline":  # which tells a median only
                known = known[:1]
            if not all(0 < milliseconds < math.inf for milliseconds in known):
                raise ValueError(f"a latency is finite and above zero, not as in {latency}")
        if len({latency.batch for latency in self.latencies}) < len(self.latencies):
            raise ValueError(f"{self.route} has two latencies at one batch size")

    def latency(self, batch: int) -> LatencyRecord | None:
        """The measurement at that batch size."""
        return next((record for record in self.latencies if record.batch == batch), None)

    def latency_ms(self, percentile: Percentile, batch: int) -> float | None:
        """Milliseconds per batch, or None where that batch size was not measured."""
        record = self.latency(batch)
        return percentile_ms(record, percentile) if record else None


@dataclass(frozen=True, kw_only=True)
class NewEngine(EngineFacts):
    """What a build hands over: `file` is copied, and can go afterwards."""

    file: Path


@dataclass(frozen=True, kw_only=True)
class EngineRecord(EngineFacts):
    """A registered engine; `path` is its file in the registry, `built_at` when its build was done."""

    path: Path
    sha256: str
    size_bytes: int
    build_id: int
    built_at: str

    def to_json(self) -> dict[str, object]:
        """Every field; the route by its name, with its segments beside it."""
        return asdict(self) | {
            "route": str(self.route),
            "segments": self.route.to_json(),
            "path": str(self.path),
            "latencies": [latency.to_json() for latency in self.latencies],
        }


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """One run of `klas-zoo build`, with all that is needed to do it again.

    `settings`, `versions` and `manifest` (see klas_zoo.building.manifest) hold what JSON can hold; times are
    ISO 8601 with their zone. Builds of before there were manifests have an empty one.
    """

    family: str
    device: str
    weights: Weights
    dataset: str
    data_fingerprint: str
    command: str
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    hardware: str
    started_at: str
    finished_at: str
    manifest: Mapping[str, object] = field(default_factory=dict)

"""What is handed to the registry and what it returns. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import CascadeLatency, LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.runtimes import NOT_RUN, VERIFIED

if TYPE_CHECKING:
    from klas_zoo.cascades.definition import Cascade
    from klas_zoo.cascades.records import CascadeFacts
    from klas_zoo.families.specs import Weights

Percentile = Literal["p50", "p90", "p99"]
PERCENTILES: tuple[Percentile, ...] = ("p50", "p90", "p99")
Statistic = Literal["p50", "p90", "p99", "mean", "worst"]
"""Of a latency: a percentile over calls, the mean, or that of an image which every stage of a cascade executes."""

Status = Literal["verified", "built, not run", "to be compiled on the target"]
TO_COMPILE: Status = "to be compiled on the target"
STATUSES: tuple[Status, ...] = (VERIFIED, NOT_RUN, TO_COMPILE)

Kind = Literal["build", "add", "install", "cascades"]


def percentile_ms(latency: LatencyRecord, statistic: Statistic) -> float:
    """That percentile of a latency, in milliseconds per batch; NaN where it is unknown.

    An engine that is no cascade takes equally long for all images: its mean is its median, its worst case its highest
    known percentile.
    """
    if statistic in PERCENTILES or isinstance(latency, CascadeLatency):
        return cast(float, getattr(latency, f"{statistic}_ms"))
    if statistic == "mean":
        return latency.p50_ms
    return next(ms for ms in (latency.p99_ms, latency.p90_ms, latency.p50_ms) if not math.isnan(ms))


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What is known about an engine, wherever its file is.

    An engine is one route made executable: format, precision and runtime, and the hardware where it is compiled
    for one; or a cascade of the engines of its package.

    Attributes:
        route: a cascade where `cascade` is known.
        cascade: what becomes of images in its stages; None for an engine of one route.
        format: of its file: `onnx`, `tensorrt` or `tensorrt-rtx`.
        runtime: that executes it, by its name in `klas_zoo.runtimes`.
        status: `verified` on the machine that made it; `built, not run`; or `to be compiled on the target`,
            then the file is the ONNX graph to compile. `reason` explains the last two.
        macs: multiply-adds for one image; of a cascade the mean over the images that its thresholds were fitted on.
        parameters: number of weights.
        top1, top5: accuracy in per cent, 0..100, over `images` test images; top5 None: not measured.
        accuracy_source: empty where klas-zoo measured the accuracy; else whoever claims it.
        input_shape: one image, `(C, H, W)`.
        num_classes: 0 for engines registered before it was recorded.
        preprocessing: how images are resized, cropped and normalised, in timm's terms; may be empty for
            engines registered before it was recorded.
        latencies: one per set of conditions; may be empty, then no latency budget can be met.
        weights: `random` for untrained anchors, whose accuracy means nothing.
        dataset: where the test images come from, for people.
        data_fingerprint: of those images; accuracies compare only where it is equal. Empty where the
            accuracy is claimed.

    Raises:
        ValueError: an impossible number, or two latencies under the same conditions.
    """

    family: str
    route: Route | Cascade
    cascade: CascadeFacts | None = None
    device: str
    format: str = "onnx"
    runtime: str
    precision: str
    status: Status = VERIFIED
    reason: str = ""
    macs: int
    parameters: int
    top1: float
    top5: float | None = None
    images: int
    accuracy_source: str = ""
    input_shape: tuple[int, ...]
    num_classes: int = 0
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    verification: Verification | None
    latencies: tuple[LatencyRecord, ...]
    weights: Weights
    dataset: str
    data_fingerprint: str

    def __post_init__(self) -> None:
        for name in ("top1", "top5"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 100:
                raise ValueError(f"{name} is per cent, 0..100, not {value}")
        if self.status not in STATUSES:
            raise ValueError(f"an engine's status is one of {', '.join(STATUSES)}, not {self.status!r}")
        if (self.status == VERIFIED) != (self.verification is not None):
            raise ValueError(f"{self.route} is {self.status}, and its verification is {self.verification}")
        if isinstance(self.route, Route) != (self.cascade is None):
            raise ValueError(f"{self.route} is a cascade where the shares of its stages are known, and else is none")
        if len({latency.conditions for latency in self.latencies}) < len(self.latencies):
            raise ValueError(f"{self.route} has two latencies under the same conditions")

    @property
    def claimed(self) -> bool:
        """Whether the accuracy was stated by somebody instead of measured."""
        return bool(self.accuracy_source)

    def latency(self, batch: int) -> LatencyRecord | None:
        """The first latency at that batch size, as the registry orders them: measured ones first."""
        return next((record for record in self.latencies if record.batch == batch), None)

    def latency_ms(self, percentile: Percentile, batch: int) -> float | None:
        """Milliseconds per batch, or None where that batch size is unknown."""
        record = self.latency(batch)
        return percentile_ms(record, percentile) if record else None


@dataclass(frozen=True, kw_only=True)
class NewEngine(EngineFacts):
    """An engine to register.

    Attributes:
        file: in the folder of a package, which becomes the registry's as a whole.
        size_bytes: of what has to be deployed for this engine alone: its graph and the weights it reads.
            None: of the file.
    """

    file: Path
    size_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineRecord(EngineFacts):
    """A registered engine.

    Attributes:
        path: its file in the registry.
        package: digest of the package the file belongs to; empty for engines of registries without packages.
        sha256, file_bytes: of the file.
        size_bytes: of what has to be deployed for this engine alone, the weights it reads included.
        built_at: when its build had finished.
    """

    path: Path
    package: str = ""
    sha256: str
    file_bytes: int
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
class PackageRecord:
    """A package of a registered build; `path` is its folder in the registry."""

    digest: str
    format: str
    precision: str
    size_bytes: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class BuildRecord:
    """One run of `klas-zoo build`, `add` or `install`, with everything needed to repeat it.

    `settings`, `versions` and `manifest` (see klas_zoo.building.manifest) are JSON; times are ISO 8601 with their
    zone. Builds from before manifests existed have an empty one.
    """

    family: str
    device: str
    kind: Kind = "build"
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

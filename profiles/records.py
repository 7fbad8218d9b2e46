"""A latency and the conditions it was measured under. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from klas_zoo.profiles.profile import Statistics

Origin = Literal["measured", "interpolated", "roofline"]
UNCHECKED = "unchecked"
"""How the method of a prediction's error begins where nothing like it was ever compared with a measurement."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything besides the network that decides a latency.

    Two latencies of one engine are the same quantity only where all fields are equal. Latencies of different
    engines compare where `comparable` is equal: runtime, provider, precision and image size belong to the
    engine, the rest to the machine and to how it was measured.

    Attributes:
        hardware: `Device.hardware` of the machine.
        options: canonical JSON of the provider and session options that differ from those with which the
            runtime opens an engine by default; empty where none does.
        threads: that compute one operator; 0 on a GPU.
        shape: of the batch, `(B, C, H, W)`.
        clock: `host`: from numpy images to numpy logits, copies included; `device`: the device's own time.
    """

    hardware: str
    runtime: str
    runtime_version: str
    provider: str
    options: str
    precision: str
    threads: int
    batch: int
    shape: tuple[int, ...]
    clock: str

    @property
    def comparable(self) -> tuple[str, int, int, str, str]:
        """What has to be equal for latencies of different engines to be compared."""
        return self.hardware, self.threads, self.batch, self.clock, self.options


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """Latency of one engine at one batch size, in milliseconds per batch.

    Attributes:
        options, clock: as in `Conditions`; records written before these fields existed have the defaults.
        coefficient_of_variation: the standard deviation over the mean.
        origin: `measured` here, and `interpolated` or `roofline` in `EstimatedLatency`.
    """

    device: str
    hardware: str
    runtime: str
    runtime_version: str
    provider: str
    precision: str
    threads: int
    batch: int
    shape: tuple[int, ...]
    runs: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    coefficient_of_variation: float
    origin: Origin
    measured_at: str
    options: str = ""
    clock: Literal["host", "device"] = "host"

    def __post_init__(self) -> None:
        if self.batch < 1 or not all(0 <= count < 2**63 for count in (self.threads, self.batch, self.runs)):
            raise ValueError(f"threads, batch and runs are counts, not as in {self}")
        # a roofline predicts a median only
        _check_times(self, self.p50_ms, *(() if self.origin == "roofline" else (self.p90_ms, self.p99_ms)))

    @classmethod
    def measured(cls, seen: Statistics, conditions: Conditions, *, device: str, measured_at: str) -> LatencyRecord:
        """The record of timed runs; `device` is the device's name."""
        return cls(
            **vars(conditions),
            device=device,
            runs=seen.runs,
            min_ms=seen.min_ms,
            p50_ms=seen.p50_ms,
            p90_ms=seen.p90_ms,
            p99_ms=seen.p99_ms,
            coefficient_of_variation=seen.coefficient_of_variation,
            origin="measured",
            measured_at=measured_at,
        )

    @property
    def conditions(self) -> Conditions:
        """Everything besides the network that decided this latency."""
        return Conditions(**{field.name: getattr(self, field.name) for field in fields(Conditions)})

    def to_json(self) -> dict[str, object]:
        """Every field; null where a number is not known."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class EstimatedLatency(LatencyRecord):
    """A latency that was predicted, not measured; `origin` is `interpolated` or `roofline`.

    A roofline predicts a median only: its other percentiles are NaN.

    Attributes:
        error_percent: nine in ten predictions that could be checked were closer than this.
        error_method: what was checked.
    """

    error_percent: float
    error_method: str


@dataclass(frozen=True, kw_only=True)
class CascadeLatency(LatencyRecord):
    """The latency of a cascade for one image at a time: the mixture of its paths by the shares that take them.

    Attributes:
        mean_ms: over images.
        worst_ms: 99th percentile of the longest path, on which every stage is executed.
        paths_ms: the median of each path, shortest first.
    """

    mean_ms: float
    worst_ms: float
    paths_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_times(self, self.mean_ms, self.worst_ms, *self.paths_ms)


def _check_times(latency: LatencyRecord, *known_ms: float) -> None:
    if not all(0 < milliseconds < math.inf for milliseconds in known_ms):
        raise ValueError(f"a latency is finite and above zero, not as in {latency}")


def origin_of(latency: LatencyRecord) -> str:
    """`measured`, `interpolated (±2.1 %)`, `roofline (±31 %)` or `roofline (unchecked)`."""
    if not isinstance(latency, EstimatedLatency):
        return latency.origin
    if latency.error_method.startswith(UNCHECKED):
        return f"{latency.origin} ({UNCHECKED})"
    return f"{latency.origin} (±{latency.error_percent:.2g} %)"

"""What a measurement of latency is, with everything it was measured on. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """Latency of one engine at one batch size, in milliseconds per batch.

    `origin` is `measured` here, and `interpolated` or `roofline` in `EstimatedLatency`.
    `coefficient_of_variation` is the standard deviation over the mean.
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
    origin: str
    measured_at: str

    def to_json(self) -> dict[str, object]:
        """Every field; null where a number is not known."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class EstimatedLatency(LatencyRecord):
    """A latency nobody measured; `origin` is `interpolated` or `roofline`.

    A roofline tells a median and nothing of the spread: its other percentiles are NaN.

    Attributes:
        error_percent: nine in ten predictions that could be checked were closer than this.
        error_method: what was checked.
    """

    error_percent: float
    error_method: str

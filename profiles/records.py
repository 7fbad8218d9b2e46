"""What a measurement of latency is, with everything it was measured on. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatencyRecord:
    """Latency of one engine at one batch size, in milliseconds per batch.

    `origin` is `measured` here; other values are reserved for predictions, which say how
    they were made. `coefficient_of_variation` is the standard deviation over the mean.
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

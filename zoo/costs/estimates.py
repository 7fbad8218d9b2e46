"""Latencies as a profile tells them: of what it measured, and of what its model predicts. Imports nothing heavy."""

from __future__ import annotations

import math
from typing import TypedDict

from klas_zoo.profiles.profile import MeasuredNetwork, Profile
from klas_zoo.profiles.records import EstimatedLatency, LatencyRecord
from klas_zoo.routes import Route


class _MeasuredOn(TypedDict):
    device: str
    hardware: str
    runtime: str
    runtime_version: str
    provider: str
    precision: str
    threads: int
    batch: int
    shape: tuple[int, ...]
    measured_at: str


def origin_of(latency: LatencyRecord) -> str:
    """`measured`, `interpolated (±2.1 %)` or `roofline (±31 %)`."""
    if not isinstance(latency, EstimatedLatency):
        return latency.origin
    return f"{latency.origin} (±{latency.error_percent:.2g} %)"


def measured(profile: Profile, network: MeasuredNetwork) -> LatencyRecord:
    """A latency that a profile holds."""
    seen = network.latency
    return LatencyRecord(
        **_measured_on(profile),
        runs=seen.runs,
        min_ms=seen.min_ms,
        p50_ms=seen.p50_ms,
        p90_ms=seen.p90_ms,
        p99_ms=seen.p99_ms,
        coefficient_of_variation=seen.coefficient_of_variation,
        origin="measured",
    )


def estimate(profile: Profile, route: Route) -> EstimatedLatency:
    """A route's latency by a profile's model, which covers it."""
    assert profile.model is not None
    p50_ms = profile.model.predict_ms(route)
    p90, p99 = profile.spread("p90"), profile.spread("p99")
    return EstimatedLatency(
        **_measured_on(profile),
        runs=0,
        min_ms=math.nan,
        p50_ms=p50_ms,
        p90_ms=p50_ms * p90 if p90 else math.nan,
        p99_ms=p50_ms * p99 if p99 else math.nan,
        coefficient_of_variation=math.nan,
        origin="interpolated" if profile.origin == "measured" else "roofline",
        error_percent=profile.model.error.p90_percent,
        error_method=profile.model.error.method,
    )


def _measured_on(profile: Profile) -> _MeasuredOn:
    return {
        "device": profile.device,
        "hardware": profile.hardware,
        "runtime": profile.runtime,
        "runtime_version": profile.runtime_version,
        "provider": profile.provider,
        "precision": profile.precision,
        "threads": profile.threads,
        "batch": profile.batch,
        "shape": (profile.batch, *profile.input_shape),
        "measured_at": profile.measured_at,
    }

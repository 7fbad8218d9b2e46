"""Latency records out of a profile: of measured networks, and by its model of the rest. Imports nothing heavy."""

from __future__ import annotations

import math

from klas_zoo.profiles.profile import MeasuredNetwork, Profile, Statistics
from klas_zoo.profiles.records import Conditions, EstimatedLatency, LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.runtimes import canonical_options


def measurements(profile: Profile, network: MeasuredNetwork) -> list[LatencyRecord]:
    """The latencies of a network that a profile measured: by the host's clock, and by the device's own on a GPU."""
    found = [_record(profile, network.latency, profile.clock)]
    if network.device is not None and profile.clock != "device":
        found.append(_record(profile, network.device, "device"))
    return found


def _record(profile: Profile, seen: Statistics, clock: str) -> LatencyRecord:
    conditions = _conditions(profile, clock)
    return LatencyRecord.measured(seen, conditions, device=profile.device, measured_at=profile.measured_at)


def estimate(profile: Profile, route: Route) -> EstimatedLatency:
    """A route's latency by a profile's model, which covers it."""
    assert profile.model is not None
    p50_ms = profile.model.predict_ms(route)
    p90, p99 = profile.spread("p90"), profile.spread("p99")
    return EstimatedLatency(
        **vars(_conditions(profile, profile.clock)),
        device=profile.device,
        measured_at=profile.measured_at,
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


def _conditions(profile: Profile, clock: str) -> Conditions:
    return Conditions(
        hardware=profile.hardware,
        runtime=profile.runtime,
        runtime_version=profile.runtime_version,
        provider=profile.provider,
        options=canonical_options(profile.options),
        precision=profile.precision,
        threads=profile.threads,
        batch=profile.batch,
        shape=(profile.batch, *profile.input_shape),
        clock=clock,
    )

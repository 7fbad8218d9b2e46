"""Latency of one engine, measured the way `load()` opens it and a service calls it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from klas_zoo.errors import UsageError
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.records import Conditions, LatencyRecord
from klas_zoo.profiles.runners import SessionRunner, images_of
from klas_zoo.profiles.timing import Method, statistics_of, time_in_turn
from klas_zoo.runtimes import open_engine, runtime_named

BUILD_METHOD = Method(warmup_ms=200, min_runs=100, min_ms=700, max_ms=10_000)
"""What a build spends on an engine and batch size: about a second for a fast one, ten for a slow one.

docs/profiles.md has what a p99 of so many runs is worth.
"""


def measure_engine(
    engine: Path | bytes,
    *,
    device: Device,
    precision: str,
    input_shape: tuple[int, ...],
    runtime: str = "onnxruntime",
    batch: int = 1,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
    spinning: bool | None = None,
    method: Method = BUILD_METHOD,
) -> LatencyRecord:
    """Times an engine by the host's clock: numpy images in, numpy logits out, copies to and from a device included.

    The session is open only in here, so that its threads and memory do not disturb the next measurement.

    Args:
        precision: of the engine; only recorded.
        input_shape: (C, H, W) of one image.
        threads, options, spinning: see `klas_zoo.runtimes.open_engine`.

    Raises:
        UsageError: the runtime does not run on such a device.
        ExportError: the runtime cannot load the engine, or run it on such images.
        OutOfMemory: the batch does not fit.
        KlasZooError: the runtime is not installed, or does not start.
    """
    provider = provider_on(runtime, device)
    images = images_of(batch, input_shape)
    with open_engine(
        engine, runtime=runtime, provider=provider, threads=threads, options=options, spinning=spinning
    ) as session:
        # the timer's key: one engine alone
        times = time_in_turn({runtime: SessionRunner(session, images)}, method)[runtime]
        conditions = Conditions(
            hardware=device.hardware,
            runtime=session.runtime,
            runtime_version=session.runtime_version,
            provider=session.provider,
            options=session.options,
            precision=precision,
            threads=session.threads,
            batch=batch,
            shape=tuple(images.shape),
            clock="host",
        )
    return LatencyRecord.measured(
        statistics_of(times.host_ms),
        conditions,
        device=device.name,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def provider_on(runtime: str, device: Device) -> str:
    """The provider with which a runtime computes on a device.

    Raises:
        UnknownName: there is no such runtime.
        UsageError: it does not run there.
    """
    found = runtime_named(runtime)
    if device.provider in found.precisions:  # the device may name another of its providers than the usual one
        return device.provider
    provider = found.providers.get(device.kind)
    if provider is None:
        where = " or ".join(found.providers)
        raise UsageError(f"{runtime} runs on {where}, not on {device.name}.")
    return provider

"""What `add` and `install` have in common: timing engines under one set of conditions, and their record."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from klas_zoo.addresses import command_line
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import BUILD_METHOD, measure_engine
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.timing import Method
from klas_zoo.registry.records import BuildRecord, Kind
from klas_zoo.runtimes import runtime_named
from klas_zoo.versions import versions


def latencies_of(
    engine: Path,
    *,
    device: Device,
    runtime: str,
    precision: str,
    input_shape: tuple[int, ...],
    batches: Iterable[int],
    threads: int | None,
    method: Method = BUILD_METHOD,
) -> tuple[LatencyRecord, ...]:
    """Latency of an engine at each batch size, measured the way `Pick.load` opens it.

    Raises:
        KlasZooError: see `klas_zoo.profiles.latency.measure_engine`.
    """
    return tuple(
        measure_engine(
            engine, device=device, precision=precision, input_shape=input_shape, runtime=runtime, batch=batch,
            threads=threads, method=method,
        )
        for batch in batches
    )  # fmt: skip


def default_runtimes(device: Device) -> tuple[str, ...]:
    """What engines are run in by default: on NVIDIA's GPUs also TensorRT, where it is installed."""
    tensorrt = device.torch_device == "cuda" and runtime_named("tensorrt").available()
    return ("onnxruntime", "tensorrt") if tensorrt else ("onnxruntime",)


def record_of(kind: Kind, device: Device, source: str, started_at: str, **facts: object) -> BuildRecord:
    """The record of an `add` or `install`.

    Args:
        source: where the network or package is from.
        facts: the fields of `BuildRecord` that follow from what is registered.
    """
    manifest: Mapping[str, object] = {
        "schema_version": 1,
        "source": source,
        "machine": {
            "host": socket.gethostname(), "system": platform.platform(), "device": device.hardware, "processes": 1,
        },
    }  # fmt: skip
    return BuildRecord(
        device=device.name, kind=kind, command=command_line(), versions=versions(),
        hardware=device.hardware, started_at=started_at, finished_at=now(), manifest=manifest, **facts,  # type: ignore[arg-type]
    )  # fmt: skip


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

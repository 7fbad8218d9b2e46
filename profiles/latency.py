"""Latency of an engine in onnxruntime, measured as a user would call it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter_ns

import numpy as np
import onnxruntime

from klas_zoo.errors import ExportError
from klas_zoo.profiles.devices import Device, first_line, open_session, physical_cores
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.timing import no_garbage_collection


def measure(
    engine: Path,
    *,
    device: Device,
    input_shape: tuple[int, ...],
    batch: int = 1,
    threads: int | None = None,
    warmup_ms: float = 200,
    min_runs: int = 50,
    min_ms: float = 500,
    max_ms: float = 60_000,
) -> LatencyRecord:
    """Times an engine: numpy images in, numpy logits out, copies to and from a device included.

    The session is alive in here only: two live sessions spin on the same cores and slow each
    other down. `warmup_ms`, `min_runs`, `min_ms` and `max_ms` are those of `time_runs`.

    Args:
        input_shape: (C, H, W) of one image.
        threads: that compute one operator; None: one for each physical core.

    Raises:
        ExportError: onnxruntime cannot load the engine, or run it on such images.
        KlasZooError: the device's provider does not start.
    """
    threads = threads or physical_cores()
    session = open_session(engine, device.provider, threads)
    # spread like normalised photographs: on zeros, arithmetic and caches behave unlike on images
    images = np.random.default_rng(0).standard_normal((batch, *input_shape), dtype=np.float32)
    feed = {session.get_inputs()[0].name: images}
    try:
        session.run(None, feed)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise ExportError(f"onnxruntime cannot run {engine} on {images.shape}: {first_line(error)}") from error
    runs_ms = time_runs(
        lambda: session.run(None, feed), warmup_ms=warmup_ms, min_runs=min_runs, min_ms=min_ms, max_ms=max_ms
    )
    p50_ms, p90_ms, p99_ms = np.percentile(runs_ms, (50, 90, 99))
    return LatencyRecord(
        device=device.name,
        hardware=device.hardware,
        runtime="onnxruntime",
        runtime_version=onnxruntime.__version__,
        provider=device.provider,
        precision="fp32",  # the only one this version exports
        threads=threads,
        batch=batch,
        shape=images.shape,
        runs=len(runs_ms),
        min_ms=float(runs_ms.min()),
        p50_ms=float(p50_ms),
        p90_ms=float(p90_ms),
        p99_ms=float(p99_ms),
        coefficient_of_variation=float(runs_ms.std() / runs_ms.mean()),
        origin="measured",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def time_runs(
    run: Callable[[], object], *, warmup_ms: float, min_runs: int, min_ms: float, max_ms: float
) -> np.ndarray:
    """Milliseconds of every run after a warm-up of `warmup_ms`, in order, (runs,).

    There are at least `min_runs`, and they last at least `min_ms` together, unless `max_ms` is over
    first. All of them count, outliers too: a server meets those as well.
    """
    start = perf_counter_ns()
    while perf_counter_ns() - start < warmup_ms * 1e6:
        run()
    runs_ns: list[int] = []
    with no_garbage_collection():
        start = perf_counter_ns()
        while True:
            before = perf_counter_ns()
            run()
            after = perf_counter_ns()
            runs_ns.append(after - before)
            elapsed_ms = (after - start) / 1e6
            if elapsed_ms >= max_ms or (elapsed_ms >= min_ms and len(runs_ns) >= min_runs):
                return np.array(runs_ns) / 1e6

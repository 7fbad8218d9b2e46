"""What is timed, how often, and what becomes of the times; no test here depends on how long it takes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from klas_zoo.errors import ExportError
from klas_zoo.profiles import latency
from klas_zoo.profiles.devices import CPU_PROVIDER, Device, physical_cores
from klas_zoo.profiles.latency import measure, time_runs

CPU = Device(name="cpu", provider=CPU_PROVIDER, torch_device="cpu", hardware="an abacus")
AT_ONCE = {"warmup_ms": 0, "min_ms": 0, "min_runs": 5}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """(B, 3, 8, 8) → (B, 3), the mean of every channel."""
    text = """<ir_version: 10, opset_import: ["": 20]>
    means (float[batch, 3, 8, 8] pictures) => (float[batch, 3] logits) {
        pooled = GlobalAveragePool(pictures)
        logits = Flatten(pooled)
    }"""
    file = tmp_path / "means.onnx"
    onnx.save(onnx.parser.parse_model(text), file)
    return file


class Clock:
    """Nanoseconds that pass only while something runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns, self.runs = 0, 0
        monkeypatch.setattr(latency, "perf_counter_ns", lambda: self.now_ns)

    def lasting(self, *durations_ms: float) -> Callable[[], None]:
        """A run that lasts these times in turn, the last one for ever."""

        def run() -> None:
            self.now_ns += int(1e6 * durations_ms[min(self.runs, len(durations_ms) - 1)])
            self.runs += 1

        return run


def test_a_fast_engine_runs_until_the_least_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    runs_ms = time_runs(clock.lasting(2), warmup_ms=0, min_runs=50, min_ms=500, max_ms=10_000)
    assert runs_ms.tolist() == [2.0] * 250


def test_a_slow_engine_runs_as_often_as_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(time_runs(clock.lasting(100), warmup_ms=0, min_runs=50, min_ms=500, max_ms=10_000)) == 50


def test_no_engine_runs_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(time_runs(clock.lasting(4000), warmup_ms=0, min_runs=50, min_ms=500, max_ms=10_000)) == 3


def test_the_warm_up_is_not_counted_and_outliers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run = clock.lasting(90, 60, 60, 1, 1000, 2)
    runs_ms = time_runs(run, warmup_ms=200, min_runs=4, min_ms=0, max_ms=10_000)
    assert runs_ms.tolist() == [1, 1000, 2, 2]


def test_the_garbage_collector_rests_while_runs_are_timed() -> None:
    seen = []
    time_runs(lambda: seen.append(gc.isenabled()), warmup_ms=0, min_runs=3, min_ms=0, max_ms=10)
    assert seen == [False] * len(seen)
    assert gc.isenabled()
    gc.disable()
    try:
        time_runs(lambda: None, warmup_ms=0, min_runs=1, min_ms=0, max_ms=10)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_record_says_what_was_measured_on_what(engine: Path) -> None:
    record = measure(engine, device=CPU, input_shape=(3, 8, 8), batch=4, threads=1, **AT_ONCE)
    assert (record.device, record.hardware, record.provider) == ("cpu", "an abacus", CPU_PROVIDER)
    assert (record.runtime, record.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert (record.precision, record.origin) == ("fp32", "measured")
    assert (record.batch, record.shape, record.threads) == (4, (4, 3, 8, 8), 1)
    assert record.runs == 5
    assert 0 < record.min_ms <= record.p50_ms <= record.p90_ms <= record.p99_ms
    assert datetime.fromisoformat(record.measured_at).tzinfo is not None
    assert all(type(value) is float for name, value in vars(record).items() if name.endswith("_ms"))


def test_statistics_are_those_of_all_runs(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_ms = np.arange(1.0, 102.0)  # 1 … 101: percentiles fall on runs
    monkeypatch.setattr(latency, "time_runs", lambda run, **_: runs_ms)
    record = measure(engine, device=CPU, input_shape=(3, 8, 8), threads=1)
    assert (record.runs, record.min_ms, record.p50_ms, record.p90_ms, record.p99_ms) == (101, 1, 51, 91, 100)
    assert record.coefficient_of_variation == pytest.approx(((101**2 - 1) / 12) ** 0.5 / 51)


def test_threads_that_nobody_named_are_written_down_as_a_number(engine: Path) -> None:
    assert measure(engine, device=CPU, input_shape=(3, 8, 8), **AT_ONCE).threads == physical_cores()


def test_the_same_images_that_are_not_zero_are_shown_every_time(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    original = latency.open_session

    class Spy:
        def __init__(self, *arguments: object) -> None:
            self.session = original(*arguments)

        def get_inputs(self) -> list[object]:
            return self.session.get_inputs()

        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            shown.append(feed)
            return self.session.run(names, feed)

    monkeypatch.setattr(latency, "open_session", Spy)
    for _ in range(2):
        measure(engine, device=CPU, input_shape=(3, 8, 8), threads=1, **AT_ONCE)
    first = shown[0]["pictures"]
    assert first.dtype == np.float32
    assert 0.8 < first.std() < 1.2
    assert all((feed["pictures"] == first).all() for feed in shown)


def test_no_session_outlives_its_measurement(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = []
    original = latency.open_session

    def open_session(*arguments: object) -> onnxruntime.InferenceSession:
        session = original(*arguments)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr(latency, "open_session", open_session)
    measure(engine, device=CPU, input_shape=(3, 8, 8), threads=1, **AT_ONCE)
    assert [session() for session in sessions] == [None]


def test_an_engine_that_does_not_take_the_images_is_an_error(engine: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot run .*means\.onnx on \(1, 3, 9, 9\)"):
        measure(engine, device=CPU, input_shape=(3, 9, 9), threads=1, **AT_ONCE)

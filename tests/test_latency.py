"""What is timed, and what becomes of the times; no test here depends on how long anything takes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_engines import means

from klas_zoo.errors import ExportError, UnknownName, UsageError
from klas_zoo.hardware import physical_cores
from klas_zoo.profiles import latency
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import BUILD_METHOD, measure_engine
from klas_zoo.profiles.timing import Method, Runner, Times
from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER, Session
from klas_zoo.runtimes.ort import OnnxSession

CPU = Device(name="cpu", provider=CPU_PROVIDER, torch_device="cpu", hardware="an abacus")
AT_ONCE = Method(warmup_ms=0, min_ms=0, min_runs=5, rounds=1)
FACTS = {"device": CPU, "precision": "fp32", "input_shape": (3, 8, 8)}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return means(tmp_path)


def test_a_record_has_all_conditions_of_its_measurement(engine: Path) -> None:
    record = measure_engine(engine, **FACTS, batch=4, threads=1, method=AT_ONCE)
    assert (record.device, record.hardware, record.provider) == ("cpu", "an abacus", CPU_PROVIDER)
    assert (record.runtime, record.runtime_version) == ("onnxruntime", onnxruntime.__version__)
    assert (record.precision, record.origin, record.options, record.clock) == ("fp32", "measured", "", "host")
    assert (record.batch, record.shape, record.threads) == (4, (4, 3, 8, 8), 1)
    assert record.runs == 5
    assert 0 < record.min_ms <= record.p50_ms <= record.p90_ms <= record.p99_ms
    assert datetime.fromisoformat(record.measured_at).tzinfo is not None
    assert all(type(value) is float for name, value in vars(record).items() if name.endswith("_ms"))


def test_other_options_precisions_and_runtimes_are_in_the_record(engine: Path) -> None:
    facts = {**FACTS, "precision": "int8"}
    record = measure_engine(engine, **facts, options={"session.disable_prepacking": "1"}, method=AT_ONCE)
    assert (record.precision, record.options) == ("int8", '{"session.disable_prepacking":"1"}')
    quiet = measure_engine(engine, **FACTS, spinning=False, method=AT_ONCE)
    assert quiet.conditions.options == '{"session.intra_op.allow_spinning":"0"}'
    pytest.importorskip("openvino")
    other = measure_engine(engine, **FACTS, runtime="openvino", threads=1, method=AT_ONCE)
    assert (other.runtime, other.provider, other.threads) == ("openvino", "CPU", 1)
    usual = measure_engine(engine, **FACTS, threads=1, method=AT_ONCE)
    assert other.conditions.comparable == usual.conditions.comparable


def test_a_runtime_that_does_not_run_on_the_device_is_refused(engine: Path) -> None:
    with pytest.raises(UsageError, match="tensorrt runs on cuda, not on cpu"):
        measure_engine(engine, **FACTS, runtime="tensorrt")
    with pytest.raises(UnknownName, match="Unknown runtime 'onnxrutime': did you mean onnxruntime"):
        measure_engine(engine, **FACTS, runtime="onnxrutime")


def test_the_provider_of_the_device_is_used(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def refuse(*_: object, **options: object) -> Session:
        opened.append(options["provider"])
        raise ExportError("not here")

    monkeypatch.setattr(latency, "open_engine", refuse)
    gpu = Device(name="a100", provider=CUDA_PROVIDER, torch_device="cuda", hardware="made up")
    for runtime in ("onnxruntime", "tensorrt", "torch"):
        with pytest.raises(ExportError):
            measure_engine(engine, **{**FACTS, "device": gpu}, runtime=runtime)
    assert opened == [CUDA_PROVIDER, "tensorrt", "cuda"]


def test_statistics_are_those_of_all_runs(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Method] = []

    def timed(runners: Mapping[str, Runner], method: Method) -> dict[str, Times]:
        asked.append(method)
        return {key: Times(host_ms=np.arange(1.0, 102.0)) for key in runners}  # 1 … 101: percentiles fall on runs

    monkeypatch.setattr(latency, "time_in_turn", timed)
    record = measure_engine(engine, **FACTS, threads=1)
    assert (record.runs, record.min_ms, record.p50_ms, record.p90_ms, record.p99_ms) == (101, 1, 51, 91, 100)
    assert record.coefficient_of_variation == pytest.approx(((101**2 - 1) / 12) ** 0.5 / 51)
    assert asked == [BUILD_METHOD]


def test_the_default_number_of_threads_is_recorded_as_a_number(engine: Path) -> None:
    assert measure_engine(engine, **FACTS, method=AT_ONCE).threads == physical_cores()


def test_the_same_images_that_are_not_zero_are_shown_every_time(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    original = OnnxSession.run

    def run(session: OnnxSession, images: np.ndarray) -> np.ndarray:
        shown.append(images)
        return original(session, images)

    monkeypatch.setattr(OnnxSession, "run", run)
    for _ in range(2):
        measure_engine(engine, **FACTS, threads=1, method=AT_ONCE)
    assert len(shown) >= 10 and shown[0].dtype == np.float32
    assert 0.8 < shown[0].std() < 1.2
    assert all((images == shown[0]).all() for images in shown)


def test_no_session_outlives_its_measurement(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = []
    original = latency.open_engine

    def opened(*arguments: object, **options: object) -> Session:
        session = original(*arguments, **options)
        sessions.append((session, weakref.ref(session.raw)))
        return session

    monkeypatch.setattr(latency, "open_engine", opened)
    measure_engine(engine, **FACTS, threads=1, method=AT_ONCE)
    assert [(session.raw, raw()) for session, raw in sessions] == [(None, None)]


def test_an_engine_that_does_not_take_the_images_is_an_error(engine: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot run .*means\.onnx on \(1, 3, 9, 9\)"):
        measure_engine(engine, device=CPU, precision="fp32", input_shape=(3, 9, 9), threads=1, method=AT_ONCE)

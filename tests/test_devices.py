"""Devices: their names, what is said when one is not there, and how onnxruntime is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from klas_zoo.errors import ExportError, KlasZooError, UnknownName, UsageError
from klas_zoo.profiles import devices
from klas_zoo.profiles.devices import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    known_devices,
    open_session,
    physical_cores,
    resolve_device,
)


def test_the_cpu_is_there_on_every_machine_and_described() -> None:
    device = resolve_device("cpu")
    assert (device.name, device.provider, device.torch_device) == ("cpu", CPU_PROVIDER, "cpu")
    assert f"{physical_cores()} core" in device.hardware


def test_a_processor_is_described_by_model_cores_and_what_makes_networks_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = "flags\t\t: sse avx2 avx512f avx2x amx_bf16\n"
    text = f"processor : 0\nmodel name\t: Fast CPU 9\n{flags}processor : 1\nmodel name : other\n"
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    monkeypatch.setattr(devices, "physical_cores", lambda: 4)
    assert devices.describe_cpu() == "Fast CPU 9, 4 cores, avx2 avx512f amx_bf16"


def test_a_machine_without_proc_has_a_description_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(devices.platform, "processor", lambda: "m9")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert devices.describe_cpu() == "m9, 1 core"


def test_hyper_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {"cpu0": "0,2", "cpu1": "1,3", "cpu2": "0,2", "cpu3": "1,3"}
    monkeypatch.setattr(Path, "read_text", lambda path: siblings[path.parts[-3]])
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert physical_cores() == 2
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    assert physical_cores() == 1


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Unknown device 'cudda': did you mean cuda") as caught:
        resolve_device("cudda")
    assert isinstance(caught.value, UsageError)
    assert known_devices() == ("cpu", "cuda")


def test_cuda_where_there_is_none_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KlasZooError, match="has no CUDA device that torch can use; --device cpu"):
        resolve_device("cuda")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, started: str) -> list[object]:
    """A GPU for torch, and an onnxruntime that starts `started` whatever it is asked for."""
    asked: list[object] = []

    def session(engine: object, options: object, *, providers: object, **_: object) -> SimpleNamespace:
        asked.append(providers)
        return SimpleNamespace(get_providers=lambda: [started])

    gpu = SimpleNamespace(name="NVIDIA Imaginary", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    return asked


def test_a_gpu_is_described_and_computes_in_full_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretend_gpu(monkeypatch, CUDA_PROVIDER)
    device = resolve_device("cuda")
    assert (device.name, device.provider, device.torch_device) == ("cuda", CUDA_PROVIDER, "cuda")
    assert device.hardware.startswith("NVIDIA Imaginary, compute capability 9.0, 139 GiB")
    assert asked == [[(CUDA_PROVIDER, {"use_tf32": "0"}), CPU_PROVIDER]]


def test_a_provider_that_onnxruntime_silently_replaces_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, CPU_PROVIDER)
    with pytest.raises(KlasZooError, match=r"CUDAExecutionProvider does not start here: pip install 'onnxruntime-gpu"):
        resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
def test_a_real_gpu_is_found() -> None:
    assert "compute capability" in resolve_device("cuda").hardware


def test_a_session_has_the_threads_that_were_asked_for() -> None:
    engine = devices._smallest_engine()
    assert open_session(engine, CPU_PROVIDER, 1).get_session_options().intra_op_num_threads == 1
    default = open_session(engine, CPU_PROVIDER, None).get_session_options()
    assert default.intra_op_num_threads == physical_cores()


def test_a_file_that_is_no_engine_is_an_error_that_names_it(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load .*broken\.onnx: .*INVALID_PROTOBUF"):
        open_session(broken, CPU_PROVIDER, 1)
    with pytest.raises(ExportError, match=r"cannot load .*gone\.onnx: .*NO_SUCHFILE"):
        open_session(tmp_path / "gone.onnx", CPU_PROVIDER, 1)


def test_asking_for_the_cpu_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from klas_zoo.profiles.devices import resolve_device; resolve_device('cpu');"
        "sys.exit(bool({'torch', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})

"""Devices: their names, what is said when one is not there, and how onnxruntime is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from klas_zoo import hardware
from klas_zoo.errors import AbsentDevice, KlasZooError, UnknownName, UsageError
from klas_zoo.gpus import Gpu
from klas_zoo.hardware import physical_cores
from klas_zoo.profiles import devices
from klas_zoo.profiles.devices import Device, check_provider, resolve_device
from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER


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
    monkeypatch.setattr(hardware, "physical_cores", lambda: 4)
    assert hardware.describe_cpu() == "Fast CPU 9, 4 cores, avx2 avx512f amx_bf16"


def test_a_machine_without_proc_has_a_description_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_file(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", no_such_file)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "m9")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert hardware.describe_cpu() == "m9, 1 core"


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Unknown device 'cudda': did you mean cuda") as caught:
        resolve_device("cudda")
    assert isinstance(caught.value, UsageError)


def test_cuda_where_there_is_none_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "visible_gpus", lambda: ())
    with pytest.raises(AbsentDevice, match=r"has no CUDA device \(.*\); --device cpu works everywhere"):
        resolve_device("cuda")


def test_a_gpu_has_its_own_name_and_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(name="NVIDIA Imaginary 9", uuid="GPU-0", memory_bytes=139 * 2**30, capability="9.0", processors=1)
    monkeypatch.setattr(devices, "visible_gpus", lambda: (gpu,))
    for name in ("cuda", "imaginary-9"):
        device = resolve_device(name)
        assert (device.name, device.provider, device.kind) == ("imaginary-9", CUDA_PROVIDER, "cuda")
        assert device.hardware.startswith("NVIDIA Imaginary 9, compute capability 9.0, 139 GiB")


def test_a_provider_that_does_not_start_is_refused_before_any_work() -> None:
    device = Device(name="h200", provider="NoSuchExecutionProvider", torch_device="cuda", hardware="")
    with pytest.raises(KlasZooError, match=r"NoSuchExecutionProvider does not compute here: .*klas-zoo doctor"):
        check_provider(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
def test_a_real_gpu_is_found() -> None:
    assert "compute capability" in resolve_device("cuda").hardware


def test_asking_for_the_cpu_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from klas_zoo.profiles.devices import resolve_device; resolve_device('cpu');"
        "sys.exit(bool({'torch', 'onnxruntime', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})

"""What goes wrong with GPUs, on a driver that makes it go wrong: one sentence with the cause and what mends it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from fake_cuda import Card

from klas_zoo.hardware import present_gpu
from klas_zoo.profiles.store import ProfileStore

PROFILE = ("-m", "klas_zoo", "profile", "--family", "deit-micro", "--device", "cuda")
QUICK = ("--min-runs", "2", "--min-ms", "0", "--warmup-ms", "0", "--rounds", "1", "--stitches", "1")
EXCLUSIVE = (
    "NVIDIA A100-SXM4-80GB takes one process at a time (compute mode EXCLUSIVE_PROCESS), and another may hold it: "
    "nvidia-smi lists it; nvidia-smi -c DEFAULT lets several in"
)

in_both = pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("torch", marks=pytest.mark.slow)])


def refused(done: Any, registry: Path) -> str:
    """The one sentence of a command that wrote nothing."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("Error: ")]
    assert not registry.exists()
    return str(line.removeprefix("Error: "))


def profiled(driver: Path, registry: Path, *options: str, card: Card | None = None, **extra: str) -> str:
    done = fake_cuda.run(driver, *PROFILE, *QUICK, "--registry", str(registry), *options, card=card, **extra)
    return refused(done, registry)


@pytest.mark.skipif(present_gpu() is not None, reason="there is a driver")
def test_a_machine_without_a_driver(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from klas_zoo.cli import main

    found = CliRunner().invoke(main, [*PROFILE[2:], "--registry", str(tmp_path / "r")])
    assert found.exit_code == 1
    assert found.stderr.strip() == (
        "Error: This machine has no CUDA device (there is no NVIDIA driver: libcuda.so.1 is not found); "
        "--device cpu works everywhere."
    )


def test_cudnn_that_is_not_installed(driver: Path, tmp_path: Path) -> None:
    import onnxruntime

    # onnxruntime looks for NVIDIA's packages beside its own folder
    site, real = tmp_path / "site", Path(onnxruntime.__file__).parent
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for link in ("onnxruntime", *(f"nvidia/{one.name}" for one in (real.parent / "nvidia").iterdir())):
        if link != "nvidia/cudnn":
            (site / link).parent.mkdir(parents=True, exist_ok=True)
            (site / link).symlink_to(real.parent / link)
    without = [one for one in fake_cuda.environment(driver)["LD_PRELOAD"].split() if "cudnn" not in one]
    for one in without:
        (libraries / Path(one).name).symlink_to(one)
    given = {"PYTHONPATH": str(site), "LD_PRELOAD": " ".join(without), "LD_LIBRARY_PATH": str(libraries)}
    assert profiled(driver, tmp_path / "r", **given) == (
        "onnxruntime's CUDAExecutionProvider does not compute here: cuDNN is not found: pip install "
        "'onnxruntime-gpu[cuda,cudnn]' brings it. klas-zoo doctor lists what does not fit together."
    )


@in_both
def test_a_driver_of_cuda_12_with_packages_for_cuda_13(runtime: str, driver: Path, tmp_path: Path) -> None:
    said = profiled(driver, tmp_path / "r", "--runtime", runtime, card=Card(cuda="12.2"))
    assert (
        "the NVIDIA driver runs CUDA up to 12.2, and this package was compiled for CUDA 13.0: update the driver, or "
        "install packages for CUDA 12." in said
    )


OPENED = """
import onnx
from klas_zoo.errors import KlasZooError
from klas_zoo.runtimes import CUDA_PROVIDER, open_engine
from klas_zoo.runtimes.trial import _GRAPH
try:
    open_engine(onnx.parser.parse_model(_GRAPH).SerializeToString(), provider=CUDA_PROVIDER)
except KlasZooError as error:
    print(json.dumps(str(error)))
"""


def test_an_engine_that_is_opened_with_a_driver_too_old(driver: Path) -> None:
    assert fake_cuda.answer(driver, OPENED, Card(cuda="12.2")) == (
        "onnxruntime's CUDAExecutionProvider does not start here: the NVIDIA driver runs CUDA up to 12.2, and this "
        "package was compiled for CUDA 13.0: update the driver, or install packages for CUDA 12."
    )


@in_both
def test_a_card_that_a_package_has_no_kernels_for(runtime: str, driver: Path, tmp_path: Path) -> None:
    card = Card(name="NVIDIA B200", memory_mib=183359, capability="10.0", kernels=False)
    said = profiled(driver, tmp_path / "r", "--runtime", runtime, card=card)
    assert (
        "this package has no kernels for NVIDIA B200 (compute capability 10.0): install one that has, or take another "
        "--runtime." in said
    )


@in_both
def test_a_card_in_exclusive_mode_that_another_process_holds(runtime: str, driver: Path, tmp_path: Path) -> None:
    with (tmp_path / "card-0").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        said = profiled(driver, tmp_path / "r", "--runtime", runtime, card=Card(exclusive=tmp_path))
    assert EXCLUSIVE in said


@pytest.mark.slow
def test_a_batch_that_does_not_fit_keeps_what_was_measured_and_goes_on(driver: Path, tmp_path: Path) -> None:
    asked = (*PROFILE, *QUICK, "--runtime", "torch", "--batch", "1,4096,2", "--json", "--registry", str(tmp_path))
    done = fake_cuda.run(driver, *asked, card=Card(memory_mib=384))
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(done.stdout)
    assert first["networks"] and third["networks"]
    assert not second["networks"]
    assert second["failure"].startswith("torch is out of memory: ")
    assert second["failure"].endswith("unallocated.")  # without torch's advice on settings of its own
    assert "Traceback" not in done.stderr and f"Batch 4096: {second['failure']}" in " ".join(done.stderr.split())
    assert len(ProfileStore.of(tmp_path).profiles("deit-micro")) == 3

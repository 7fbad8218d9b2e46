"""What an installation is said to be and to lack, on folders of packages like the ones pip makes."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from klas_zoo.cli import main
from klas_zoo.doctor.checks import EXTRAS, diagnose, extras
from klas_zoo.doctor.installation import Installation, read_installation

ROOT = Path(__file__).parent.parent
NEEDS = ("torch>=2.11", "torchvision", "onnxruntime-gpu>=1.27")
OWN = (*NEEDS, 'tensorrt>=10; extra == "tensorrt"', 'ruff; extra == "dev"')
Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Puts a package into the folder `tmp_path`, with files that say what it was compiled for."""

    def add(name: str, version: str, requires: tuple[str, ...] = (), **files: str | bytes) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {one}" for one in requires)]
        (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
        for path, content in files.items():
            file = tmp_path / path.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return add


@pytest.fixture
def healthy(add: Add, tmp_path: Path) -> Path:
    """What `pip install klas-zoo` gives on a machine without a GPU."""
    add("klas-zoo", "0.1.0", OWN)
    add("torch", "2.14.1", **{"torch__version.py": "cuda: Optional[str] = '13.0'\n"})
    add("torchvision", "0.29.1", ("torch (>=2.14.0)",), **{"torchvision__version.py": "__version__ = '0.29.1+cu130'\n"})
    add(
        "onnxruntime-gpu", "1.31.1",
        **{
            "onnxruntime__capi__build_and_package_info.py": "package_name = 'onnxruntime-gpu'\ncuda_version = '13.0'\n",
            "onnxruntime__capi__libonnxruntime_providers_tensorrt.so": b"\x7fELF\0libnvinfer.so.10\0",
        },
    )  # fmt: skip
    return tmp_path


def _read(folder: Path) -> Installation:
    """Of that folder, on a machine without a GPU wherever this test runs."""
    return replace(read_installation([str(folder)]), gpus=(), driver=None, driver_cuda=None)


def _said(found: Installation) -> str:
    return " ".join(f"{one.what} {one.mend}" for one in diagnose(found))


def test_what_packages_were_compiled_for_is_read_without_importing_them(healthy: Path) -> None:
    before = set(sys.modules)
    found = _read(healthy)
    assert (found.torch_cuda, found.vision_build) == ("13.0", "cu130")
    assert (found.onnxruntime_cuda, found.nvinfer) == ("13.0", 10)
    assert found.packages["torchvision"] == "0.29.1"
    assert not {"torch", "torchvision", "onnxruntime"} & (set(sys.modules) - before)


def test_a_healthy_installation_has_no_problem(healthy: Path) -> None:
    assert diagnose(_read(healthy)) == []


def test_a_cpu_torch_beside_the_indexs_torchvision_is_explained(healthy: Path) -> None:
    (healthy / "torch" / "version.py").write_text("cuda: Optional[str] = None\n")
    said = _said(_read(healthy))
    assert "is the cpu build and torchvision 0.29.1 the cu130 build: torchvision's operators are missing" in said
    assert "pip install --force-reinstall torch torchvision" in said


INFO = "onnxruntime/capi/build_and_package_info.py"


def test_both_onnxruntimes_in_one_environment_are_explained_by_whose_files_are_there(healthy: Path, add: Add) -> None:
    add("onnxruntime", "1.32.0")
    said = _said(_read(healthy))
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed; they are one module" in said
    assert "what is there now is onnxruntime-gpu, which was compiled for CUDA 13.0" in said
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in said
    (healthy / INFO).write_text("package_name = 'onnxruntime'\n__version__ = '1.32.0'\n")
    assert "what is there now is onnxruntime, which has no CUDA" in _said(_read(healthy))
    (healthy / INFO).unlink()
    assert "neither is complete, and onnxruntime cannot be imported" in _said(_read(healthy))


def test_an_onnxruntime_whose_files_were_uninstalled_with_another_is_explained(healthy: Path) -> None:
    (healthy / INFO).unlink()
    said = _said(_read(healthy))
    assert "onnxruntime-gpu 1.31.1 is installed, but its files are not there" in said
    assert "pip install --force-reinstall --no-deps onnxruntime-gpu" in said


def test_either_onnxruntime_is_what_klas_zoo_needs(healthy: Path, add: Add) -> None:
    (healthy / "onnxruntime_gpu-1.31.1.dist-info" / "METADATA").unlink()
    assert "klas-zoo needs onnxruntime-gpu>=1.27, and no onnxruntime-gpu is installed" in _said(_read(healthy))
    add("onnxruntime", "1.32.0")
    (healthy / INFO).write_text("package_name = 'onnxruntime'\n")
    assert diagnose(_read(healthy)) == []


def test_a_gpu_without_cudas_libraries_is_explained_where_there_is_no_torch(healthy: Path, add: Add) -> None:
    for name in ("torch-2.14.1", "torchvision-0.29.1"):
        (healthy / f"{name}.dist-info" / "METADATA").unlink()
    (healthy / "klas_zoo-0.1.0.dist-info" / "METADATA").unlink()
    add("klas-zoo", "0.1.1", ("onnxruntime-gpu>=1.27",))
    assert diagnose(_read(healthy)) == []  # of a machine without a GPU
    found = replace(_read(healthy), gpus=("NVIDIA L4",), driver="580.1", driver_cuda=(13, 0))
    assert "needs the libraries of CUDA 13, which are not installed" in _said(found)
    assert "pip install 'klas-zoo[gpu]'" in _said(found)
    add("nvidia-cudnn-cu13", "9.28")
    assert diagnose(replace(_read(healthy), gpus=("NVIDIA L4",), driver="580.1", driver_cuda=(13, 0))) == []


def test_a_tensorrt_the_provider_is_not_linked_with_is_explained(healthy: Path, add: Add) -> None:
    add("tensorrt", "11.1.0.3")
    said = _said(_read(healthy))
    assert "needs TensorRT 10 (libnvinfer.so.10), tensorrt 11.1.0.3 is installed" in said
    assert "pip install 'tensorrt==10.*'" in said


def test_cuda_of_torch_and_onnxruntime_have_to_agree(healthy: Path) -> None:
    (healthy / "torch" / "version.py").write_text("cuda: Optional[str] = '12.8'\n")
    (healthy / "torchvision" / "version.py").write_text("__version__ = '0.29.1+cu128'\n")
    said = _said(_read(healthy))
    assert "needs the libraries of CUDA 13, but torch was compiled for CUDA 12.8" in said
    # an older onnxruntime-gpu would be refused by klas-zoo's own requirement: no advice in a circle
    assert "onnxruntime-gpu<" not in said and "pip install --force-reinstall torch torchvision" in said


@pytest.mark.parametrize(
    ("driver_cuda", "said"),
    [
        ((12, 8), "The driver 570.1 runs CUDA up to 12.8, torch was compiled for CUDA 13.0"),
        (None, "There is a GPU (NVIDIA L4), but no driver library"),
        ((13, 0), ""),
        ((14, 1), ""),
    ],
)
def test_a_driver_too_old_for_torch_is_explained(
    healthy: Path, driver_cuda: tuple[int, int] | None, said: str
) -> None:
    found = replace(_read(healthy), gpus=("NVIDIA L4",), driver="570.1", driver_cuda=driver_cuda)
    assert said in _said(found)
    assert bool(_said(found)) == bool(said)


def test_a_version_that_a_package_does_not_take_is_named_with_the_command(healthy: Path, add: Add) -> None:
    (healthy / "torch-2.14.1.dist-info" / "METADATA").unlink()
    add("torch", "2.13.0")
    said = _said(_read(healthy))
    assert "torchvision needs torch>=2.14.0, and torch 2.13.0 is installed. pip install 'torch>=2.14.0'" in said


def test_a_package_that_is_missing_is_named(healthy: Path) -> None:
    (healthy / "torch-2.14.1.dist-info" / "METADATA").unlink()
    assert "klas-zoo needs torch>=2.11, and no torch is installed" in _said(_read(healthy))


def test_each_extra_says_what_it_would_bring(healthy: Path, add: Add) -> None:
    add("ruff", "0.6")
    development, tensorrt = extras(_read(healthy))
    assert (development.name, development.missing) == ("dev", ())
    assert tensorrt.missing == ("tensorrt",)
    assert tensorrt.command == "pip install 'klas-zoo[tensorrt]'"


def test_an_extra_of_a_package_with_extras_lacks_what_these_bring(healthy: Path, add: Add) -> None:
    for name in ("klas_zoo-0.1.0", "onnxruntime_gpu-1.31.1"):
        (healthy / f"{name}.dist-info" / "METADATA").unlink()
    add("klas-zoo", "0.1.1", ('onnxruntime-gpu[cudnn]>=1.27; extra == "gpu"',))
    (gpu,) = extras(_read(healthy))
    assert gpu.missing == ("onnxruntime-gpu[cudnn]>=1.27",)
    add("onnxruntime-gpu", "1.32", ('nvidia-cudnn-cu13~=9.0; extra == "cudnn"', 'sympy; extra == "symbolic"'))
    assert extras(_read(healthy))[0].missing == ("nvidia-cudnn-cu13",)
    add("nvidia-cudnn-cu13", "9.28")
    assert extras(_read(healthy))[0].missing == ()


def test_every_extra_of_the_project_is_described() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys()


def test_the_command_tells_people_and_machines_the_same_of_this_environment() -> None:
    people = CliRunner().invoke(main, ["doctor"], catch_exceptions=False)
    machines = CliRunner().invoke(main, ["doctor", "--json"], catch_exceptions=False)
    answer = json.loads(machines.stdout)
    assert people.exit_code == machines.exit_code == (1 if answer["problems"] else 0)
    assert answer["packages"]["torch"] in people.stdout
    assert "CPUExecutionProvider" in people.stdout and "CPUExecutionProvider" in answer["providers"]
    for problem in answer["problems"]:
        assert problem["mend"] in people.stdout

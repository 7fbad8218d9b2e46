"""What is installed, read from files: nothing is imported that could be broken.

A torch that does not import is just what `klas-zoo doctor` has to explain, so versions come from
packages' metadata, and what a library was compiled for from the files it lies in.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.doctor.kernels import capabilities
from klas_zoo.gpus import driver_cuda, visible_gpus

_DRIVER = Path("/proc/driver/nvidia")


@dataclass(frozen=True, kw_only=True)
class Installation:
    """Of one Python environment and the machine below it.

    Attributes:
        packages: version of every installed package, by its normalised name (`onnxruntime-gpu`).
        requires: what each package asks for, as its metadata has it.
        torch_cuda: CUDA version torch was compiled for; None: for the CPU, or no torch.
        vision_build: of torchvision, `cu130` or `cpu`; None where it does not say.
        onnxruntime_package: whose files the module onnxruntime consists of; None: it has none.
        onnxruntime_cuda: CUDA version onnxruntime was compiled for.
        nvinfer: major version of the TensorRT that onnxruntime's provider is linked with.
        kernels: compute capabilities that onnxruntime's CUDA provider has kernels for; empty without that provider.
        gpus: models, as the driver reports them.
        capabilities: of the GPUs that this process sees.
        driver: its version.
        driver_cuda: the newest CUDA it runs, (major, minor).
    """

    python: str
    system: str
    packages: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]]
    torch_cuda: str | None
    vision_build: str | None
    onnxruntime_package: str | None
    onnxruntime_cuda: str | None
    nvinfer: int | None
    gpus: tuple[str, ...]
    kernels: tuple[str, ...]
    capabilities: tuple[str, ...]
    driver: str | None
    driver_cuda: tuple[int, int] | None


def read_installation(path: Iterable[str] | None = None) -> Installation:
    """Reads what is installed in folders of packages, `sys.path` by default."""
    folders = list(sys.path if path is None else path)
    packages: dict[str, str] = {}
    requires: dict[str, tuple[str, ...]] = {}
    for one in importlib.metadata.distributions(path=folders):
        name = one.metadata["Name"]
        if name and normal(name) not in packages:  # the first on the path is the one that is imported
            packages[normal(name)] = one.version
            requires[normal(name)] = tuple(one.requires or ())
    runtime = "onnxruntime/capi/build_and_package_info.py"
    # /proc/driver/nvidia is missing on WSL2, on Jetson and in many containers: the driver's library is asked first
    visible, provider = visible_gpus(), _find(folders, "onnxruntime/capi/libonnxruntime_providers_cuda.so")
    return Installation(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        requires=requires,
        torch_cuda=_value(folders, "torch/version.py", "cuda"),
        vision_build=_value(folders, "torchvision/version.py", "__version__", r"[^'\"]*\+(cu\d+|cpu)"),
        onnxruntime_package=_value(folders, runtime, "package_name", r"([\w-]+)"),
        onnxruntime_cuda=_value(folders, runtime, "cuda_version"),
        nvinfer=_linked_nvinfer(folders),
        gpus=tuple(one.name for one in visible) or _gpus(),
        kernels=capabilities(provider) if provider and visible else (),
        capabilities=tuple(one.capability for one in visible),
        driver=_driver(),
        driver_cuda=driver_cuda(),
    )


def normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _find(folders: Iterable[str], name: str) -> Path | None:
    return next((file for folder in folders if (file := Path(folder or ".", name)).is_file()), None)


def _value(folders: Iterable[str], name: str, variable: str, form: str = r"([\d.]+)") -> str | None:
    """What a Python file assigns to a variable, without running it."""
    file = _find(folders, name)
    assignment = rf"^{variable}\b[^=\n]*=\s*['\"]{form}['\"]"
    found = file and re.search(assignment, file.read_text(errors="replace"), re.MULTILINE)
    return found[1] if found else None


def _linked_nvinfer(folders: Iterable[str]) -> int | None:
    file = _find(folders, "onnxruntime/capi/libonnxruntime_providers_tensorrt.so")
    found = file and re.search(rb"libnvinfer\.so\.(\d+)", file.read_bytes())
    return int(found[1]) if found else None


def _gpus() -> tuple[str, ...]:
    models = []
    for file in sorted(_DRIVER.glob("gpus/*/information")):
        models += re.findall(r"^Model:\s*(.+)$", file.read_text(), re.MULTILINE)
    return tuple(models)


def _driver() -> str | None:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", (_DRIVER / "version").read_text())
    except OSError:
        return None
    return found[1] if found else None

"""What of an installation cannot work together, and what would mend it. Changes nothing.

Each check is a pure function of what is installed; the list `CHECKS` is all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from klas_zoo.doctor.installation import Installation, normal

OWN = "klas-zoo"
# what an extra is for, for people; a test compares the names with the package's metadata
EXTRAS = {
    "datasets": "images from data sets of the datasets library",
    "dev": "the checks and tests of klas-zoo itself",
    "gs": "registries in Google Cloud Storage",
    "hf": "registries on Hugging Face",
    "kserve": "a family as a model of KServe's server",
    "mlserver": "a family as a model of MLServer",
    "nvml": "clocks, temperature and energy of NVIDIA GPUs",
    "remote": "registries at remote places, by fsspec",
    "s3": "registries in S3",
    "tensorboard": "curves of a build's progress",
    "tensorrt": "engines for this machine's NVIDIA GPU (its licence is proprietary)",
    "tensorrt-rtx": "engines for NVIDIA GPUs, built without one (its licence is proprietary)",
    "webdataset": "images from webdataset shards",
}
# the rest of what is installed is none of our business
SHOWN = (
    OWN, "torch", "torchvision", "timm", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "tensorrt", "tensorrt-rtx-cu12", "tensorrt-rtx-cu13",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`what` cannot work, a sentence or two, and the command that would `mend` it."""

    what: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class Extra:
    """An optional part: what it adds, and which packages of it are not installed."""

    name: str
    adds: str
    missing: tuple[str, ...]

    @property
    def command(self) -> str:
        return f"pip install '{OWN}[{self.name}]'"


Check = Callable[[Installation], Iterator[Problem]]


def diagnose(installation: Installation) -> list[Problem]:
    """Everything that cannot work together."""
    return [problem for check in CHECKS for problem in check(installation)]


def extras(installation: Installation) -> list[Extra]:
    """Every extra of klas-zoo, with what is missing of it."""
    missing: dict[str, list[str]] = {}
    for text in installation.requires.get(OWN, ()):
        requirement = _requirement(text)
        for name in _extras_of(text):
            wanted = missing.setdefault(name, [])
            if not _satisfied(requirement, installation):
                wanted.append(requirement.name)
    return [
        Extra(name=name, adds=EXTRAS.get(name, "not described"), missing=tuple(found))
        for name, found in sorted(missing.items())
    ]


def two_runtimes(found: Installation) -> Iterator[Problem]:
    both = {"onnxruntime", "onnxruntime-gpu"}
    if both <= found.packages.keys():
        yield Problem(
            what="onnxruntime and onnxruntime-gpu are both installed; they are one module, and the later one "
            "overwrote files of the other.",
            mend="pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    if {"tensorrt-rtx-cu12", "tensorrt-rtx-cu13"} <= found.packages.keys():
        yield Problem(
            what="tensorrt-rtx-cu12 and tensorrt-rtx-cu13 are both installed; they are one module.",
            mend="pip uninstall -y tensorrt-rtx-cu12 tensorrt-rtx-cu13 && pip install 'klas-zoo[tensorrt-rtx]'",
        )


def torchvision_of_another_torch(found: Installation) -> Iterator[Problem]:
    """`operator torchvision::nms does not exist`, when timm imports it."""
    torch = f"cu{found.torch_cuda.replace('.', '')}" if found.torch_cuda else "cpu"
    if "torch" not in found.packages or found.vision_build in (None, torch):
        return
    yield Problem(
        what=f"torch {found.packages['torch']} is the {torch} build and torchvision {found.packages['torchvision']} "
        f"the {found.vision_build} build: torchvision's operators are missing, and timm needs them.",
        mend="pip install --force-reinstall torch torchvision",
    )


def cuda_of_torch_and_onnxruntime(found: Installation) -> Iterator[Problem]:
    """onnxruntime takes CUDA's libraries from the packages torch brings."""
    torch, runtime = _major(found.torch_cuda), _major(found.onnxruntime_cuda)
    if runtime is None or torch == runtime or (torch is None and not found.gpus):
        return
    runs = f"torch was compiled for CUDA {found.torch_cuda}" if torch else "torch was compiled for the CPU"
    mend = "pip install 'onnxruntime-gpu<1.27'" if torch == 12 else "pip install --force-reinstall torch torchvision"
    yield Problem(
        what=f"onnxruntime-gpu {found.packages.get('onnxruntime-gpu', '')} needs the libraries of CUDA {runtime}, but "
        f"{runs}: --device cuda will not start.",
        mend=mend,
    )


def tensorrt_of_onnxruntime(found: Installation) -> Iterator[Problem]:
    """An unpinned `pip install tensorrt` brings a version onnxruntime's provider is not linked with."""
    version = found.packages.get("tensorrt")
    if version and found.nvinfer and _major(version) != found.nvinfer:
        yield Problem(
            what=f"onnxruntime's TensorRT provider needs TensorRT {found.nvinfer} (libnvinfer.so.{found.nvinfer}), "
            f"tensorrt {version} is installed: that provider will not start (klas-zoo's own engines do).",
            mend=f"pip install 'tensorrt=={found.nvinfer}.*'",
        )


def driver_of_torch(found: Installation) -> Iterator[Problem]:
    needed = _major(found.torch_cuda)
    if found.gpus and found.driver_cuda is None:
        yield Problem(
            what=f"There is a GPU ({found.gpus[0]}), but no driver library libcuda.so.1.",
            mend="install NVIDIA's driver; in a container, start it with --gpus all",
        )
    elif found.driver_cuda and needed and found.driver_cuda[0] < needed:
        newest = ".".join(map(str, found.driver_cuda))
        yield Problem(
            what=f"The driver {found.driver or ''} runs CUDA up to {newest}, torch was compiled for CUDA "
            f"{found.torch_cuda}: torch will not see the GPU.",
            mend=f"update NVIDIA's driver to one for CUDA {needed} or later",
        )


def unsatisfied(found: Installation) -> Iterator[Problem]:
    """What klas-zoo, or a package it needs directly, asks for and does not find."""
    own = [_requirement(text) for text in found.requires.get(OWN, ())]
    direct = [normal(requirement.name) for requirement in own if _applies(requirement)]
    for package in dict.fromkeys([OWN, *direct]):
        for text in found.requires.get(package, ()):
            requirement = _requirement(text)
            if not _applies(requirement) or _satisfied(requirement, found):
                continue
            version = found.packages.get(normal(requirement.name))
            there = f"{requirement.name} {version} is installed" if version else f"no {requirement.name} is installed"
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Problem(what=f"{package} needs {wanted}, and {there}.", mend=f"pip install '{wanted}'")


CHECKS: tuple[Check, ...] = (
    unsatisfied,
    two_runtimes,
    torchvision_of_another_torch,
    cuda_of_torch_and_onnxruntime,
    tensorrt_of_onnxruntime,
    driver_of_torch,
)


def _requirement(text: str) -> Any:
    from packaging.requirements import Requirement

    return Requirement(text)


def _applies(requirement: Any) -> bool:
    """Whether it holds on this machine without any extra."""
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": ""}))


def _extras_of(text: str) -> list[str]:
    """Extras of klas-zoo that a requirement belongs to; its marker names them."""
    return re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", text)


def _satisfied(requirement: Any, found: Installation) -> bool:
    version = found.packages.get(normal(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _major(version: str | None) -> int | None:
    return int(version.split(".")[0]) if version else None

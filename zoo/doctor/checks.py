"""What of an installation cannot work together, and what would mend it. Changes nothing.

Each check is a pure function of what is installed; the list `CHECKS` is all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from klas_zoo.doctor.installation import Installation, normal
from klas_zoo.doctor.kernels import runs_on

OWN = "klas-zoo"
ONNXRUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn",
    "onnxruntime-migraphx", "onnxruntime-rocm",
)  # fmt: skip
"""One module, in packages that overwrite each other's files."""
# what an extra is for, for people; a test compares the names with the package's metadata
EXTRAS = {
    "build": "building families, exporting, profiles, tuning; networks of timm and torch",
    "datasets": "images from data sets of the datasets library",
    "dev": "the checks and tests of klas-zoo itself",
    "gpu": "CUDA's libraries for onnxruntime-gpu; [build] on Linux brings the same with torch",
    "gs": "registries in Google Cloud Storage",
    "hf": "registries on Hugging Face",
    "kserve": "a family as a model of KServe's server",
    "mlserver": "a family as a model of MLServer",
    "nvml": "clocks, temperature and energy of NVIDIA GPUs",
    "openvino": "engines in OpenVINO, often faster on Intel's and Arm's processors",
    "remote": "registries at remote places, by fsspec",
    "oci": "packages in registries of containers",
    "s3": "registries in S3",
    "sign": "packages signed and their signatures checked",
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
class Incompatibility:
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


Check = Callable[[Installation], Iterator[Incompatibility]]


def diagnose(installation: Installation) -> list[Incompatibility]:
    """Everything that cannot work together."""
    return [problem for check in CHECKS for problem in check(installation)]


def extras(installation: Installation) -> list[Extra]:
    """Every extra of klas-zoo, with what is missing of it."""
    missing: dict[str, list[str]] = {}
    for text in installation.requires.get(OWN, ()):
        requirement = _requirement(text)
        for name in _extras_of(text):
            missing.setdefault(name, []).extend(_missing(requirement, installation))
    return [
        Extra(name=name, adds=EXTRAS.get(name, "not described"), missing=tuple(found))
        for name, found in sorted(missing.items())
    ]


def _missing(requirement: Any, installation: Installation) -> list[str]:
    """The package of a requirement, if it is not installed; of one with extras of its own, what these lack."""
    name = normal(requirement.name)
    if not (installation.packages.get(name) if name in ONNXRUNTIMES else _satisfied(requirement, installation)):
        return [str(requirement).partition(";")[0].strip() if requirement.extras else requirement.name]
    further = [text for text in installation.requires.get(name, ()) if set(_extras_of(text)) & requirement.extras]
    return [one.name for one in map(_requirement, further) if not _satisfied(one, installation)]


def two_runtimes(found: Installation) -> Iterator[Incompatibility]:
    here = [f"{name} {found.packages[name]}" for name in ONNXRUNTIMES if name in found.packages]
    if len(here) > 1:
        names = " ".join(one.split()[0] for one in here)
        yield Incompatibility(
            what=f"{' and '.join(here)} are installed; they are one module, and the later one overwrote files of the "
            f"other: {_files_of(found)}.",
            mend=f"pip uninstall -y {names} && pip install onnxruntime-gpu (or onnxruntime, which is smaller, on a "
            "machine without an NVIDIA GPU)",
        )
    elif here and found.onnxruntime_package is None:
        yield Incompatibility(
            what=f"{here[0]} is installed, but its files are not there: uninstalling another package of this module "
            "took them along.",
            mend=f"pip install --force-reinstall --no-deps {here[0].split()[0]}",
        )
    if {"tensorrt-rtx-cu12", "tensorrt-rtx-cu13"} <= found.packages.keys():
        yield Incompatibility(
            what="tensorrt-rtx-cu12 and tensorrt-rtx-cu13 are both installed; they are one module.",
            mend="pip uninstall -y tensorrt-rtx-cu12 tensorrt-rtx-cu13 && pip install 'klas-zoo[tensorrt-rtx]'",
        )


def _files_of(found: Installation) -> str:
    """Whose files are there now, and what that means."""
    if found.onnxruntime_package is None:
        return "neither is complete, and onnxruntime cannot be imported"
    can = f"was compiled for CUDA {found.onnxruntime_cuda}" if found.onnxruntime_cuda else "has no CUDA"
    return f"what is there now is {found.onnxruntime_package}, which {can}"


def torchvision_of_another_torch(found: Installation) -> Iterator[Incompatibility]:
    """`operator torchvision::nms does not exist`, when timm imports it."""
    torch = f"cu{found.torch_cuda.replace('.', '')}" if found.torch_cuda else "cpu"
    if "torch" not in found.packages or found.vision_build in (None, torch):
        return
    yield Incompatibility(
        what=f"torch {found.packages['torch']} is the {torch} build and torchvision {found.packages['torchvision']} "
        f"the {found.vision_build} build: torchvision's operators are missing, and timm needs them.",
        mend="pip install --force-reinstall torch torchvision",
    )


def cuda_of_torch_and_onnxruntime(found: Installation) -> Iterator[Incompatibility]:
    """onnxruntime takes CUDA's libraries from packages that torch brings, or the extra `gpu`."""
    torch, runtime = _major(found.torch_cuda), _major(found.onnxruntime_cuda)
    if "torch" not in found.packages:
        if found.gpus and runtime and f"nvidia-cudnn-cu{runtime}" not in found.packages:
            yield Incompatibility(
                what=f"onnxruntime-gpu {found.packages.get('onnxruntime-gpu', '')} needs the libraries of CUDA "
                f"{runtime}, which are not installed: --device cuda will not start.",
                mend=f"pip install '{OWN}[gpu]'",
            )
        return
    if runtime is None or torch == runtime or (torch is None and not found.gpus):
        return
    runs = f"torch was compiled for CUDA {found.torch_cuda}" if torch else "torch was compiled for the CPU"
    old_driver = found.driver_cuda is not None and found.driver_cuda[0] < runtime
    # an older onnxruntime-gpu would be no way out: klas-zoo needs operators that only newer ones have for CUDA
    mend = (
        f"update NVIDIA's driver to one for CUDA {runtime} first (it runs CUDA up to "
        f"{'.'.join(map(str, found.driver_cuda or ()))}), then pip install --force-reinstall torch torchvision"
        if old_driver
        else "pip install --force-reinstall torch torchvision"
    )
    yield Incompatibility(
        what=f"onnxruntime-gpu {found.packages.get('onnxruntime-gpu', '')} needs the libraries of CUDA {runtime}, but "
        f"{runs}: --device cuda will not start.",
        mend=mend,
    )


def kernels_for_the_cards(found: Installation) -> Iterator[Incompatibility]:
    """A provider without kernels for a card starts, and fails at its first operator."""
    for name, capability in zip(found.gpus, found.capabilities, strict=False):
        if found.kernels and not runs_on(capability, found.kernels):
            yield Incompatibility(
                what=f"{name} has compute capability {capability}, and this onnxruntime-gpu has kernels for "
                f"{', '.join(found.kernels)} only: --device cuda will not run.",
                mend="use --runtime torch or tensorrt on this card, or an onnxruntime built for it",
            )


def tensorrt_of_onnxruntime(found: Installation) -> Iterator[Incompatibility]:
    """An unpinned `pip install tensorrt` brings a version onnxruntime's provider is not linked with."""
    version = found.packages.get("tensorrt")
    if version and found.nvinfer and _major(version) != found.nvinfer:
        yield Incompatibility(
            what=f"onnxruntime's TensorRT provider needs TensorRT {found.nvinfer} (libnvinfer.so.{found.nvinfer}), "
            f"tensorrt {version} is installed: that provider will not start (klas-zoo's own engines do).",
            mend=f"pip install 'tensorrt=={found.nvinfer}.*'",
        )


def driver_of_torch(found: Installation) -> Iterator[Incompatibility]:
    needed = _major(found.torch_cuda)
    if found.gpus and found.driver_cuda is None:
        yield Incompatibility(
            what=f"There is a GPU ({found.gpus[0]}), but no driver library libcuda.so.1.",
            mend="install NVIDIA's driver; in a container, start it with --gpus all",
        )
    elif found.driver_cuda and needed and found.driver_cuda[0] < needed:
        newest = ".".join(map(str, found.driver_cuda))
        driver = f"The driver {found.driver}" if found.driver else "The driver"
        yield Incompatibility(
            what=f"{driver} runs CUDA up to {newest}, torch was compiled for CUDA {found.torch_cuda}: torch will not "
            "see the GPU.",
            mend=f"update NVIDIA's driver to one for CUDA {needed} or later",
        )


def unsatisfied(found: Installation) -> Iterator[Incompatibility]:
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
            yield Incompatibility(what=f"{package} needs {wanted}, and {there}.", mend=f"pip install '{wanted}'")


CHECKS: tuple[Check, ...] = (
    unsatisfied,
    two_runtimes,
    torchvision_of_another_torch,
    cuda_of_torch_and_onnxruntime,
    kernels_for_the_cards,
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
    """Either package of onnxruntime does for the other one."""
    name = normal(requirement.name)
    versions = [found.packages.get(one) for one in (ONNXRUNTIMES if name in ONNXRUNTIMES else (name,))]
    return any(one is not None and requirement.specifier.contains(one, prereleases=True) for one in versions)


def _major(version: str | None) -> int | None:
    return int(version.split(".")[0]) if version else None

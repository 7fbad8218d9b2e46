"""A CUDA driver without a card: the real torch and the real CUDA provider of onnxruntime run on it.

Stubs of libcuda, libcudart, libcublas, libcublasLt, libcudnn, libcusolver and libnvidia-ml are compiled from the C
files beside this one. Every function that the real library exports, or that a header declares, and that no C file
defines, does nothing and reports success. Memory of the card is the host's, kernels do nothing, so what a network
answers means nothing. What means something: which calls are accepted, where onnxruntime puts which node, and what
this project makes of names, memory sizes, several cards, MIG slices and cards in exclusive mode.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
MIB = 2**20


class CannotBuild(Exception):
    """Why there is no fake driver here: a sentence for a skipped test."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the driver claims to have; all cards of a machine are alike.

    Attributes:
        name: as CUDA reports it; a MIG slice has its profile in it.
        capability: `8.0`.
        processors: streaming multiprocessors; they tell one Orin from another.
        cuda: the newest version of CUDA that the driver runs, `13.0`.
        exclusive: compute mode EXCLUSIVE_PROCESS, held by locks in this folder.
        throttle: NVML's mask of reasons for lower clocks.
        kernels: the packages have code for the card; without, every start of a kernel is an error.
        zeros: what is copied from the card is zeros, and so the answer of a network whose answer is zeros is right.
    """

    name: str = "NVIDIA A100-SXM4-80GB"
    memory_mib: int = 81920
    capability: str = "8.0"
    processors: int = 108
    cards: int = 1
    cuda: str = "13.0"
    exclusive: Path | None = None
    throttle: int = 0
    kernels: bool = True
    zeros: bool = False

    def environment(self) -> dict[str, str]:
        """The variables by which the stubs know the card."""
        major, minor = self.cuda.split(".")
        found = {
            "FAKE_CUDA_NAME": self.name,
            "FAKE_CUDA_MEMORY_MIB": str(self.memory_mib),
            "FAKE_CUDA_CAPABILITY": self.capability.replace(".", ""),
            "FAKE_CUDA_PROCESSORS": str(self.processors),
            "FAKE_CUDA_CARDS": str(self.cards),
            "FAKE_CUDA_VERSION": str(int(major) * 1000 + int(minor) * 10),
            "FAKE_CUDA_THROTTLE": str(self.throttle),
            "FAKE_CUDA_KERNELS": str(int(self.kernels)),
            "FAKE_CUDA_ZEROS": str(int(self.zeros)),
        }
        return found | ({"FAKE_CUDA_EXCLUSIVE": str(self.exclusive)} if self.exclusive else {})


@dataclass(frozen=True, kw_only=True)
class _Library:
    """A library to imitate: the file its names come from (relative to site-packages) and its source here.

    Names come from the real library's exports or, where none is installed, from a header.
    """

    name: str
    source: str | None
    like: str
    preloaded: bool = True


_LIBRARIES = (
    _Library(name="libcuda.so.1", source="cuda.c", like="nvidia/cu13/include/cuda.h"),
    _Library(name="libcudart.so.13", source="cudart.c", like="nvidia/cu13/lib/libcudart.so.13"),
    _Library(name="libcublasLt.so.13", source="cublasLt.c", like="nvidia/cu13/lib/libcublasLt.so.13"),
    _Library(name="libcublas.so.13", source="cublas.c", like="nvidia/cu13/lib/libcublas.so.13"),
    _Library(name="libcusolver.so.12", source=None, like="nvidia/cu13/lib/libcusolver.so.12"),
    _Library(name="libcudnn.so.9", source="cudnn.c", like="nvidia/cudnn/lib/libcudnn.so.9"),
    _Library(name="libnvidia-ml.so.1", source="nvml.c", like="pynvml.py", preloaded=False),
)


# of CUDA's compiler, which is in no package that torch brings
_HOST_DEFINES = """
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDART_CB
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cuda_builtin_vector_align8(tag, members) struct tag { members }
#define __builtin_align__(bytes) __attribute__((aligned(bytes)))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __host__
#define __device__
#define __specialization_static static
"""


def build(folder: Path) -> Path:
    """Compiles the driver into a folder; gives the folder.

    Raises:
        CannotBuild: no compiler, or NVIDIA's packages are not installed.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise CannotBuild(f"the fake CUDA driver needs {tool}: install gcc and binutils")
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    (folder / "crt" / "host_defines.h").write_text(_HOST_DEFINES)
    # cuDNN's and cuBLASLt's headers include the whole runtime and need a few types of it
    for name in ("cuda_runtime.h", "cuda_runtime_api.h"):
        (folder / name).write_text("#include <driver_types.h>\n#include <library_types.h>\n")
    for library in _LIBRARIES:
        _compile(library, folder)
    return folder


def run(
    folder: Path, *command: str, card: Card | None = None, libraries: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Python with arguments, on the card."""
    given = environment(folder, card, libraries=libraries) | {"OMP_NUM_THREADS": "1", **extra}
    root = SOURCES.parent.parent
    return subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True, cwd=root)


def answer(folder: Path, code: str, card: Card | None = None, **extra: str) -> Any:
    """What a piece of Python prints last, as JSON."""
    done = run(folder, "-c", f"import json\n{code}", card=card, libraries=False, **extra)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: Path, card: Card | None = None, *, libraries: bool = True) -> dict[str, str]:
    """The environment of a process that sees the card.

    Args:
        libraries: preload CUDA's libraries too. Without them, only the driver is there, and a process has to
            find the libraries itself, as on a machine with packages from an index.
    """
    wanted = [str(folder / one.name) for one in _LIBRARIES if one.preloaded]
    paths = filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))
    base = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    preload = {"LD_PRELOAD": " ".join(wanted)} if libraries else {}
    return base | preload | {"LD_LIBRARY_PATH": ":".join(paths)} | (card or Card()).environment()


def _installed(name: str) -> Path:
    """A file or folder of an installed package."""
    found = next((path for one in sys.path if (path := Path(one, name)).exists()), None)
    if found is None:
        raise CannotBuild(f"the fake CUDA driver needs {name}, of the packages that bring CUDA 13")
    return found


def _compile(library: _Library, folder: Path) -> None:
    defined = _defined(library.source) if library.source else set()
    names = sorted(_names(_installed(library.like)) - defined)
    lines = []
    for name in names:
        # whatever is created is a handle that is not null
        if re.search(r"Create(_v\d+)?$|^cudnnCreate\w*Descriptor$", name):
            lines.append(f"int {name}(void **handle) {{ *handle = (void *)0x1000; return 0; }}")
        else:
            lines.append(f"int {name}(void) {{ return 0; }}")
    source, versions = folder / f"{library.name}.c", folder / f"{library.name}.map"
    source.write_text("\n".join(lines) + "\n")
    # consumers ask for symbols of a version, which is the library's name
    versioned = library.name not in ("libcuda.so.1", "libnvidia-ml.so.1")
    versions.write_text(f"{library.name if versioned else ''} {{ global: *; }};\n")
    headers = [f"-I{_installed(one)}" for one in ("nvidia/cu13/include", "nvidia/cudnn/include")]
    command = [
        "gcc", "-shared", "-fPIC", "-w", f"-I{folder}", *headers, f"-I{SOURCES}", f"-Wl,--version-script={versions}",
        f"-Wl,-soname,{library.name}", "-o", str(folder / library.name), str(source),
        *([str(SOURCES / library.source)] if library.source else ()), "-ldl",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise CannotBuild(f"gcc cannot compile the fake {library.name}: {first}")


def _defined(source: str) -> set[str]:
    """Names of the functions that a C file defines."""
    text = (SOURCES / source).read_text()
    return set(re.findall(r"^[\w\s*]*?\b(\w+)\s*\([^;{]*\)\s*\{", text, re.MULTILINE))


@cache
def _names(file: Path) -> frozenset[str]:
    """Functions that a library exports, a header declares, or NVML's Python module calls."""
    if file.suffix == ".h":
        text = file.read_text(errors="replace")
        declared = re.findall(r"\bCUDAAPI\s+(cu\w+)\s*\(", text)
        renamed = re.findall(r"^\s*#\s*define\s+cu\w+\s+(cu\w+)\s*$", text, re.MULTILINE)
        return frozenset([*declared, *renamed])
    if file.suffix == ".py":
        return frozenset(re.findall(r"_nvmlGetFunctionPointer\([\"'](nvml\w+)[\"']\)", file.read_text()))
    done = subprocess.run(["nm", "-D", "--defined-only", str(file)], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return frozenset(row[-1].split("@")[0] for row in rows if len(row) > 2 and row[-2] in "TW")

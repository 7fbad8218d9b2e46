"""The runtimes that execute engines, and the only way to open an engine.

A runtime is one module and one row in `RUNTIMES`. Nothing outside this package calls a runtime's own API to open or
run an engine. Importing it imports no runtime, nor torch or numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from klas_zoo.errors import UnknownName
from klas_zoo.runtimes.base import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    NOT_RUN,
    VERIFIED,
    Runtime,
    Session,
    canonical_options,
    parse_options,
)

__all__ = [
    "CPU_PROVIDER",
    "CUDA_PROVIDER",
    "NOT_RUN",
    "RUNTIMES",
    "VERIFIED",
    "Runtime",
    "Session",
    "canonical_options",
    "open_engine",
    "parse_options",
    "runtime_named",
]


class _Runtimes(Mapping[str, Runtime]):
    """Each runtime is imported when it is first asked for: picks look at this package, and open no engine."""

    # name: module, class, arguments
    _ROWS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
        "onnxruntime": ("ort", "OnnxRuntime", ()),
        "openvino": ("ov", "OpenVino", ()),
        "tensorrt": ("trt", "TensorRT", ("tensorrt",)),
        "tensorrt-rtx": ("trt", "TensorRT", ("tensorrt-rtx",)),
        "torch": ("pytorch", "Torch", ()),
    }

    def __init__(self) -> None:
        self._made: dict[str, Runtime] = {}

    def __getitem__(self, name: str) -> Runtime:
        if name not in self._made:
            module, kind, arguments = self._ROWS[name]
            self._made[name] = getattr(import_module(f"klas_zoo.runtimes.{module}"), kind)(*arguments)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._ROWS

    def __iter__(self) -> Iterator[str]:
        return iter(self._ROWS)

    def __len__(self) -> int:
        return len(self._ROWS)


RUNTIMES: Mapping[str, Runtime] = _Runtimes()


def runtime_named(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in RUNTIMES:
        raise UnknownName("runtime", name, RUNTIMES)
    return RUNTIMES[name]


def open_engine(
    engine: Path | str | bytes | Any,
    *,
    runtime: str = "onnxruntime",
    provider: str | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
    spinning: bool | None = None,
) -> Session:
    """Opens an engine the way every engine is verified, timed and served.

    Args:
        engine: a file; the content of an ONNX file; for `torch` a module.
        runtime: a name in `RUNTIMES`.
        provider: of the runtime, such as `CUDAExecutionProvider`; None: the runtime's first.
        threads: that compute one operator; None or 0: one for each physical core.
        options: the runtime's own options that differ from this project's defaults; see the runtime's module.
        spinning: whether idle threads of the session poll for work. None: only while a run is in progress.
            False: never; a run is slower by the time it takes to wake threads. True: also for some 30 ms after each
            run, which is onnxruntime's own default and keeps a core busy in a service that is called often.

    Raises:
        UnknownName: there is no such runtime.
        CannotRunHere: the engine was built for hardware or a version that is not here.
        ExportError: the runtime cannot load the engine.
        KlasZooError: the runtime is not installed, or its provider does not start.
    """
    found = runtime_named(runtime)
    return found.open(
        Path(engine) if isinstance(engine, str) else engine,
        provider=provider or next(iter(found.precisions)),
        threads=threads or None,
        options=options,
        spinning=spinning,
    )

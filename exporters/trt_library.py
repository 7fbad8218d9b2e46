"""The two TensorRT libraries behind one door: `tensorrt` (10 and 11) and `tensorrt_rtx`.

They have the same Python API under two names. TensorRT builds on the GPU it builds for, and
times kernels there; TensorRT for RTX compiles for the capabilities it is told, without a GPU,
and finishes on the user's machine.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from klas_zoo.errors import KlasZooError, UnknownName
from klas_zoo.exporters.plans import RUNTIMES


@dataclass(frozen=True, kw_only=True)
class Library:
    """An imported library; `log` collects what it complains about."""

    runtime: str
    module: Any
    log: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def complaint(self) -> str:
        """The first error since the last call, one line, without the library's file and line."""
        errors, self.log.errors[:] = [*self.log.errors], []
        return errors[0].strip().splitlines()[0] if errors else "the library says nothing about it"


def find_library(runtime: str) -> Library:
    """Imports a library.

    Raises:
        UnknownName: it is neither.
        KlasZooError: it is not installed, or does not start; says what brings it.
    """
    if runtime not in RUNTIMES:
        raise UnknownName("TensorRT library", runtime, RUNTIMES)
    try:
        module = importlib.import_module(runtime.replace("-", "_"))
    except ImportError as error:
        raise KlasZooError(
            f"The library {runtime} cannot be imported ({error}): pip install 'klas-zoo[{runtime}]' brings it."
        ) from error
    return Library(runtime=runtime, module=module, log=_log(module))


@cache
def _log(module: Any) -> Any:
    # one for each library: the first that is handed over stays for the life of the process
    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.errors.append(message)

    return Log()

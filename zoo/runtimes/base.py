"""What a runtime and an open engine are to the rest of klas-zoo. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from klas_zoo.errors import ExportError, KlasZooError

if TYPE_CHECKING:
    import numpy as np

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
VERIFIED: Final = "verified"
NOT_RUN: Final = "built, not run"
"""Status of an engine that no machine with its hardware has compared with torch yet."""


class Session(Protocol):
    """An open engine. Safe to use from several threads. A context manager: leaving it closes the session.

    Attributes:
        runtime, runtime_version, provider: what executes it.
        threads: that compute one operator; 0 on a GPU.
        options: `canonical_options` of what differs from this project's defaults; as in `profiles.records.Conditions`.
        input_shape: of one image, `(C, H, W)`; None where the engine takes any.
        smallest_batch, largest_batch: images that one run takes; None: no upper limit.
        raw: the runtime's own session object.
    """

    runtime: str
    runtime_version: str
    provider: str
    threads: int
    options: str
    input_shape: tuple[int | None, ...]
    smallest_batch: int
    largest_batch: int | None
    raw: Any

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 → logits (B, classes) float32, both in the host's memory.

        Raises:
            ExportError: the engine does not take such images, or the runtime failed.
        """
        ...

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """Milliseconds of `count` runs by the device's own clock, input and output in its memory; empty on a CPU.

        Raises:
            ExportError: the runtime failed.
            KlasZooError: the clock needs torch, which is not installed.
        """
        ...

    def release_memory(self) -> None:
        """Gives up memory that large batches took and the runtime holds for the next ones, where a runtime does so.

        Raises:
            ExportError: the runtime failed.
        """
        ...

    def close(self) -> None:
        """Frees the engine's memory; the session cannot be used afterwards."""
        ...

    def __enter__(self) -> Session: ...

    def __exit__(self, *error: object) -> None: ...


class Runtime(Protocol):
    """Something that executes engines.

    Attributes:
        name: as in records, the registry and on the command line.
        formats: of the engines it opens: `onnx`, `plan` or `torch`.
        precisions: what each of its providers computes in natively, by provider; the first provider is the default.
        providers: the provider by torch's name of the device, `cpu` or `cuda`.
        compiles: its engines are built for one kind of hardware, from an ONNX file.
    """

    name: str
    formats: tuple[str, ...]
    precisions: Mapping[str, tuple[str, ...]]
    providers: Mapping[str, str]
    compiles: bool

    def version(self) -> str:
        """Of the installed library.

        Raises:
            KlasZooError: it is not installed; the message has the command that installs it.
        """
        ...

    def available(self) -> bool:
        """Whether the library is installed; a provider may still not start."""
        ...

    def open(
        self,
        engine: Path | bytes | Any,
        *,
        provider: str,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> Session:
        """See `klas_zoo.runtimes.open_engine`."""
        ...


class Installable:
    """The part of a runtime that is the same in all of them."""

    def version(self) -> str:
        raise NotImplementedError

    def available(self) -> bool:
        try:
            self.version()
        except KlasZooError:
            return False
        return True


class Closing:
    """The part of a session that is the same in every runtime."""

    raw: Any

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """A CPU has no clock but the host's."""
        return []

    def release_memory(self) -> None:
        """Most runtimes hold nothing that can be given up."""

    def close(self) -> None:
        self.raw = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def canonical_options(options: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> str:
    """Options that differ from `defaults` as JSON with sorted keys; empty where none does."""
    differing = {key: value for key, value in options.items() if (defaults or {}).get(key) != value}
    return json.dumps(differing, sort_keys=True, separators=(",", ":")) if differing else ""


def parse_options(text: str) -> dict[str, str]:
    """What `canonical_options` wrote, as `open_engine` takes it."""
    return dict(json.loads(text)) if text else {}


def engine_name(engine: Path | bytes | Any) -> str:
    """For messages."""
    return str(engine) if isinstance(engine, Path) else "the engine"


def image_shape(name: str, shape: tuple[int | None, ...]) -> tuple[tuple[int | None, ...], int, int | None]:
    """(C, H, W) and the smallest and largest batch of an input `(B, C, H, W)`; None stands for any size.

    Raises:
        ExportError: the input has another rank.
    """
    if len(shape) != 4:
        found = ", ".join("any" if one is None else str(one) for one in shape)
        raise ExportError(f"{name} takes an input of shape ({found}); an engine takes images (B, C, H, W).")
    batch = shape[0]
    return tuple(shape[1:]), batch or 1, batch

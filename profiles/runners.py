"""Open engines that are ready to be timed, in any runtime.

Every run is timed as a caller sees it: from images in the host's memory to logits there, by the host's clock. On a GPU
the device's own clock is read as well, with input and output in its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np

from klas_zoo.errors import ExportError, ProfileError, first_line
from klas_zoo.runtimes import Session

_OUT_OF_MEMORY = (
    "out of memory", "failed to allocate", "bad_alloc", "cannot allocate", "bad allocation", "alloc_failed",
    "memoryerror", "smaller than requested bytes",
)  # fmt: skip


class OutOfMemory(ProfileError):
    """A batch that does not fit: its record has the message, and the next batch is tried."""


def images_of(batch: int, input_shape: tuple[int, ...]) -> np.ndarray:
    """The same images every time, (B, C, H, W), spread like normalised photographs.

    Zeros would not do: arithmetic and caches treat them differently.
    """
    return np.random.default_rng(0).standard_normal((batch, *input_shape), dtype=np.float32)


class SessionRunner:
    """A session with the batch that it is timed on; a `timing.Runner`.

    Args:
        images: (B, C, H, W) float32.
        device_clock: also read the device's own clock, where it has one.

    Raises:
        OutOfMemory: the batch does not fit.
        ExportError: the engine does not run on such images.
    """

    def __init__(self, session: Session, images: np.ndarray, *, device_clock: bool = False) -> None:
        self.session, self.images = session, images
        with _memory(session):
            self.run()
            # captures graphs and chooses kernels, which is no part of any latency
            self.device_clock = device_clock and bool(session.device_times(images, 3))

    def run(self) -> None:
        """One batch, from the call to the logits."""
        self.session.run(self.images)

    def time(self, count: int) -> tuple[list[float], list[float] | None]:
        """Milliseconds of `count` runs by the host's clock, and of as many by the device's.

        Raises:
            OutOfMemory: another process took the memory in between.
        """
        host_ms = []
        with _memory(self.session):
            for _ in range(count):
                before = perf_counter_ns()
                self.run()
                host_ms.append((perf_counter_ns() - before) / 1e6)
            return host_ms, self.session.device_times(self.images, count) if self.device_clock else None


@contextmanager
def _memory(session: Session) -> Iterator[None]:
    """Tells the errors of a session that say that memory is out."""
    try:
        yield
    except ExportError as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{session.runtime} is out of memory: {first_line(error)}") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a runtime, of CUDA or of the system says that memory is out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(one in text for one in _OUT_OF_MEMORY)

"""The clock of an NVIDIA GPU, through torch, which is imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from klas_zoo.errors import KlasZooError


def new_stream() -> Any:
    """A stream of the current CUDA device, `torch.cuda.Stream`.

    Raises:
        KlasZooError: torch is not installed.
    """
    return torch_library().cuda.Stream()


def event_times(enqueue: Callable[[], object], stream: Any, count: int) -> list[float]:
    """Milliseconds between two events around each of `count` batches, one after another.

    Args:
        enqueue: starts one batch on `stream` and returns; called with `stream` current.
    """
    cuda = torch_library().cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    times = []
    for _ in range(count):
        with cuda.stream(stream):
            start.record(stream)
            enqueue()
            end.record(stream)
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def torch_library() -> Any:
    try:
        import torch
    except ImportError as error:
        raise KlasZooError("The clock and the memory of a GPU are used through torch: pip install torch.") from error
    return torch

"""Memory given back before the next part of a job needs it."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collects what only cycles hold, as graphs of torch and ONNX are, and returns freed memory to the system."""
    gc.collect()
    return_freed()


def return_freed() -> None:
    """Has the C library return freed memory to the system.

    glibc, once it has freed a large tensor, takes the next ones from its heap and keeps them there when
    they are freed: half a gigabyte for DeiT-B. Other C libraries have no such function.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

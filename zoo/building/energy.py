"""How much energy GPUs have taken, where NVIDIA's library tells it."""

from __future__ import annotations

from collections.abc import Callable


def meter(torch_device: str) -> Callable[[], float | None]:
    """A function that gives joules taken since some moment, by all GPUs of this machine; None where nobody knows.

    GPUs are counted since their driver was loaded; processors of a machine are not asked.
    """
    if torch_device != "cuda":
        return _unknown
    try:
        import pynvml

        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        read = lambda: sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus) / 1000  # noqa: E731
        read()
    except Exception:  # no library, no driver, or a GPU older than Volta: each raises something else
        return _unknown
    return read


def _unknown() -> None:
    return None

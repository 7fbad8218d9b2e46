"""Clocks, temperature and limits of a GPU while it is measured: read through NVML, never changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_IDLE = ("gpu_idle", "none")
# recorded, and no reason for a warning: clocks that an administrator set, and the power limit small cards always run at
_NORMAL = ("applications_clocks_setting", "sw_power_cap")
PERIOD_S = 0.1


class Telemetry:
    """Samples of one NVIDIA GPU, taken by a thread while the GPU is busy.

    Args:
        uuid: of the GPU, as CUDA reports it. NVML's own numbering differs from CUDA's, which is fastest first and
            leaves out what CUDA_VISIBLE_DEVICES does not name. None: NVML's first GPU.
        nvml: the module `pynvml`, or one like it.

    `unavailable` is the reason why there are no samples: no library, no driver.
    """

    def __init__(self, uuid: str | None = None, nvml: Any = None) -> None:
        self.unavailable = ""
        self._samples: list[dict[str, Any]] = []
        self._handle: Any = None
        try:
            if nvml is None:
                import pynvml

                nvml = pynvml
            self._nvml = nvml
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else nvml.nvmlDeviceGetHandleByIndex(0)
        except ImportError:
            self.unavailable = "nvidia-ml-py is not installed: pip install 'klas-zoo[nvml]' brings it"
        except Exception as error:  # NVMLError has no stable base across its versions
            self.unavailable = f"NVML does not answer: {error}"

    @contextmanager
    def watching(self, period_s: float = PERIOD_S) -> Iterator[None]:
        """Samples from a thread for as long as the block lasts: between two bursts a GPU may already be idle."""
        if self._handle is None:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(period_s):
                self.sample()

        thread = threading.Thread(target=watch, name="telemetry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def sample(self) -> None:
        """Reads everything once."""
        if self._handle is None:
            return
        nvml, handle = self._nvml, self._handle
        reads = {
            "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "throttle": lambda: self._reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
        # not every GPU has every sensor: what it does not report is left out
        found = {}
        for name, read in reads.items():
            try:
                found[name] = read()
            except Exception:  # as above
                continue
        self._samples.append(found)

    def conditions(self) -> dict[str, object]:
        """The smallest and largest of every reading, what the clocks could be, and why they were not."""
        if self._handle is None:
            return {"telemetry": self.unavailable}
        names = ("sm_mhz", "memory_mhz", "temperature_c", "power_w")
        ranges = {
            name: [min(values), max(values)]
            for name in names
            if (values := [one[name] for one in self._samples if name in one])
        }
        reasons = sorted({reason for one in self._samples for reason in one.get("throttle", ())})
        return {**ranges, **self._limits(), "throttle_reasons": reasons, "samples": len(self._samples)}

    def warnings(self) -> list[str]:
        """A sentence where the GPU was slowed down while it was measured."""
        found = self.conditions().get("throttle_reasons")
        reasons = [one for one in found if one not in _NORMAL] if isinstance(found, list) else []
        if not reasons:
            return []
        return [f"The GPU's clocks were held back while it was measured: {', '.join(reasons)}."]

    def _limits(self) -> Mapping[str, object]:
        nvml, handle = self._nvml, self._handle
        try:
            return {"sm_mhz_most": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)}
        except Exception:  # as above
            return {}

    def _reasons(self, mask: int) -> list[str]:
        """Names of the bits that are set, those of a GPU that has nothing to do left out."""
        prefix = "nvmlClocksThrottleReason"
        known = {
            name.removeprefix(prefix): getattr(self._nvml, name)
            for name in dir(self._nvml)
            if name.startswith(prefix) and name != f"{prefix}All"
        }
        names = [_snake(name) for name, bit in known.items() if isinstance(bit, int) and bit and mask & bit]
        return sorted(name for name in names if name not in _IDLE)


def _snake(name: str) -> str:
    """`SwPowerCap` → `sw_power_cap`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_").replace("g_p_u", "gpu")


def energy_meter(torch_device: str) -> Callable[[], float | None]:
    """A function that gives joules taken since some moment by the GPUs that this process sees; None where unknown.

    Of processors no energy is read.
    """
    if torch_device != "cuda":
        return _unknown
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # by UUID: NVML counts all GPUs of the machine, CUDA those of this process
        visible = [torch.cuda.get_device_properties(n).uuid for n in range(torch.cuda.device_count())]
        gpus = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in visible]
        read = lambda: sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus) / 1000  # noqa: E731
        read()
    except Exception:  # no library, no driver, or a GPU older than Volta: each raises something else
        return _unknown
    return read


def _unknown() -> None:
    return None

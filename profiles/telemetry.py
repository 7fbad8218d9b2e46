"""What a GPU's clocks, temperature and limits were while it was measured: read through NVML, never changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_THROTTLING = ("gpu_idle", "none")


class Telemetry:
    """Samples of one NVIDIA GPU; `sample` between bursts costs well under a millisecond.

    Args:
        index: as CUDA counts, in the order of the PCI bus.
        nvml: the module `pynvml`, or one like it.

    `unavailable` says why there are no samples: no library, no driver.
    """

    def __init__(self, index: int = 0, nvml: Any = None) -> None:
        self.unavailable = ""
        self._samples: list[dict[str, Any]] = []
        self._handle: Any = None
        try:
            if nvml is None:
                import pynvml

                nvml = pynvml
            self._nvml = nvml
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except ImportError:
            self.unavailable = "nvidia-ml-py is not installed: pip install 'klas-zoo[nvml]' brings it"
        except Exception as error:  # NVMLError has no stable base across its versions
            self.unavailable = f"NVML does not answer: {error}"

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
        # what a GPU does not tell is left out: not every one has every sensor
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
        reasons = self.conditions().get("throttle_reasons")
        if not isinstance(reasons, list) or not reasons:
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
        return sorted(name for name in names if name not in _NO_THROTTLING)


def _snake(name: str) -> str:
    """`SwPowerCap` → `sw_power_cap`."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_").replace("g_p_u", "gpu")

"""What is read of a GPU's state; NVML itself is played by an object that answers like it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from klas_zoo.profiles.telemetry import Telemetry


class Nvml:
    """One GPU whose readings are given one after another; a reading that is None is not supported."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksThrottleReasonNone = 0  # noqa: N815  NVML's names
    nvmlClocksThrottleReasonGpuIdle = 1  # noqa: N815
    nvmlClocksThrottleReasonSwPowerCap = 4  # noqa: N815
    nvmlClocksThrottleReasonHwThermalSlowdown = 64  # noqa: N815
    nvmlClocksThrottleReasonAll = 69  # noqa: N815

    def __init__(self, *readings: dict[str, int | None]) -> None:
        self.readings = list(readings)
        self.now: dict[str, int | None] = {}

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        if kind == self.NVML_CLOCK_SM:
            self.now = self.readings.pop(0)  # the first question of a sample
        return self.answer("sm" if kind == self.NVML_CLOCK_SM else "memory")

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:  # noqa: N802
        return self.answer("temperature")

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return self.answer("power")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return self.answer("reasons")

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        return 1980

    def answer(self, name: str) -> int:
        found = self.now.get(name)
        if found is None:
            raise RuntimeError("Not Supported")
        return found


def sampled(*readings: dict[str, int | None]) -> Telemetry:
    telemetry = Telemetry(nvml=Nvml(*readings))
    for _ in readings:
        telemetry.sample()
    return telemetry


CALM = {"sm": 1900, "memory": 2600, "temperature": 40, "power": 250_000, "reasons": 1}


def test_ranges_of_all_samples_are_recorded() -> None:
    hot = {"sm": 1400, "memory": 2600, "temperature": 80, "power": 700_000, "reasons": 4 + 64}
    found = sampled(CALM, hot, CALM).conditions()
    assert found["sm_mhz"] == [1400, 1900]
    assert found["temperature_c"] == [40, 80]
    assert found["power_w"] == [250.0, 700.0]
    assert found["throttle_reasons"] == ["hw_thermal_slowdown", "sw_power_cap"]
    assert (found["sm_mhz_most"], found["samples"]) == (1980, 3)


def test_a_gpu_that_was_held_back_makes_a_warning_and_an_idle_one_none() -> None:
    assert sampled(CALM).warnings() == []
    # the power limit is where small cards always run: recorded, and no reason to distrust a measurement
    assert sampled({**CALM, "reasons": 4}).warnings() == []
    assert sampled({**CALM, "reasons": 4 + 64}).warnings() == [
        "The GPU's clocks were held back while it was measured: hw_thermal_slowdown."
    ]


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    found = sampled({**CALM, "power": None, "memory": None}).conditions()
    assert "power_w" not in found and "memory_mhz" not in found and found["sm_mhz"] == [1900, 1900]


def test_without_a_driver_nothing_is_read_and_the_reason_recorded() -> None:
    def refuse() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    telemetry = Telemetry(nvml=SimpleNamespace(nvmlInit=refuse))
    telemetry.sample()
    assert telemetry.conditions() == {"telemetry": "NVML does not answer: NVML Shared Library Not Found"}
    assert telemetry.warnings() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a driver")
def test_a_machine_without_a_gpu_says_so() -> None:
    assert Telemetry().unavailable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
def test_a_real_gpu_tells_its_clocks() -> None:
    telemetry = Telemetry()
    telemetry.sample()
    found: Any = telemetry.conditions()
    assert found["sm_mhz"][1] > 0

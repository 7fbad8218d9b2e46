"""The devices that engines are made for and timed on.

Imports nothing heavy: asking for `cpu` costs no torch, and what GPU there is the driver reports.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.errors import AbsentDevice, KlasZooError
from klas_zoo.gpus import Gpu, visible_gpus, why_no_gpu
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.catalog import DeviceSpec, canonical, find_spec, spec_of_cuda_device, unknown
from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER
from klas_zoo.runtimes.trial import provider_problem


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that numbers are measured on.

    Attributes:
        name: the catalog's name of it, else one made of what CUDA calls it; never `cuda`.
        provider: onnxruntime's execution provider for it.
        torch_device: where torch computes for it, `cpu` or `cuda`. That is a matter of this machine alone: networks
            for a small GPU, or for a CPU, are tuned on whatever GPU is here.
        hardware: this machine's, for people: model, cores and instruction sets, or driver.
        here: whether this machine has it. Of one that is elsewhere engines are made and checked on the
            CPU, and nothing is timed.
        note: a sentence for the user about how the device and this machine differ.
    """

    name: str
    provider: str
    torch_device: str
    hardware: str
    here: bool = True
    note: str = ""

    @property
    def kind(self) -> str:
        """Where engines for it run on this machine, `cpu` or `cuda`."""
        return "cuda" if self.provider == CUDA_PROVIDER else "cpu"


def resolve_device(name: str) -> Device:
    """The device of that name, if this machine has it. `cuda` is the first GPU, under its own name.

    No context is made on a GPU: in a team, every process asks before it has chosen its own.

    Raises:
        UnknownName: this version knows no such device.
        AbsentDevice: it does, but this machine has none.
    """
    if name == "cpu":
        return Device(name=name, provider=CPU_PROVIDER, torch_device="cpu", hardware=describe_cpu())
    gpu = next(iter(visible_gpus()), None)
    if name == "cuda" and gpu is None:
        raise AbsentDevice(f"This machine has no CUDA device ({why_no_gpu()}); --device cpu works everywhere.")
    if gpu is not None and name in ("cuda", name_of(gpu)):
        return _device(gpu)
    if spec := find_spec(name):
        if gpu is not None and spec.name == name_of(gpu):
            return _device(gpu)
        raise AbsentDevice(_absence(spec, gpu))
    raise unknown(name)


def device_name(name: str) -> str:
    """The catalog's name of what `name` is an alias of; of `cuda`, the name of the GPU that is here.

    Raises:
        AbsentDevice: `cuda`, and there is none.
    """
    return resolve_device(name).name if name == "cuda" else canonical(name)


def check_provider(device: Device) -> None:
    """Runs a block of a network in onnxruntime on a device: better now than after hours of tuning for it.

    Raises:
        KlasZooError: it does not start, or computes wrong answers.
    """
    if device.kind == "cpu" and device.provider == CPU_PROVIDER:
        return
    why = provider_problem(device.provider)
    if why is not None:
        raise KlasZooError(
            f"onnxruntime's {device.provider} does not compute here: {why}. klas-zoo doctor lists what does not fit "
            "together."
        )


def elsewhere(name: str, hardware: str) -> Device:
    """A device that this machine does not have, for making engines that run on it; torch uses the GPU that is here."""
    gpu = next(iter(visible_gpus()), None)
    where = f"networks are tuned on this machine's {gpu.name}" if gpu else "networks are tuned on the CPU"
    same = f" To build for the GPU that is here, pass --device {name_of(gpu)}." if gpu else ""
    return Device(
        name=name,
        provider=CPU_PROVIDER,
        torch_device="cuda" if gpu else "cpu",
        hardware=hardware,
        here=False,
        note=f"{name} is not here: {where}, engines are checked on the CPU, and nothing is timed.{same}",
    )


def name_of(gpu: Gpu) -> str:
    """The catalog's name of a GPU, else what CUDA calls it, fit for a folder."""
    spec = spec_of_cuda_device(gpu.name, gpu.memory_bytes, gpu.processors)
    if spec is not None:
        return spec.name
    name = re.sub(r"^(NVIDIA|Tesla) ", "", gpu.name)
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    # CUDA gives devices of one family one name whatever their memory
    return f"{plain}-{round(gpu.memory_bytes / 2**30)}gb" if find_spec(plain) else plain


def cuda_uuid() -> str | None:
    """The UUID of the first GPU, as NVML spells it; None where there is none."""
    gpu = next(iter(visible_gpus()), None)
    return gpu.uuid if gpu else None


def _device(gpu: Gpu) -> Device:
    facts = [str(gpu)]
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        facts += [f"driver {found}" for found in re.findall(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)]
    return Device(name=name_of(gpu), provider=CUDA_PROVIDER, torch_device="cuda", hardware=", ".join(facts))


def _absence(spec: DeviceSpec, gpu: Gpu | None) -> str:
    """Why a device of the catalog is not here, and what to do."""
    advice = f"import a profile of {spec.name} (klas-zoo profile import FILE) or add --predict"
    if gpu is None:
        return f"This machine has no CUDA device, and so no {spec.name}: {advice} ({why_no_gpu()})."
    others = [number for number, one in enumerate(visible_gpus()) if name_of(one) == spec.name]
    if others:
        return (
            f"This machine's first GPU is {gpu.name}, and its {spec.name} is number {others[0]}: set "
            f"CUDA_VISIBLE_DEVICES={others[0]}."
        )
    return (
        f"This machine's GPU is {gpu.name}, no {spec.name}: pass --device {name_of(gpu)} or cuda for the one that is "
        f"here, {advice}."
    )

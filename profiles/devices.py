"""What engines can be made for and timed on, and how onnxruntime is started there.

Imports nothing heavy: asking for `cpu` costs no torch.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klas_zoo.errors import ExportError, KlasZooError, UnknownName

if TYPE_CHECKING:
    import onnxruntime

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# what makes a processor fast at networks; the kernel's names for it, x86 and Arm
_NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "sve", "i8mm", "bf16")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that numbers are measured on.

    Attributes:
        name: what the user calls it.
        provider: onnxruntime's execution provider for it.
        torch_device: where torch computes for it.
        hardware: the machine's own part, for people: model, cores, instruction sets, driver.
    """

    name: str
    provider: str
    torch_device: str
    hardware: str


def known_devices() -> tuple[str, ...]:
    """Names this version can measure on, whether or not this machine has them."""
    return ("cpu", "cuda")


def resolve_device(name: str) -> Device:
    """The device of that name, if this machine has it.

    Raises:
        UnknownName: this version knows no such device.
        KlasZooError: it is known, but this machine does not have it.
    """
    if name == "cpu":
        return Device(name=name, provider=CPU_PROVIDER, torch_device="cpu", hardware=_cpu())
    if name == "cuda":
        return Device(name=name, provider=CUDA_PROVIDER, torch_device="cuda", hardware=_cuda())
    raise UnknownName("device", name, known_devices())


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads not counted; onnxruntime's own number of threads."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = Path("/sys/devices/system/cpu")
    try:
        # the threads of one core all name the same siblings
        return len({(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in usable})
    except OSError:
        return len(usable)


def open_session(
    engine: Path, provider: str, threads: int | None
) -> onnxruntime.InferenceSession:
    """Loads an engine as a user would: all of onnxruntime's optimisations, nothing else changed.

    Args:
        threads: that compute one operator; None: one for each physical core.

    Raises:
        ExportError: onnxruntime cannot load the engine.
        KlasZooError: it loads it, but not on the provider that was asked for.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 3  # errors; its warnings are about its own placement of nodes
    providers: list[str | tuple[str, dict[str, str]]] = [CPU_PROVIDER]
    if provider == CUDA_PROVIDER:
        # TF32 keeps 10 bits of fp32's 23: an engine that is registered as fp32 computes in fp32
        providers.insert(0, (CUDA_PROVIDER, {"use_tf32": "0"}))
    try:
        session = onnxruntime.InferenceSession(engine, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise ExportError(f"onnxruntime cannot load {engine}: {first_line(error)}") from error
    started = session.get_providers()[0]
    if started != provider:
        # onnxruntime falls back without a word
        raise KlasZooError(
            f"onnxruntime started {started} instead of {provider}: its libraries for that do not load here."
        )
    return session


def first_line(error: BaseException) -> str:
    """Of an error's message; libraries add pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _cpu() -> str:
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux: the platform's own name has to do
    model = facts.get("model name") or platform.processor() or platform.machine()
    cores = physical_cores()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    notable = " ".join(flag for flag in _NOTABLE if flag in flags)
    return ", ".join(filter(None, (model, f"{cores} core{'s' if cores > 1 else ''}", notable)))


def _cuda() -> str:
    import onnxruntime
    import torch

    if not torch.cuda.is_available():
        raise KlasZooError("This machine has no CUDA device that torch can use; --device cpu works everywhere.")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise KlasZooError(
            "The onnxruntime that is installed has no CUDA provider: pip uninstall onnxruntime, then "
            "pip install onnxruntime-gpu."
        )
    gpu = torch.cuda.get_device_properties(0)
    parts = [gpu.name, f"compute capability {gpu.major}.{gpu.minor}", f"{gpu.total_memory / 2**30:.0f} GiB"]
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        version = ""
    if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", version):
        parts.append(f"driver {found.group(1)}")
    return ", ".join(parts)

"""This machine's processor: how many cores, what it is called, what it computes fast. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

from klas_zoo.cores import physical_cores as physical_cores
from klas_zoo.gpus import visible_gpus

# the kernel's names, x86 and Arm, for what makes a processor fast at networks
_NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "sve")


def has_fast_bf16(torch_device: str) -> bool:
    """Whether products in bfloat16 are faster there than in float32, and not emulated."""
    if torch_device == "cpu":
        return any(name in _flags() for name in ("avx512_bf16", "amx_bf16", "bf16"))
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def has_dot_products() -> bool:
    """Whether the processor adds products of eight bits in 32; where it does not, x86 adds two of them in 16."""
    return any(name in _flags() for name in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))


def describe_cpu() -> str:
    """This machine's processor, for people: model, cores, and what makes it fast at networks."""
    model = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    cores = physical_cores()
    flags = _flags()
    notable = " ".join(flag for flag in _NOTABLE if flag in flags)
    return ", ".join(filter(None, (model, f"{cores} core{'s' if cores > 1 else ''}", notable)))


def present_capability() -> str | None:
    """Compute capability of the first GPU that this process may use, such as `8.0`; None where there is none."""
    found = visible_gpus()
    return found[0].capability if found else None


def present_gpu() -> str | None:
    """The name of the first GPU that this process may use, as CUDA has it; None where there is none."""
    found = visible_gpus()
    return found[0].name if found else None


def free_memory_bytes() -> int | None:
    """Memory that can be used without swapping; None where the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _cpuinfo() -> dict[str, str]:
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux: the platform's own name is used instead
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def _flags() -> list[str]:
    facts = _cpuinfo()
    return (facts.get("flags") or facts.get("Features") or "").split()

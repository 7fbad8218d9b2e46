"""What engines can be made for and timed on, and how onnxruntime is started there.

Imports nothing heavy: asking for `cpu` costs no torch.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klas_zoo.errors import AbsentDevice, ExportError, KlasZooError
from klas_zoo.profiles.catalog import DeviceSpec, find_spec, spec_of_cuda_device, unknown

if TYPE_CHECKING:
    import onnxruntime

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# the kernel's names, x86 and Arm, for what makes a processor fast at networks
_NOTABLE = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "sve")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that numbers are measured on.

    Attributes:
        name: what the user calls it.
        provider: onnxruntime's execution provider for it.
        torch_device: where torch computes for it.
        hardware: this machine's, for people: model, cores and instruction sets, or driver.
        here: whether this machine has it. Of one that is elsewhere engines are made and checked on the
            CPU, and nothing is timed.
    """

    name: str
    provider: str
    torch_device: str
    hardware: str
    here: bool = True


def known_devices() -> tuple[str, ...]:
    """Names this version can measure on, whether or not this machine has them."""
    return ("cpu", "cuda")


def resolve_device(name: str) -> Device:
    """The device of that name, if this machine has it.

    Raises:
        UnknownName: this version knows no such device.
        AbsentDevice: it does, but this machine has none.
        KlasZooError: it has one, but what is installed cannot use it.
    """
    if name == "cpu":
        return Device(name=name, provider=CPU_PROVIDER, torch_device="cpu", hardware=describe_cpu())
    if name == "cuda":
        return Device(name=name, provider=CUDA_PROVIDER, torch_device="cuda", hardware=_cuda())
    if spec := find_spec(name):
        _find_gpu(spec)
        return Device(name=spec.name, provider=CUDA_PROVIDER, torch_device="cuda", hardware=_cuda())
    raise unknown(name)


def elsewhere(name: str, hardware: str) -> Device:
    """A device that this machine does not have, for making engines that run on it."""
    return Device(name=name, provider=CPU_PROVIDER, torch_device="cpu", hardware=hardware, here=False)


def detected_name() -> str:
    """The catalog's name of the GPU that torch computes on, else what CUDA calls it, fit for a folder."""
    import torch

    name = torch.cuda.get_device_properties(0).name
    spec = spec_of_cuda_device(name)
    return spec.name if spec else re.sub(r"[^a-z0-9]+", "-", name.removeprefix("NVIDIA ").lower()).strip("-")


def physical_cores() -> int:
    """Cores this process may run on, without hyper-threads: onnxruntime's own choice of threads."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = Path("/sys/devices/system/cpu")
    try:
        # the threads of one core all name the same siblings
        return len({(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in usable})
    except OSError:
        return len(usable)


def has_fast_bf16(torch_device: str) -> bool:
    """Whether products in bfloat16 are faster there than in float32, and not emulated."""
    if torch_device == "cpu":
        return any(name in _flags() for name in ("avx512_bf16", "amx_bf16", "bf16"))
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def open_session(
    engine: Path | bytes,
    provider: str,
    threads: int | None,
    config: Mapping[str, str] | None = None,
    *,
    provider_options: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Loads an engine as a user would: all of onnxruntime's optimisations, nothing else changed.

    Args:
        engine: a file, or what would be in it.
        threads: that compute one operator; None: one for each physical core.
        config: entries of the session's configuration, by onnxruntime's names.
        provider_options: of CUDA's provider, besides TF32, which is off.

    Raises:
        ExportError: onnxruntime cannot load the engine.
        KlasZooError: the provider does not start.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 3  # errors; its warnings tell where it put which node
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    providers: list[str | tuple[str, dict[str, str]]] = [CPU_PROVIDER]
    if provider == CUDA_PROVIDER:
        # by default CUDA rounds fp32 to TF32, 10 of 23 bits, and an engine of fp32 would be none
        providers.insert(0, (CUDA_PROVIDER, {"use_tf32": "0", **(provider_options or {})}))
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
            # CUDA's libraries come from Python packages, where the system's loader does not look
            onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(engine, options, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise ExportError(f"onnxruntime cannot load {_name(engine)}: {first_line(error)}") from error
    # a provider that does not start is replaced by the CPU without an error
    if session.get_providers()[0] != provider:
        raise KlasZooError(
            f"onnxruntime's {provider} does not start here: pip install 'onnxruntime-gpu[cuda,cudnn]' brings "
            "the libraries it needs; the driver has to be there."
        )
    return session


def first_line(error: BaseException) -> str:
    """Of an error's message; libraries add pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _name(engine: Path | bytes) -> str:
    return "an engine" if isinstance(engine, bytes) else str(engine)


def _cpuinfo() -> dict[str, str]:
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):  # not Linux: the platform's own name has to do
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return facts


def _flags() -> list[str]:
    facts = _cpuinfo()
    return (facts.get("flags") or facts.get("Features") or "").split()


def describe_cpu() -> str:
    """This machine's processor, for people: model, cores, and what makes it fast at networks."""
    model = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    cores = physical_cores()
    flags = _flags()
    notable = " ".join(flag for flag in _NOTABLE if flag in flags)
    return ", ".join(filter(None, (model, f"{cores} core{'s' if cores > 1 else ''}", notable)))


def _find_gpu(spec: DeviceSpec) -> None:
    import torch

    advice = f"import a profile of {spec.name} (klas-zoo profile import FILE) or add --predict"
    if not torch.cuda.is_available():
        raise AbsentDevice(f"This machine has no CUDA device, and so no {spec.name}: {advice}.")
    found = torch.cuda.get_device_properties(0).name
    if not spec.is_cuda_device(found):
        raise AbsentDevice(f"This machine's CUDA device is {found}, no {spec.name}: {advice}.")


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise AbsentDevice("This machine has no CUDA device that torch can use; --device cpu works everywhere.")
    # better now than after the tuning that an engine was meant to come out of
    open_session(_smallest_engine(), CUDA_PROVIDER, 1)
    gpu = torch.cuda.get_device_properties(0)
    facts = [gpu.name, f"compute capability {gpu.major}.{gpu.minor}", f"{gpu.total_memory / 2**30:.0f} GiB"]
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        facts += [f"driver {found}" for found in re.findall(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)]
    return ", ".join(facts)


def _smallest_engine() -> bytes:
    import onnx

    text = '<ir_version: 10, opset_import: ["": 20]> smallest (float[1] x) => (float[1] y) { y = Neg(x) }'
    engine: bytes = onnx.parser.parse_model(text).SerializeToString()
    return engine

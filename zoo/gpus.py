"""The NVIDIA GPUs that this process may use, as the driver reports them. Imports nothing heavy, and needs no torch.

Nothing here makes a context on a GPU: on a card in exclusive mode, that would keep every other process off it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

_MAJOR, _MINOR, _PROCESSORS, _COMPUTE_MODE = 75, 76, 16, 20  # CUdevice_attribute
_MODES = {
    2: "prohibits computing (compute mode PROHIBITED): an administrator allows it by nvidia-smi -c DEFAULT",
    3: "takes one process at a time (compute mode EXCLUSIVE_PROCESS), and another may hold it: nvidia-smi lists it; "
    "nvidia-smi -c DEFAULT lets several in",
}
_REASONS = {
    100: "the driver reports no GPU: CUDA_VISIBLE_DEVICES may hide it, or a container was started without GPUs",
    803: "the driver's kernel module and its library have different versions: restart the machine",
}
_BUSY = "another process holds the GPU: nvidia-smi lists it"
_CAUSES = {
    "no kernel image": "this package has no kernels for {card}: install one that has, or take another --runtime",
    "busy or unavailable": _BUSY,
    "cudnn is unavailable": "cuDNN is not found: pip install 'onnxruntime-gpu[cuda,cudnn]' brings it",
    "libcudnn": "cuDNN is not found: pip install 'onnxruntime-gpu[cuda,cudnn]' brings it",
}
"""By what CUDA, torch or onnxruntime say, in lower case."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU or a MIG slice of one.

    Attributes:
        name: as CUDA reports it, `NVIDIA A100-SXM4-40GB MIG 3g.20gb`.
        uuid: as NVML spells it, `GPU-…` or `MIG-…`.
        capability: `8.0`.
        processors: streaming multiprocessors.
    """

    name: str
    uuid: str
    memory_bytes: int
    capability: str
    processors: int

    @property
    def is_slice(self) -> bool:
        return " MIG " in self.name

    def __str__(self) -> str:
        return f"{self.name}, compute capability {self.capability}, {self.memory_bytes / 2**30:.0f} GiB"


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs in CUDA's order, which is torch's; empty where there are none, see `why_no_gpu`."""
    driver, _ = _driver()
    if driver is None:
        return ()
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, number) for number in range(count.value))


def why_no_gpu() -> str:
    """The reason why `visible_gpus` is empty, for the end of a sentence."""
    driver, why = _driver()
    return why if driver is None else _REASONS[100]


def why_unusable(runtime_cuda: str | None) -> str | None:
    """Why the first GPU may not compute for software of a version of CUDA; None where the driver knows no reason.

    Args:
        runtime_cuda: the version it was compiled for, `13.0`.
    """
    driver, why = _driver()
    if driver is None:
        return why
    newest = driver_cuda()
    if runtime_cuda and newest and newest[0] < int(runtime_cuda.partition(".")[0]):
        return (
            f"the NVIDIA driver runs CUDA up to {newest[0]}.{newest[1]}, and this package was compiled for CUDA "
            f"{runtime_cuda}: update the driver, or install packages for CUDA {newest[0]}"
        )
    mode = _MODES.get(_attribute(driver, _COMPUTE_MODE, ctypes.c_int(0)))
    return f"{visible_gpus()[0].name} {mode}" if mode else None


def cause_of(said: str) -> str:
    """A clause: what is wrong and what mends it, where CUDA or a library over it failed; empty of other words."""
    found = next((cause for words, cause in _CAUSES.items() if words in said.lower()), None)
    if found is None:
        return ""
    gpu = next(iter(visible_gpus()), None)
    mode = why_unusable(None) if found is _BUSY else None
    card = f"{gpu.name} (compute capability {gpu.capability})" if gpu else "the GPU"
    return mode or found.format(card=card)


def driver_cuda() -> tuple[int, int] | None:
    """The newest version of CUDA that the driver runs; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _driver() -> tuple[Any, str]:
    """CUDA's driver, started, or the reason why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver: libcuda.so.1 is not found"
    error = driver.cuInit(0)
    if error:
        return None, _REASONS.get(error, f"the NVIDIA driver does not start (CUDA error {error})")
    return driver, ""


def _gpu(driver: Any, number: int) -> Gpu:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, uuid = ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    # the newer function gives a slice its own UUID, the older one that of the whole card
    getattr(driver, "cuDeviceGetUuid_v2", driver.cuDeviceGetUuid)(ctypes.byref(uuid), device)
    text = bytes(uuid).hex()
    grouped = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    called = name.value.decode(errors="replace")
    return Gpu(
        name=called,
        uuid=f"{'MIG' if ' MIG ' in called else 'GPU'}-{grouped}",
        memory_bytes=memory.value,
        capability=f"{_attribute(driver, _MAJOR, device)}.{_attribute(driver, _MINOR, device)}",
        processors=_attribute(driver, _PROCESSORS, device),
    )


def _attribute(driver: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value

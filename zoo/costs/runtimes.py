"""What runs networks that are measured: which runtimes there are, in which precisions, and one network in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from klas_zoo.errors import UsageError
from klas_zoo.exporters.to_tensorrt import PlanSettings, build_plan
from klas_zoo.profiles import runners
from klas_zoo.profiles.devices import Device, physical_cores
from klas_zoo.profiles.interpolation import MOST_STITCHES
from klas_zoo.profiles.timing import Method, Runner

PRECISIONS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("onnxruntime", "cpu"): ("fp32", "int8"),
    ("onnxruntime", "cuda"): ("fp32", "fp16", "bf16"),
    ("torch", "cpu"): ("fp32", "fp16", "bf16"),
    ("torch", "cuda"): ("fp32", "fp16", "bf16"),
    ("tensorrt", "cuda"): ("fp32", "fp16", "bf16"),
}
"""What each runtime computes in, by its name and where it runs."""
RUNTIMES = ("onnxruntime", "torch", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What is measured, and how.

    Attributes:
        batches: one record each.
        threads: of a CPU runtime; None: one for each physical core.
        stitches: how many are measured for the model, besides the anchors.
        checks: how many more are measured only to see how far the model is off.
        compiled, graph: torch.compile, and CUDA graphs.
        name: of the device in the record, where it is not to be the device's own.
        seed: of which stitches are checked.
    """

    runtime: str = "onnxruntime"
    precision: str = "fp32"
    batches: tuple[int, ...] = (1,)
    threads: int | None = None
    stitches: int = MOST_STITCHES
    checks: int = 0
    compiled: bool = False
    graph: bool = False
    name: str | None = None
    method: Method = field(default_factory=Method)
    seed: int = 0


def check_settings(settings: ProfileSettings, torch_device: str) -> None:
    """Refuses what no runtime here can do, before anything is spent on it.

    Raises:
        UsageError: a precision the runtime lacks, or options that do not go together.
    """
    known = PRECISIONS.get((settings.runtime, torch_device), ())
    if not known:
        raise UsageError(f"{settings.runtime} does not run on {torch_device}: say --runtime onnxruntime or torch.")
    if settings.precision not in known:
        instead = " int8 is onnxruntime's, on a CPU." if settings.precision == "int8" else ""
        raise UsageError(
            f"{settings.runtime} is not measured in {settings.precision} on {torch_device}: it has "
            f"{', '.join(known)}.{instead}"
        )
    if settings.compiled and settings.runtime != "torch":
        raise UsageError(f"--compile is torch's, and the runtime is {settings.runtime}.")
    if settings.graph and (torch_device != "cuda" or settings.runtime == "tensorrt"):
        raise UsageError("--cuda-graph needs a CUDA device and the runtime torch or onnxruntime.")


def runner_of(network: Path | nn.Module, images: np.ndarray, settings: ProfileSettings, device: Device) -> Runner:
    """A network, a file or a module, made ready to be timed on images (B, C, H, W)."""
    on_gpu = device.torch_device == "cuda"
    if isinstance(network, nn.Module):
        make: Callable[..., Runner] = runners.torch_cuda_runner if on_gpu else runners.TorchCpuRunner
        options = {"graph": settings.graph} if on_gpu else {}
        return make(network, images, settings.precision, compiled=settings.compiled, **options)
    if settings.runtime == "tensorrt":
        return _tensorrt_runner(network, images, settings.precision)
    if on_gpu:
        return runners.onnx_cuda_runner(network, images, graph=settings.graph)
    return runners.OnnxCpuRunner(network, images, settings.threads or physical_cores())


def _tensorrt_runner(graph: Path, images: np.ndarray, precision: str) -> Runner:
    from klas_zoo.exporters.trt_session import PlanSession

    engine = graph.with_suffix(".plan")
    if not engine.is_file():
        build_plan(graph, engine, PlanSettings(runtime="tensorrt", precision=precision))
    session, held = PlanSession(engine), torch.from_numpy(images).to("cuda")
    return runners.CudaRunner(lambda: session.run(held), torch.cuda.Stream(), "tensorrt")


def runtime_facts(runtime: str, device: Device) -> tuple[str, str]:
    """Its version, and which provider of it computes."""
    if runtime == "torch":
        return torch.__version__, device.torch_device
    if runtime == "tensorrt":
        from klas_zoo.exporters.trt_library import find_library

        return find_library("tensorrt").version, "tensorrt"
    import onnxruntime

    return onnxruntime.__version__, device.provider


def free_memory_bytes() -> int | None:
    """None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None

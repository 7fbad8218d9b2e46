"""What runs networks that are measured: which runtimes there are, in which precisions, and one network in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from klas_zoo.errors import UsageError
from klas_zoo.exporters.to_tensorrt import PlanSettings, build_plan
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.interpolation import MOST_STITCHES
from klas_zoo.profiles.latency import provider_on
from klas_zoo.profiles.runners import SessionRunner
from klas_zoo.profiles.store import check_name
from klas_zoo.profiles.timing import Method
from klas_zoo.runtimes import RUNTIMES, open_engine, runtime_named
from klas_zoo.runtimes.plans import BatchRange


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
        UnknownName: there is no such runtime.
        UsageError: it does not compute there, or not in that precision, or options contradict each other.
        ProfileError: the name cannot be a device's.
    """
    if settings.name is not None:
        check_name(settings.name)
    runtime = runtime_named(settings.runtime)
    provider = runtime.providers.get(torch_device)
    if provider is None:
        others = " or ".join(name for name, one in RUNTIMES.items() if torch_device in one.providers)
        raise UsageError(f"{settings.runtime} does not run on {torch_device}: pass --runtime {others}.")
    known = runtime.precisions[provider]
    if settings.precision not in known:
        able = [
            name
            for name, one in RUNTIMES.items()
            if settings.precision in one.precisions.get(one.providers.get(torch_device, ""), ())
        ]
        instead = f"; {settings.precision} there is for --runtime {' or '.join(able)}" if able else ""
        raise UsageError(
            f"{settings.runtime} is not measured in {settings.precision} on {torch_device}: it computes in "
            f"{', '.join(known)}{instead}."
        )
    if settings.compiled and settings.runtime != "torch":
        raise UsageError(f"--compile is torch's, and the runtime is {settings.runtime}.")
    if settings.graph and (torch_device != "cuda" or settings.runtime not in ("torch", "onnxruntime")):
        raise UsageError("--cuda-graph needs a CUDA device and the runtime torch or onnxruntime.")


def runtime_options(settings: ProfileSettings) -> dict[str, str]:
    """Options of the runtime that differ from this project's defaults."""
    options = {}
    if settings.compiled:
        options["compile"] = "1"
    if settings.graph:
        options["cuda_graph" if settings.runtime == "torch" else "enable_cuda_graph"] = "1"
    return options


def runner_of(
    network: Path | nn.Module, images: np.ndarray, settings: ProfileSettings, device: Device
) -> SessionRunner:
    """A network, a file or a module, opened and ready to be timed on images (B, C, H, W)."""
    options = runtime_options(settings)
    if isinstance(network, nn.Module):
        options["precision"] = settings.precision
    elif runtime_named(settings.runtime).compiles:
        network = _plan(network, len(images), settings)
    session = open_engine(
        network,
        runtime=settings.runtime,
        provider=provider_on(settings.runtime, device),
        threads=settings.threads,
        options=options,
    )
    return SessionRunner(session, images, device_clock=True)


def _plan(graph: Path, batch: int, settings: ProfileSettings) -> Path:
    """A TensorRT engine for exactly one batch size: one for a range is slower at most of its sizes."""
    engine = graph.with_suffix(f".batch{batch}.plan")
    if not engine.is_file():
        profile = BatchRange(smallest=batch, usual=batch, largest=batch)
        wanted = PlanSettings(runtime=settings.runtime, precision=settings.precision, profiles=(profile,))
        build_plan(graph, engine, wanted)
    return engine

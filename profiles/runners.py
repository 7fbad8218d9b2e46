"""Networks ready to be timed: onnxruntime and torch, on a CPU or a CUDA device.

On a CPU the host's clock is the only one. onnxruntime's threads spin while a network runs, as they
do for a user, and stop when it answers (`session.force_spinning_stop`): so many sessions can be
alive at once without stealing each other's cores.

On a GPU every run is bracketed by CUDA events, which give the device's own time, and by the host's
clock, which adds launching and waiting. Inputs and outputs stay on the device (IO binding). With
`graph` the kernels are captured once and replayed: what is left is the device's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from klas_zoo.errors import ExportError, ProfileError
from klas_zoo.profiles.devices import CPU_PROVIDER, CUDA_PROVIDER, first_line, open_session

TORCH_TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OUT_OF_MEMORY = ("out of memory", "failed to allocate", "bad_alloc", "cannot allocate", "bad allocation")


class OutOfMemory(ProfileError):
    """A batch that does not fit: a record says so, and the next batch is tried."""


def images_of(batch: int, input_shape: tuple[int, ...]) -> np.ndarray:
    """The same images every time, (B, C, H, W), spread like normalised photographs: zeros would be too easy."""
    return np.random.default_rng(0).standard_normal((batch, *input_shape), dtype=np.float32)


class OnnxCpuRunner:
    """An engine in onnxruntime on the CPU: numpy images in, numpy logits out."""

    def __init__(self, engine: Path | bytes, images: np.ndarray, threads: int) -> None:
        self.session = open_session(engine, CPU_PROVIDER, threads, {"session.force_spinning_stop": "1"})
        self.feed = {self.session.get_inputs()[0].name: images}
        _first(self.run, "onnxruntime")

    def run(self) -> None:
        self.session.run(None, self.feed)

    def time(self, count: int) -> tuple[list[float], None]:
        return _host_times(self.run, count), None


class TorchCpuRunner:
    """A module in torch on the CPU, eager or compiled."""

    def __init__(self, module: nn.Module, images: np.ndarray, precision: str, *, compiled: bool = False) -> None:
        kind = TORCH_TYPES[precision]
        network = module.eval().to(kind)
        self.network = torch.compile(network) if compiled else network
        self.images = torch.from_numpy(images).to(kind)
        _first(self.run, "torch")

    @torch.inference_mode()
    def run(self) -> None:
        self.network(self.images)

    def time(self, count: int) -> tuple[list[float], None]:
        return _host_times(self.run, count), None


class CudaRunner:
    """Anything that enqueues one batch on a stream of the current CUDA device.

    Args:
        enqueue: starts one batch on `stream` and returns; called with `stream` current.
    """

    def __init__(self, enqueue: Callable[[], object], stream: torch.cuda.Stream, runtime: str) -> None:
        self.enqueue, self.stream = enqueue, stream
        _first(self.run, runtime)

    def run(self) -> None:
        with torch.cuda.stream(self.stream):
            self.enqueue()
        self.stream.synchronize()

    def time(self, count: int) -> tuple[list[float], list[float]]:
        device_ms, host_ms = [], []
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(count):
            before = perf_counter_ns()
            with torch.cuda.stream(self.stream):
                start.record(self.stream)
                self.enqueue()
                end.record(self.stream)
            end.synchronize()
            host_ms.append((perf_counter_ns() - before) / 1e6)
            device_ms.append(start.elapsed_time(end))
        return device_ms, host_ms


def torch_cuda_runner(
    module: nn.Module, images: np.ndarray, precision: str, *, compiled: bool = False, graph: bool = False
) -> CudaRunner:
    """A module in torch on the current CUDA device: eager, compiled, or captured into a CUDA graph.

    Raises:
        OutOfMemory: the batch does not fit.
    """
    kind = TORCH_TYPES[precision]
    stream = torch.cuda.Stream()
    with _telling_of_memory("torch"), torch.cuda.stream(stream):
        network = module.eval().to("cuda", kind)
        held = torch.from_numpy(images).to("cuda", kind)
        call: Callable[[torch.Tensor], Any] = torch.compile(network) if compiled else network

        def enqueue() -> None:
            with torch.inference_mode():
                call(held)

        if graph:
            enqueue = _captured(enqueue, stream)
    return CudaRunner(enqueue, stream, "torch")


def onnx_cuda_runner(engine: Path | bytes, images: np.ndarray, *, graph: bool = False) -> CudaRunner:
    """An engine in onnxruntime's CUDA provider, input and output bound to the device's memory.

    Raises:
        OutOfMemory: the batch does not fit.
        ExportError: onnxruntime cannot load or run the engine.
    """
    stream = torch.cuda.Stream()
    # fp32 is fp32 here, not TF32; on torch's stream, so that torch's events bracket the run
    options = {
        "use_tf32": "0",
        "user_compute_stream": str(stream.cuda_stream),
        "enable_cuda_graph": "1" if graph else "0",
    }
    with _telling_of_memory("onnxruntime"):
        session = open_session(engine, CUDA_PROVIDER, 1, provider_options=options)
        (inputs, outputs) = session.get_inputs()[0], session.get_outputs()[0]
        if inputs.type == "tensor(float16)":
            images = images.astype(np.float16)
        binding = session.io_binding()
        held = onnxruntime.OrtValue.ortvalue_from_numpy(images, "cuda", 0)
        binding.bind_ortvalue_input(inputs.name, held)
        if graph:
            # a graph writes to the addresses it was captured with
            logits = np.zeros((len(images), outputs.shape[-1]), images.dtype)
            binding.bind_ortvalue_output(outputs.name, onnxruntime.OrtValue.ortvalue_from_numpy(logits, "cuda", 0))
        else:
            binding.bind_output(outputs.name, "cuda", 0)
        # onnxruntime waits for its stream at the end of a run unless it is told not to
        run_options = onnxruntime.RunOptions()
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return CudaRunner(lambda: session.run_with_iobinding(binding, run_options), stream, "onnxruntime")


def _captured(enqueue: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The kernels of one batch as a CUDA graph; torch asks for a few runs before a capture."""
    for _ in range(3):
        enqueue()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        enqueue()
    return graph.replay


def _host_times(run: Callable[[], None], count: int) -> list[float]:
    times = []
    for _ in range(count):
        before = perf_counter_ns()
        run()
        times.append((perf_counter_ns() - before) / 1e6)
    return times


def _first(run: Callable[[], None], runtime: str) -> None:
    with _telling_of_memory(runtime):
        run()


class _telling_of_memory:  # noqa: N801  it is used as a statement
    """Turns the many ways of saying that memory is out into one, and the rest into ExportError."""

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (ExportError, ProfileError)) or not isinstance(error, Exception):
            if isinstance(error, ExportError) and is_out_of_memory(error):
                raise OutOfMemory(f"{self.runtime} is out of memory: {first_line(error)}") from error
            return
        if is_out_of_memory(error):
            raise OutOfMemory(f"{self.runtime} is out of memory: {first_line(error)}") from error
        # runtimes' exceptions have no common class of their own; a bug of ours would raise in a test
        raise ExportError(f"{self.runtime} cannot run the network: {first_line(error)}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA, onnxruntime or the system says that memory is out."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(one in text for one in _OUT_OF_MEMORY)

"""TensorRT (10 and 11) and TensorRT for RTX, which have the same Python API under two names.

TensorRT builds on the GPU it builds for, and times kernels there; TensorRT for RTX compiles for the capabilities it is
given, without a GPU, and finishes on the user's machine. Building is in `exporters.to_tensorrt`.

Options: `graph`, the ONNX file an engine was built from; needed where its weights were stripped.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import ExportError, KlasZooError, UnknownName
from klas_zoo.files import sha256_of
from klas_zoo.hardware import present_capability, present_gpu
from klas_zoo.runtimes import cuda
from klas_zoo.runtimes.base import Closing, Installable, canonical_options
from klas_zoo.runtimes.plans import TENSORRT_RUNTIMES, checked, read_record

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Library:
    """An imported library; `log` collects the errors it reports."""

    runtime: str
    module: Any
    log: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    def complaint(self) -> str:
        """The first error since the last call, one line, without the library's file and line."""
        errors, self.log.errors[:] = [*self.log.errors], []
        return errors[0].strip().splitlines()[0] if errors else "the library gives no reason"


def find_library(runtime: str) -> Library:
    """Imports a library.

    Raises:
        UnknownName: it is neither.
        KlasZooError: it is not installed, or does not start; the message has the command that installs it.
    """
    if runtime not in TENSORRT_RUNTIMES:
        raise UnknownName("TensorRT library", runtime, TENSORRT_RUNTIMES)
    try:
        module = importlib.import_module(runtime.replace("-", "_"))
    except ImportError as error:
        raise KlasZooError(
            f"The library {runtime} cannot be imported ({error}): pip install 'klas-zoo[{runtime}]' brings it."
        ) from error
    return Library(runtime=runtime, module=module, log=_log(module))


@cache
def _log(module: Any) -> Any:
    # one for each library: the first one that it is given stays for the life of the process
    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                self.errors.append(message)

    return Log()


class TensorRT(Installable):
    """See `klas_zoo.runtimes.base.Runtime`. Its only provider has the runtime's name."""

    formats: tuple[str, ...] = ("plan",)
    compiles = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.precisions: Mapping[str, tuple[str, ...]] = {name: ("fp32", "fp16", "bf16")}
        self.providers: Mapping[str, str] = {"cuda": name}

    def version(self) -> str:
        return find_library(self.name).version

    def open(
        self,
        engine: Path | bytes | Any,
        *,
        provider: str = "",
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> PlanSession:
        if not isinstance(engine, Path):
            raise ExportError(f"{self.name} opens files: an engine's record is a file beside it.")
        record = read_record(engine)
        if record.runtime != self.name:
            raise ExportError(f"{engine} is an engine of {record.runtime}, not of {self.name}.")
        graph = (options or {}).get("graph")
        return PlanSession(engine, graph=Path(graph) if graph else None, options=options or {})


class PlanSession(Closing):
    """An engine in the GPU's memory; `raw` is its `ICudaEngine`.

    Args:
        engine: the file `build_plan` wrote.
        graph: the ONNX file it was built from; needed where the engine's weights were stripped.

    Raises:
        CannotRunHere: the engine does not fit the library or the GPU; the message has the reason.
        ExportError: it is damaged, or does not load.
    """

    threads = 0

    def __init__(self, engine: Path, *, graph: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        library = None
        self.runtime = self.provider = read_record(engine).runtime
        with contextlib.suppress(KlasZooError):  # it is not installed, which `checked` explains
            library = find_library(self.runtime)
        installed = library.version if library else None
        self.record = checked(engine, installed=installed, present=present_capability(), gpu=present_gpu())
        assert library is not None
        self.runtime_version = library.version
        self.options = canonical_options({k: v for k, v in (options or {}).items() if k != "graph"})
        self.raw = _deserialized(library, engine, self.record.weights == "stripped", graph, self.record.graph_sha256)
        self.input_shape: tuple[int | None, ...] = self.record.input_shape
        self.smallest_batch = min(one.smallest for one in self.record.profiles)
        self.largest_batch: int | None = max(one.largest for one in self.record.profiles)
        self._context = self.raw.create_execution_context()
        self._stream = cuda.new_stream()
        self._lock = threading.Lock()  # a context executes one batch at a time
        self._ready: tuple[int, int] | None = None  # the profile and the batch that the context is set to

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `Session.run`; B within one of the engine's profiles."""
        torch = cuda.torch_library()
        with self._lock, torch.cuda.stream(self._stream):
            enqueue, logits = self._prepared(torch.from_numpy(images).to("cuda"))
            enqueue()
            self._stream.synchronize()
            found: np.ndarray = logits.cpu().numpy()
            return found

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """See `Session.device_times`: CUDA events around the engine alone."""
        torch = cuda.torch_library()
        with self._lock:
            with torch.cuda.stream(self._stream):
                enqueue, _ = self._prepared(torch.from_numpy(images).to("cuda"))
            self._stream.synchronize()
            return cuda.event_times(enqueue, self._stream, count)

    def close(self) -> None:
        """See `Session.close`."""
        self._context = self.raw = None

    def _prepared(self, images: Any) -> tuple[Callable[[], None], Any]:
        """What enqueues a batch (B, C, H, W) of the GPU's memory, and where its logits (B, classes) will be."""
        torch = cuda.torch_library()
        batch = len(images)
        profile = self._profile(batch)
        if self._ready is None or self._ready[0] != profile:
            self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        source, target = self.raw.get_tensor_name(0), self.raw.get_tensor_name(1)
        if self._ready != (profile, batch):
            self._context.set_input_shape(source, tuple(images.shape))
            self._ready = (profile, batch)
        images = images.contiguous()
        logits = torch.empty(batch, self.record.classes, device="cuda", dtype=torch.float32)
        self._context.set_tensor_address(source, images.data_ptr())
        self._context.set_tensor_address(target, logits.data_ptr())

        def enqueue(held: Any = images) -> None:  # `held`: the addresses stay valid as long as this can be called
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise ExportError(f"The engine did not run a batch of {batch}.")

        return enqueue, logits

    def _profile(self, batch: int) -> int:
        fitting = [n for n, p in enumerate(self.record.profiles) if p.smallest <= batch <= p.largest]
        if not fitting:
            known = ", ".join(map(str, self.record.profiles))
            raise ExportError(f"The engine takes batches of {known}, not of {batch}.")
        return fitting[0]


def _deserialized(library: Library, engine: Path, stripped: bool, graph: Path | None, graph_sha256: str) -> Any:
    trt = library.module
    found = trt.Runtime(library.log).deserialize_cuda_engine(engine.read_bytes())
    if found is None:
        raise ExportError(f"{library.runtime} cannot load {engine} ({library.complaint()}).")
    if stripped:
        refitter = trt.Refitter(found, library.log)
        parser = trt.OnnxParserRefitter(refitter, library.log)
        same = graph is not None and graph.is_file() and sha256_of(graph) == graph_sha256
        if not same or not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise ExportError(f"{engine} has no weights of its own, and {graph} does not provide them.")
    return found

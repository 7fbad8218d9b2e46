"""torch, eager, compiled or as a CUDA graph: for profiling networks that have not been exported.

Options: `precision` (fp32, fp16, bf16), `compile` and `cuda_graph` (`1`). TF32 is off. The number of threads
is torch's, which is the process's: it is set while a session is open.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import ExportError, KlasZooError, UsageError, first_line
from klas_zoo.gpus import cause_of, why_unusable
from klas_zoo.hardware import physical_cores
from klas_zoo.runtimes import cuda
from klas_zoo.runtimes.base import Closing, Installable, canonical_options

if TYPE_CHECKING:
    import numpy as np

_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_COMPILED_VERSIONS = 512  # of one function's code
_DEFAULTS = {"compile": "0", "cuda_graph": "0"}


class Torch(Installable):
    """See `klas_zoo.runtimes.base.Runtime`; its engines are modules."""

    name = "torch"
    formats: tuple[str, ...] = ("torch",)
    precisions: Mapping[str, tuple[str, ...]] = {"cpu": tuple(_TYPES), "cuda": tuple(_TYPES)}
    providers: Mapping[str, str] = {"cpu": "cpu", "cuda": "cuda"}
    compiles = False

    def version(self) -> str:
        return str(_library().__version__)

    def open(
        self,
        engine: Any,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> TorchSession:
        torch = _library()
        if not isinstance(engine, torch.nn.Module):
            raise UsageError(f"torch runs modules, not {engine_kind(engine)}: use onnxruntime for an ONNX file.")
        if provider == "cuda" and not torch.cuda.is_available():
            built = torch.version.cuda
            without = "this torch was built without CUDA: klas-zoo doctor says which has it"
            why = why_unusable(built) if built else without
            raise KlasZooError(f"torch finds no CUDA device here{f': {why}' if why else ''}.")
        settings = {"precision": "fp32", **_DEFAULTS, **(options or {})}
        if settings["precision"] not in _TYPES:
            raise UsageError(f"torch does not compute in {settings['precision']}: it has {', '.join(_TYPES)}.")
        if settings["cuda_graph"] == "1" and provider != "cuda":
            raise UsageError("A CUDA graph needs a CUDA device.")
        return TorchSession(engine, provider, threads or physical_cores(), settings)


class TorchSession(Closing):
    """A module in torch; `raw` is what is called. It is a copy where precision or device differ from the module's."""

    runtime = "torch"
    smallest_batch = 1
    largest_batch: int | None = None
    input_shape: tuple[int | None, ...] = (None, None, None)

    def __init__(self, module: Any, provider: str, threads: int, settings: Mapping[str, str]) -> None:
        torch = _library()
        self.runtime_version, self.provider = str(torch.__version__), provider
        self.threads = threads if provider == "cpu" else 0
        shown = {key: value for key, value in settings.items() if key != "precision"}
        self.options = canonical_options(shown, _DEFAULTS)
        self._threads_before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        self._type, self._compiled = getattr(torch, _TYPES[settings["precision"]]), settings["compile"] == "1"
        self._graphs: dict[tuple[int, ...], _Captured] | None = {} if settings["cuda_graph"] == "1" else None
        self._lock = threading.Lock()
        try:
            self._stream = torch.cuda.Stream() if provider == "cuda" else None
            first = next(module.parameters(), torch.empty(0))
            if first.dtype != self._type or first.device.type != provider:  # `to` would change the caller's weights
                module = copy.deepcopy(module).to(provider, self._type)
            self.raw = _compiled(module.eval()) if self._compiled else module.eval()
        except Exception as error:  # torch's exceptions have no common class of their own
            raise ExportError(f"torch cannot load the network: {_said(error)}") from error

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        torch = _library()
        with self._reporting():
            given = torch.from_numpy(images)
            if self._stream is None:
                found = self._network(given.to(self._type))
            else:
                with self._lock, torch.cuda.stream(self._stream):
                    found = self._on_gpu(given)
            logits: np.ndarray = found.float().cpu().numpy()
            return logits

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """See `Session.device_times`: CUDA events on the session's stream."""
        if self._stream is None:
            return []
        torch = _library()
        with self._reporting():
            with torch.cuda.stream(self._stream):
                held = torch.from_numpy(images).to("cuda").to(self._type)
                enqueue: Callable[[], object] = lambda: self._network(held)  # noqa: E731
                if self._graphs is not None:
                    enqueue = self._captured(held).replay
            self._stream.synchronize()
            return cuda.event_times(enqueue, self._stream, count)

    def close(self) -> None:
        """See `Session.close`."""
        self.raw, self._graphs = None, None
        if self.threads:
            _library().set_num_threads(self._threads_before)

    def _network(self, images: Any) -> Any:
        torch = _library()
        if self._stream is None:
            with torch.inference_mode():
                return self.raw(images)
        allowed = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: cuDNN's own default rounds to 10 of 23 bits
        try:
            with torch.inference_mode():
                return self.raw(images)
        finally:
            torch.backends.cudnn.allow_tf32 = allowed

    def _on_gpu(self, images: Any) -> Any:
        if self._graphs is None:
            return self._network(images.to("cuda").to(self._type))
        captured = self._captured(images)
        captured.images.copy_(images)
        captured.replay()
        return captured.logits

    def _captured(self, images: Any) -> _Captured:
        assert self._graphs is not None
        shape = tuple(images.shape)
        if shape not in self._graphs:
            self._graphs[shape] = _Captured(self._network, images.to("cuda").to(self._type).clone(), self._stream)
        return self._graphs[shape]

    def _reporting(self) -> _Reporting:
        return _Reporting()


def _compiled(module: Any) -> Any:
    """A module that compiles, or fails: torch's default runs it eagerly from the ninth version of its code on.

    All networks of a family share the code of their blocks, so a profile has more versions than that.
    """
    torch = _library()
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _COMPILED_VERSIONS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * _COMPILED_VERSIONS)
    settings.fail_on_recompile_limit_hit = True
    return torch.compile(module)


class _Captured:
    """The kernels of one batch as a CUDA graph, captured after the few runs that torch asks for."""

    def __init__(self, network: Callable[[Any], Any], images: Any, stream: Any) -> None:
        torch = _library()
        self.images = images
        for _ in range(3):
            network(images)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = network(images)
        self.replay: Callable[[], None] = graph.replay


class _Reporting:
    """Turns torch's exceptions, which have no common class of their own, into ExportError.

    Traced networks print a traceback of any exception before they raise it: what was printed is dropped with it.
    """

    def __init__(self) -> None:
        self._printed = io.StringIO()
        self._caught = contextlib.redirect_stderr(self._printed)

    def __enter__(self) -> None:
        self._caught.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._caught.__exit__(None, None, None)
        if error is None and self._printed.getvalue():
            sys.stderr.write(self._printed.getvalue())
        if isinstance(error, Exception) and not isinstance(error, KlasZooError):
            raise ExportError(f"torch cannot run the network: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An exception's first line, or what is wrong where that is known."""
    cause = cause_of(str(error))
    return f"{cause}." if cause else first_line(error).partition(" If reserved but")[0]


def engine_kind(engine: Any) -> str:
    return type(engine).__name__


def _library() -> Any:
    return cuda.torch_library()

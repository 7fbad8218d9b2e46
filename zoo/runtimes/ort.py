"""onnxruntime, on any of its execution providers.

Defaults that differ from onnxruntime's own:

* TF32 is off on CUDA, where onnxruntime rounds fp32 products to 10 of 23 bits.
* Threads stop polling when a run is over (`session.force_spinning_stop`). onnxruntime's own default polls for about
  30 ms after every run, which keeps cores busy in a service and slows down every other session; docs/serving.md has
  the figures.
* A provider that does not start is an error; onnxruntime itself continues on the CPU.

Options: names with a dot are entries of the session's configuration (`session.disable_prepacking`), all others are the
provider's (`enable_cuda_graph`, `gpu_mem_limit`).
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import CannotRunHere, ExportError, KlasZooError, first_line
from klas_zoo.gpus import cause_of, why_unusable
from klas_zoo.hardware import physical_cores
from klas_zoo.runtimes import cuda
from klas_zoo.runtimes.base import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    Closing,
    Installable,
    canonical_options,
    engine_name,
    image_shape,
)

if TYPE_CHECKING:
    import numpy as np

TENSORRT_PROVIDER = "TensorrtExecutionProvider"
_DEFAULTS = {"session.force_spinning_stop": "1", "use_tf32": "0"}
_USUAL = {**_DEFAULTS, "enable_cuda_graph": "0"}
"""Values with which an option is no condition of a latency."""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a graph that is given by its content finds its weights; no condition of a latency."""
_ON_CUDA = (CUDA_PROVIDER, TENSORRT_PROVIDER)
_THREADED = (CPU_PROVIDER, "OpenVINOExecutionProvider", "DnnlExecutionProvider", "XnnpackExecutionProvider")
_INSTALL = {
    CUDA_PROVIDER: "pip install 'onnxruntime-gpu[cuda,cudnn]' brings the libraries it needs; the driver has to be "
    "there.",
    TENSORRT_PROVIDER: "it needs an NVIDIA driver and the libraries of the TensorRT that this onnxruntime was built "
    "for.",
}
_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class OnnxRuntime(Installable):
    """See `klas_zoo.runtimes.base.Runtime`."""

    name = "onnxruntime"
    formats: tuple[str, ...] = ("onnx",)
    # its processor kernels compute fp16 by casting to fp32, and bf16 not at all
    precisions: Mapping[str, tuple[str, ...]] = {
        CPU_PROVIDER: ("fp32", "int8"),
        CUDA_PROVIDER: ("fp32", "fp16", "bf16"),
        TENSORRT_PROVIDER: ("fp32", "fp16"),
    }
    providers: Mapping[str, str] = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}
    compiles = False

    def version(self) -> str:
        return str(_library().__version__)

    def open(
        self,
        engine: Path | bytes | Any,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> OnnxSession:
        library = _library()
        if provider not in library.get_available_providers():
            raise KlasZooError(
                f"onnxruntime {library.__version__} has no {provider} here, only "
                f"{', '.join(library.get_available_providers())}: install the onnxruntime package that has it."
            )
        return OnnxSession(engine, provider, threads or physical_cores(), {**(options or {}), **_polling(spinning)})


class OnnxSession(Closing):
    """An ONNX graph of one input and one output in onnxruntime; `raw` is its `InferenceSession`."""

    runtime = "onnxruntime"

    def __init__(self, engine: Path | bytes, provider: str, threads: int, options: Mapping[str, str]) -> None:
        self._engine, self._settings, self._name = engine, dict(options), engine_name(engine)
        self._intra_op_threads = threads
        self.runtime_version = str(_library().__version__)
        self.provider = provider
        self.threads = threads if provider in _THREADED else 0
        self.options = canonical_options({k: v for k, v in options.items() if k != WEIGHTS_FOLDER}, _USUAL)
        self.raw = _start(engine, provider, threads, options)
        self._input, self._output, self._type = self._interface()
        shape = tuple(one if isinstance(one, int) else None for one in self._input.shape)
        self.input_shape, self.smallest_batch, self.largest_batch = image_shape(self._name, shape)
        self._graphs: dict[int, _Bound] | None = {} if options.get("enable_cuda_graph") == "1" else None
        self._timed: dict[int, tuple[Callable[[], object], Any]] = {}
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        return self._run(images, None)

    def _run(self, images: np.ndarray, options: Any) -> np.ndarray:
        try:
            images = images.astype(self._type, copy=False)
            if self._graphs is None:
                found: np.ndarray = self.raw.run(None, {self._input.name: images}, options)[0]
            else:
                found = self._replay(images)
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            said = first_line(error)
            raise ExportError(
                f"onnxruntime cannot run {self._name} on {images.shape}: {cause_of(said) or said}"
            ) from error
        return found.astype("float32", copy=False)

    def device_times(self, images: np.ndarray, count: int) -> list[float]:
        """See `Session.device_times`: CUDA events around runs with bound input and output.

        The first call opens the engine once more, on a stream of torch's: events bracket nothing but what is on
        their stream.
        """
        if self.provider not in _ON_CUDA:
            return []
        if len(images) not in self._timed:
            stream = cuda.new_stream()
            options = {**self._settings, "user_compute_stream": str(stream.cuda_stream)}
            session = _start(self._engine, self.provider, self._intra_op_threads, options)
            bound = _Bound(session, images.astype(self._type, copy=False), graph=self._graphs is not None, wait=False)
            self._timed[len(images)] = (bound.run, stream)
        enqueue, stream = self._timed[len(images)]
        return cuda.event_times(enqueue, stream, count)

    def release_memory(self) -> None:
        """See `Session.release_memory`: the arena shrinks at the end of a run that asks for it."""
        if self.provider != CPU_PROVIDER or None in self.input_shape:
            return
        import numpy as np

        self._run(np.zeros((self.smallest_batch, *self.input_shape), np.float32), _shrinking())  # type: ignore[arg-type]

    def close(self) -> None:
        """See `Session.close`."""
        self.raw, self._graphs = None, None
        self._timed.clear()

    def _interface(self) -> tuple[Any, Any, str]:
        inputs, outputs = self.raw.get_inputs(), self.raw.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            named = ", ".join(one.name for one in (*inputs, *outputs))
            raise ExportError(
                f"{self._name} has {len(inputs)} inputs and {len(outputs)} outputs ({named}): an engine takes images "
                "and gives logits, one of each."
            )
        if inputs[0].type not in _TYPES:
            raise ExportError(
                f"{self._name} takes {inputs[0].type}: an engine takes normalised images as {', '.join(_TYPES)}."
            )
        return inputs[0], outputs[0], _TYPES[inputs[0].type]

    def _replay(self, images: np.ndarray) -> np.ndarray:
        """A run by CUDA graph, captured once for every batch size: copy in, replay, copy out."""
        with self._lock:
            assert self._graphs is not None
            if len(images) not in self._graphs:
                self._graphs[len(images)] = _Bound(self.raw, images, graph=True, wait=True)
            bound = self._graphs[len(images)]
            bound.images.update_inplace(images)
            bound.run()
            found: np.ndarray = bound.logits()
            return found


class OnnxGraph:
    """An ONNX graph of any inputs and outputs, such as a stage of a cascade. Safe to use from several threads.

    `threads` and `options` are as in `Session`, `raw` is its `InferenceSession`.

    Args:
        content: of an ONNX file.
        folder: of the weights that it reads.

    Raises:
        ExportError: onnxruntime cannot load it.
        KlasZooError: onnxruntime is not installed, or the provider does not start.
    """

    def __init__(
        self,
        content: bytes,
        folder: Path,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> None:
        given = {**(options or {}), **_polling(spinning)}
        self.threads = (threads or physical_cores()) if provider in _THREADED else 0
        self.options = canonical_options(given, _USUAL)
        given[WEIGHTS_FOLDER] = str(folder.absolute())
        self.raw = _start(content, provider, threads or physical_cores(), given)
        self._inputs = [(one.name, _TYPES.get(one.type)) for one in self.raw.get_inputs()]

    def run(self, inputs: list[np.ndarray], *, releasing: bool = False) -> list[np.ndarray]:
        """Inputs in the graph's order → outputs in the graph's order.

        Args:
            releasing: give up memory that large batches took, see `Session.release_memory`; on a CPU only.

        Raises:
            ExportError: onnxruntime failed.
        """
        try:
            given = {
                name: one if kind is None else one.astype(kind, copy=False)
                for (name, kind), one in zip(self._inputs, inputs, strict=True)
            }
            found: list[np.ndarray] = self.raw.run(None, given, _shrinking() if releasing else None)
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            raise ExportError(f"onnxruntime cannot run a stage of a cascade: {first_line(error)}") from error
        return found


class _Bound:
    """Input and output of a session in the GPU's memory, for one batch size.

    Args:
        wait: a run returns when the GPU has answered.
    """

    def __init__(self, session: Any, images: np.ndarray, *, graph: bool, wait: bool) -> None:
        import numpy as np

        library = _library()
        self._session, self._binding = session, session.io_binding()
        output = session.get_outputs()[0]
        self.images = library.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(images), "cuda", 0)
        self._binding.bind_ortvalue_input(session.get_inputs()[0].name, self.images)
        if graph:  # writes to the addresses it was captured with
            kind = np.dtype(_TYPES[output.type])
            logits = np.zeros((len(images), output.shape[-1]), kind)
            self._binding.bind_ortvalue_output(output.name, library.OrtValue.ortvalue_from_numpy(logits, "cuda", 0))
        else:
            self._binding.bind_output(output.name, "cuda", 0)
        self._options = library.RunOptions()
        if not wait:  # onnxruntime waits for its stream at the end of a run by default
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if graph:
            self._options.add_run_config_entry("gpu_graph_id", str(len(images)))

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def logits(self) -> np.ndarray:
        found: np.ndarray = self._binding.get_outputs()[0].numpy()
        return found


def _shrinking() -> Any:
    """Options of a run at whose end the arena of the processor's memory shrinks."""
    options = _library().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _start(engine: Path | bytes, provider: str, threads: int, options: Mapping[str, str]) -> Any:
    """An `InferenceSession` whose first provider is the one that was asked for."""
    library = _library()
    settings = library.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3  # errors; its warnings report where it put which node
    given = {**_DEFAULTS, **options}
    for key, value in given.items():
        if "." in key:
            settings.add_session_config_entry(key, value)
    providers = _providers(provider, {key: value for key, value in given.items() if "." not in key})
    if provider in _ON_CUDA:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
            # CUDA's libraries come from Python packages, where the system's loader does not look
            library.preload_dlls()
    try:
        session = library.InferenceSession(engine, settings, providers=providers, enable_fallback=False)
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise _explained(engine, provider, error) from error
    # a provider that does not start is replaced by the next one without an error
    if session.get_providers()[0] != provider:
        raise KlasZooError(_does_not_start(provider))
    return session


def _providers(provider: str, options: Mapping[str, str]) -> list[str | tuple[str, dict[str, str]]]:
    """The provider and those that take the nodes it has no kernels for."""
    tf32 = options.get("use_tf32", "0")
    own = {key: value for key, value in options.items() if key != "use_tf32"}
    if provider == CPU_PROVIDER:
        return [CPU_PROVIDER]
    if provider == CUDA_PROVIDER:
        return [(CUDA_PROVIDER, {**own, "use_tf32": tf32}), CPU_PROVIDER]
    if provider == TENSORRT_PROVIDER:
        return [(TENSORRT_PROVIDER, own), (CUDA_PROVIDER, {"use_tf32": tf32}), CPU_PROVIDER]
    return [(provider, own), CPU_PROVIDER]


def _explained(engine: Path | bytes, provider: str, error: Exception) -> KlasZooError:
    said, name = first_line(error), engine_name(engine)
    if missing := re.search(r"Provider type for (\w+) node", str(error)):
        return CannotRunHere(
            f"onnxruntime's {provider} has no kernel for {missing[1]} in the precision of {name}: use fp16 or fp32."
        )
    if newer := re.search(r"Opset (\d+) is under development|Unsupported model IR version: (\d+)", str(error)):
        kind = f"opset {newer[1]}" if newer[1] else f"IR version {newer[2]}"
        return CannotRunHere(
            f"onnxruntime {_library().__version__} does not read {name}, a graph of {kind}: install a newer "
            "onnxruntime, or export with --opset 18."
        )
    if "NOT_IMPLEMENTED" in said:
        return CannotRunHere(f"onnxruntime's {provider} cannot compute {name}: {said}")
    if provider != CPU_PROVIDER and not said.startswith("[ONNXRuntimeError]"):  # raised before the graph is read
        return KlasZooError(_does_not_start(provider))
    return ExportError(f"onnxruntime cannot load {name}: {said}")


def cuda_version() -> str | None:
    """The version that the installed onnxruntime was compiled for; None where it was for none."""
    try:
        from onnxruntime.capi import build_and_package_info as built
    except ImportError:
        return None
    return getattr(built, "cuda_version", None) or None


def _does_not_start(provider: str) -> str:
    known = why_unusable(cuda_version()) if provider in _ON_CUDA else None
    advice = f"{known}." if known else _INSTALL.get(provider, "its hardware, driver or libraries are missing.")
    return f"onnxruntime's {provider} does not start here: {advice}"


def _polling(spinning: bool | None) -> dict[str, str]:
    if spinning is None:
        return {}
    return {"session.force_spinning_stop": "0"} if spinning else {"session.intra_op.allow_spinning": "0"}


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise KlasZooError(
            "Running an ONNX engine needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu for an NVIDIA GPU."
        ) from error
    return onnxruntime

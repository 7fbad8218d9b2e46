"""OpenVINO, on Intel's and Arm's processors and Intel's GPUs and NPUs. Reads the same ONNX files as onnxruntime.

fp32 is computed in fp32: OpenVINO's own default rounds to bf16 or fp16 where the hardware is faster at them. A graph in
bf16 is computed in bf16, which is fast on processors with AVX512_BF16 or AMX, and elsewhere in fp32. Idle threads never
poll for work.

Options are properties by OpenVINO's names, such as `NUM_STREAMS`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import ExportError, KlasZooError, first_line
from klas_zoo.hardware import physical_cores
from klas_zoo.runtimes.base import Closing, Installable, canonical_options, engine_name, image_shape

if TYPE_CHECKING:
    import numpy as np

# one request at a time, on all threads, as soon as possible
_DEFAULTS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}


class OpenVino(Installable):
    """See `klas_zoo.runtimes.base.Runtime`."""

    name = "openvino"
    formats: tuple[str, ...] = ("onnx",)
    precisions: Mapping[str, tuple[str, ...]] = {
        "CPU": ("fp32", "int8", "bf16"),
        "GPU": ("fp32", "fp16", "int8"),
        "NPU": ("fp16", "int8"),
    }
    providers: Mapping[str, str] = {"cpu": "CPU"}
    compiles = False

    def version(self) -> str:
        # 2026.4.1-22982-e213a147257-releases/2026/4 → 2026.4.1
        return str(_library().__version__).split("-")[0]

    def open(
        self,
        engine: Path | bytes | Any,
        *,
        provider: str = "CPU",
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
    ) -> OpenVinoSession:
        core = _core()
        known = core.available_devices
        if provider.split(".")[0] not in {one.split(".")[0] for one in known}:
            raise KlasZooError(f"OpenVINO finds no device {provider} here, only {', '.join(known)}.")
        return OpenVinoSession(engine, provider, threads or physical_cores(), options or {}, self.version())


class OpenVinoSession(Closing):
    """An ONNX graph of one input and one output in OpenVINO; `raw` is its `CompiledModel`."""

    runtime = "openvino"

    def __init__(
        self, engine: Path | bytes, provider: str, threads: int, options: Mapping[str, str], version: str
    ) -> None:
        self._name = engine_name(engine)
        self.runtime_version, self.provider = version, provider
        self.threads = threads if provider == "CPU" else 0
        self.options = canonical_options(options, _DEFAULTS)
        properties = {**_DEFAULTS, **({"INFERENCE_NUM_THREADS": str(threads)} if self.threads else {}), **options}
        try:
            model = _core().read_model(engine)
            if "INFERENCE_PRECISION_HINT" not in options and _is_bf16(model):
                properties["INFERENCE_PRECISION_HINT"] = "bf16"
            self.raw = _core().compile_model(model, provider, properties)
        except Exception as error:  # it raises plain RuntimeErrors
            raise ExportError(f"OpenVINO cannot load {self._name}: {_reason(error)}") from error
        if len(self.raw.inputs) != 1 or len(self.raw.outputs) != 1:
            raise ExportError(
                f"{self._name} has {len(self.raw.inputs)} inputs and {len(self.raw.outputs)} outputs: an engine takes "
                "images and gives logits, one of each."
            )
        found = self.raw.input(0).partial_shape
        if found.rank.is_dynamic:
            raise ExportError(f"{self._name} takes an input of any rank; an engine takes images (B, C, H, W).")
        shape = tuple(one.get_length() if one.is_static else None for one in found)
        self.input_shape, self.smallest_batch, self.largest_batch = image_shape(self._name, shape)
        self._type = self.raw.input(0).element_type.to_dtype()
        self._own = threading.local()  # a request holds the tensors of one run

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `Session.run`."""
        import numpy as np

        try:
            request = getattr(self._own, "request", None)
            if request is None:
                request = self._own.request = self.raw.create_infer_request()
            request.infer([np.ascontiguousarray(images, dtype=self._type)], share_inputs=True)
            # a copy: the next run overwrites the request's output
            return np.array(request.get_output_tensor(0).data, dtype=np.float32)
        except Exception as error:  # as above
            raise ExportError(f"OpenVINO cannot run {self._name} on {images.shape}: {_reason(error)}") from error

    def close(self) -> None:
        """See `Session.close`."""
        self.raw, self._own = None, threading.local()


def _is_bf16(model: Any) -> bool:
    """Whether weights are in bf16: the precision that an engine was exported in."""
    bf16 = _library().Type.bf16
    return any(one.get_type_name() == "Constant" and one.get_element_type() == bf16 for one in model.get_ops())


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong; those before it name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check ", "FrontEnd API failed"))]
    return said[0] if said else first_line(error)


def _core() -> Any:
    global _the_core  # one for the process: it holds the plugins and their caches
    if _the_core is None:
        _the_core = _library().Core()
    return _the_core


_the_core: Any = None


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise KlasZooError("The runtime openvino is not installed: pip install 'klas-zoo[openvino]'.") from error
    return openvino

"""Running a TensorRT engine on this machine's GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from klas_zoo.errors import ExportError, KlasZooError
from klas_zoo.exporters.gpu_targets import present_capability
from klas_zoo.exporters.plans import checked, read_record
from klas_zoo.exporters.trt_library import find_library
from klas_zoo.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor


class PlanSession:
    """An engine in the GPU's memory.

    Args:
        engine: the file `build_plan` wrote.
        graph: the ONNX file it was built from; needed where the engine's weights were stripped.

    Raises:
        CannotRunHere: the engine does not fit the library or the GPU; says which.
        ExportError: it is damaged, or does not load.
    """

    def __init__(self, engine: Path, *, graph: Path | None = None) -> None:
        library = None
        runtime = read_record(engine).runtime
        with contextlib.suppress(KlasZooError):  # it is not installed, which `checked` explains
            library = find_library(runtime)
        installed = library.version if library else None
        self.record = checked(engine, installed=installed, present=present_capability())
        assert library is not None
        trt = library.module
        self._engine = trt.Runtime(library.log).deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise ExportError(f"{self.record.runtime} cannot load {engine} ({library.complaint()}).")
        if self.record.weights == "stripped":
            refitter = trt.Refitter(self._engine, library.log)
            parser = trt.OnnxParserRefitter(refitter, library.log)
            same = graph is not None and graph.is_file() and sha256_of(graph) == self.record.graph_sha256
            if not same or not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
                raise ExportError(f"{engine} has no weights of its own, and {graph} does not fill them in.")
        self._context = self._engine.create_execution_context()

    def run(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes), on the GPU; B within one of the engine's profiles.

        Raises:
            ExportError: no profile takes that batch, or the GPU did not run it.
        """
        import torch

        batch = len(images)
        fitting = [n for n, p in enumerate(self.record.profiles) if p.smallest <= batch <= p.largest]
        if not fitting:
            known = ", ".join(map(str, self.record.profiles))
            raise ExportError(f"The engine takes batches of {known}, not of {batch}.")
        stream = torch.cuda.current_stream()
        self._context.set_optimization_profile_async(fitting[0], stream.cuda_stream)
        source, target = self._engine.get_tensor_name(0), self._engine.get_tensor_name(1)
        images = images.to("cuda").contiguous()
        logits = torch.empty(batch, self.record.classes, device="cuda", dtype=torch.float32)
        self._context.set_input_shape(source, tuple(images.shape))
        self._context.set_tensor_address(source, images.data_ptr())
        self._context.set_tensor_address(target, logits.data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExportError(f"The engine did not run a batch of {batch}.")
        stream.synchronize()
        return logits

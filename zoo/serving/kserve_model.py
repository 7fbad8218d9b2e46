"""For KServe: a family as one model.

    python -m klas_zoo.serving.kserve_model --package DIR --model_name deit

and every option of KServe's own server, such as `--http_port`. KServe listens on all of the
machine's addresses, as a container's server does.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import kserve
from kserve.errors import InvalidInput, ServerNotReady
from kserve.model_server import parser
from kserve.protocol.dataplane import DataPlane

from klas_zoo.errors import KlasZooError, Overloaded
from klas_zoo.serving.metrics import PrometheusMetrics
from klas_zoo.serving.request_handler import INPUT, OUTPUT, ROUTE, RequestHandler, is_clients_fault, names_of
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor


class ElasticModel(kserve.Model):  # type: ignore[misc]
    """Answers Open Inference Protocol requests, whose parameters may hold `latency_ms` or `route`.

    Args:
        name: of the model, in URLs.
        package: a family package of ONNX graphs.
    """

    def __init__(self, name: str, package: Path | str, settings: ServingSettings | None = None) -> None:
        super().__init__(name)
        self._package, self._settings = package, settings
        self._handler: RequestHandler | None = None

    def load(self) -> bool:
        self._handler = RequestHandler(self._package, self._settings, metrics=PrometheusMetrics(self.name))
        self.ready = True
        return True

    def stop(self) -> None:
        super().stop()
        if self._handler is not None:
            self._handler.close()

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self._loaded.input_shape]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        logits = {"name": OUTPUT, "datatype": "FP32", "shape": [-1, self._loaded.classes]}
        return [logits, {"name": ROUTE, "datatype": "BYTES", "shape": [-1, 1]}]

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        """
        Raises:
            InvalidInput: the request is malformed, or nothing fits its budget; says why.
            ServerNotReady: too many requests wait.
        """
        arrived_s = time.monotonic()
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidInput("Only the Open Inference Protocol (v2) is spoken here.")
        try:
            tensors = [
                Tensor(
                    name=one.name, datatype=one.datatype, shape=one.shape,
                    data=one.data if one._raw_data is None else one._raw_data,
                )
                for one in payload.inputs
            ]  # fmt: skip
            future = self._loaded.submit(tensors, _plain(payload.parameters), arrived_s=arrived_s)
            answer = await asyncio.wrap_future(future)
        except KlasZooError as error:
            raise _refusal(error) from error
        binary = payload.use_binary_outputs or payload.from_grpc
        count = len(answer.logits)
        outputs = [
            kserve.InferOutput(name=OUTPUT, shape=list(answer.logits.shape), datatype="FP32"),
            kserve.InferOutput(name=ROUTE, shape=[count, 1], datatype="BYTES"),
        ]
        for output, tensor in zip(outputs, (answer.logits, names_of(answer.route, count)), strict=True):
            output.set_data_from_numpy(tensor, binary_data=binary)
        return kserve.InferResponse(
            response_id=payload.id or "", model_name=self.name, infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs, requested_outputs=payload.request_outputs,
        )  # fmt: skip

    @property
    def _loaded(self) -> RequestHandler:
        if self._handler is None:
            raise _unavailable(f"{self.name} is not loaded.")
        return self._handler


class StrictDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's, which answers bodies it cannot decode with 500: what fails while a body is decoded is the client's."""

    def decode(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().decode(*arguments, **options)
        except (InvalidInput, MemoryError):
            raise
        except Exception as error:
            raise InvalidInput(f"The request cannot be decoded ({type(error).__name__}).") from error


def _refusal(error: KlasZooError) -> Exception:
    """KServe's own error for it: 400, 503, or for a failed engine 500."""
    if is_clients_fault(error):
        return InvalidInput(str(error))
    if isinstance(error, Overloaded):
        return _unavailable(str(error))
    return error


def _unavailable(text: str) -> ServerNotReady:
    found = ServerNotReady(text)
    found.reason = text  # KServe's gRPC server asks for it
    return found


def _plain(parameters: Any) -> dict[str, object]:
    """Values as they are in JSON; in gRPC each says which kind it is."""
    found: dict[str, object] = {}
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidInput("The parameters of a request are an object.")
    for name, value in (parameters or {}).items():
        kind = value.WhichOneof("parameter_choice") if hasattr(value, "WhichOneof") else None
        found[name] = getattr(value, kind) if kind else value
    return found


def main() -> None:
    own = argparse.ArgumentParser(parents=[parser], description=__doc__, conflict_handler="resolve")
    own.add_argument("--package", required=True, help="Folder of a family package of ONNX graphs.")
    own.add_argument("--threads", help="Of onnxruntime. Default: one for each physical core of the container's quota.")
    own.add_argument("--largest_batch", help="Images of one request, and of requests that are merged. Default: 32.")
    own.add_argument("--queue_images", help="Images that may wait. Default: 256.")
    own.add_argument("--target_ms", help="Budget of requests that name none. Default: no budget.")
    own.add_argument("--calibrate", help="Measure unknown latencies while idle: true or false. Default: true.")
    given, _ = own.parse_known_args()
    named = {one.name: getattr(given, one.name) for one in fields(ServingSettings)}
    try:
        settings = ServingSettings.read({name: value for name, value in named.items() if value is not None})
        model = ElasticModel(given.model_name, given.package, settings)
        model.load()
    except KlasZooError as error:
        own.exit(error.exit_code, f"{error}\n")
    server = kserve.ModelServer(http_port=given.http_port, grpc_port=given.grpc_port)
    server.dataplane = StrictDataPlane(model_registry=server.registered_models)
    server.start([model])


if __name__ == "__main__":
    main()

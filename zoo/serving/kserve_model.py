"""For KServe: a family as one model.

    python -m klas_zoo.serving.kserve_model --package DIR --model_name deit

and every option of KServe's own server, such as `--http_port`. KServe listens on all of the
machine's addresses, as a container's server does.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import kserve
from kserve.errors import InvalidInput
from kserve.model_server import parser

from klas_zoo.errors import KlasZooError
from klas_zoo.serving.answering import INPUT, OUTPUT, ROUTE, Answering, names_of


class ElasticModel(kserve.Model):  # type: ignore[misc]
    """Answers Open Inference Protocol requests, whose parameters may hold `latency_ms` or `route`.

    Args:
        name: of the model, in URLs.
        package: a family package of ONNX graphs.
        threads: of onnxruntime; None: one for each physical core.
    """

    def __init__(self, name: str, package: Path | str, *, threads: int | None = None) -> None:
        super().__init__(name)
        self._package, self._threads = package, threads
        self._answering: Answering | None = None

    def load(self) -> bool:
        self._answering = Answering(self._package, threads=self._threads)
        self.ready = True
        return True

    def get_input_types(self) -> list[dict[str, Any]]:
        assert self._answering is not None
        return [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self._answering.input_shape]}]

    def get_output_types(self) -> list[dict[str, Any]]:
        assert self._answering is not None
        logits = {"name": OUTPUT, "datatype": "FP32", "shape": [-1, self._answering.classes]}
        return [logits, {"name": ROUTE, "datatype": "BYTES", "shape": [-1, 1]}]

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        """
        Raises:
            InvalidInput: the request cannot be answered; says why.
        """
        if not isinstance(payload, kserve.InferRequest):
            raise InvalidInput("Only the Open Inference Protocol (v2) is spoken here.")
        found = next((one for one in payload.inputs if one.name == INPUT), None)
        if found is None:
            raise InvalidInput(f"The request has no input called {INPUT}.")
        try:
            # onnxruntime lets the others run meanwhile
            logits, route = await asyncio.to_thread(self._answer, found.as_numpy(), _plain(payload.parameters))
        except KlasZooError as error:
            raise InvalidInput(str(error)) from error
        outputs = [
            kserve.InferOutput(name=OUTPUT, shape=list(logits.shape), datatype="FP32"),
            kserve.InferOutput(name=ROUTE, shape=[len(logits), 1], datatype="BYTES"),
        ]
        for output, tensor in zip(outputs, (logits, names_of(route, len(logits))), strict=True):
            output.set_data_from_numpy(tensor, binary_data=payload.use_binary_outputs or payload.from_grpc)
        return kserve.InferResponse(
            response_id=payload.id or "", model_name=self.name, infer_outputs=outputs,
            use_binary_outputs=payload.use_binary_outputs, requested_outputs=payload.request_outputs,
        )  # fmt: skip

    def _answer(self, images: Any, parameters: dict[str, object]) -> tuple[Any, str]:
        assert self._answering is not None
        route = self._answering.route_for(parameters, len(images))
        return self._answering.answer(images, route), route


def _plain(parameters: Any) -> dict[str, object]:
    """Values as they are in JSON; in gRPC each says which kind it is."""
    found: dict[str, object] = {}
    for name, value in (parameters or {}).items():
        kind = value.WhichOneof("parameter_choice") if hasattr(value, "WhichOneof") else None
        found[name] = getattr(value, kind) if kind else value
    return found


def main() -> None:
    own = argparse.ArgumentParser(parents=[parser], description=__doc__, conflict_handler="resolve")
    own.add_argument("--package", required=True, help="Folder of a family package of ONNX graphs.")
    own.add_argument("--threads", type=int, help="Of onnxruntime. Default: one for each physical core.")
    given, _ = own.parse_known_args()
    model = ElasticModel(given.model_name, given.package, threads=given.threads)
    model.load()
    kserve.ModelServer(http_port=given.http_port, grpc_port=given.grpc_port).start([model])


if __name__ == "__main__":
    main()

"""For MLServer: a family as one model. Its model-settings.json:

{"name": "deit", "implementation": "klas_zoo.serving.mlserver_runtime.ElasticRuntime",
 "parameters": {"uri": "DIR", "extra": {"threads": 4, "target_ms": 20}}}

`extra` holds fields of `klas_zoo.serving.settings.ServingSettings`.
"""

from __future__ import annotations

import asyncio
import time

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, MetadataTensor
from mlserver.utils import get_model_uri

from klas_zoo.errors import KlasZooError, Overloaded
from klas_zoo.serving.metrics import PrometheusMetrics
from klas_zoo.serving.request_handler import INPUT, OUTPUT, ROUTE, RequestHandler, is_clients_fault
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor, read_outputs


class ElasticRuntime(MLModel):  # type: ignore[misc]
    """Answers Open Inference Protocol requests, whose parameters may hold `latency_ms` or `route`."""

    async def load(self) -> bool:
        package = await get_model_uri(self._settings)
        extra = (self._settings.parameters.extra if self._settings.parameters else None) or {}
        # files are hashed and graphs opened meanwhile; the server goes on answering for its other models
        self._handler = await asyncio.to_thread(
            RequestHandler, package, ServingSettings.read(extra), metrics=PrometheusMetrics(self.name)
        )
        return True

    async def unload(self) -> bool:
        await asyncio.to_thread(self._handler.close)
        return True

    async def metadata(self) -> MetadataModelResponse:
        shape = [-1, *self._handler.input_shape]
        return MetadataModelResponse(
            name=self.name,
            platform="klas_zoo",
            versions=[self.version] if self.version else [],
            inputs=[MetadataTensor(name=INPUT, datatype="FP32", shape=shape)],
            outputs=[
                MetadataTensor(name=OUTPUT, datatype="FP32", shape=[-1, self._handler.classes]),
                MetadataTensor(name=ROUTE, datatype="BYTES", shape=[-1, 1]),
            ],
        )

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """
        Raises:
            MLServerError: the request cannot be answered; says why.
        """
        arrived_s = time.monotonic()
        tensors = [
            Tensor(
                name=one.name, datatype=getattr(one.datatype, "value", one.datatype), shape=one.shape,
                data=getattr(one.data, "root", one.data),
            )
            for one in payload.inputs
        ]  # fmt: skip
        parameters = payload.parameters.model_dump() if payload.parameters else {}
        try:
            wanted = read_outputs([one.name for one in payload.outputs or []])
            answer = await asyncio.wrap_future(self._handler.submit(tensors, parameters, arrived_s=arrived_s))
        except KlasZooError as error:
            raise _refusal(error) from error
        outputs = {
            OUTPUT: lambda: NumpyCodec.encode_output(OUTPUT, answer.logits),
            ROUTE: lambda: StringCodec.encode_output(ROUTE, [answer.route] * len(answer.logits)),
        }
        return InferenceResponse(
            id=payload.id, model_name=self.name, model_version=self.version, outputs=[outputs[one]() for one in wanted]
        )


def _refusal(error: KlasZooError) -> MLServerError:
    if is_clients_fault(error):
        return MLServerError(str(error))
    return MLServerError(str(error), status_code=503 if isinstance(error, Overloaded) else 500)

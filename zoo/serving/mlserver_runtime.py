"""For MLServer: a family as one model. Its model-settings.json:

{"name": "deit", "implementation": "klas_zoo.serving.mlserver_runtime.ElasticRuntime",
 "parameters": {"uri": "DIR", "extra": {"threads": 4}}}
"""

from __future__ import annotations

import asyncio
from typing import Any

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import MLServerError
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri

from klas_zoo.errors import KlasZooError
from klas_zoo.serving.answering import INPUT, OUTPUT, ROUTE, Answering


class ElasticRuntime(MLModel):  # type: ignore[misc]
    """Answers Open Inference Protocol requests, whose parameters may hold `latency_ms` or `route`."""

    async def load(self) -> bool:
        package = await get_model_uri(self._settings)
        extra = (self._settings.parameters.extra if self._settings.parameters else None) or {}
        self._answering = Answering(package, threads=extra.get("threads"))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """
        Raises:
            MLServerError: the request cannot be answered; says why.
        """
        found = next((one for one in payload.inputs if one.name == INPUT), None)
        if found is None:
            raise MLServerError(f"The request has no input called {INPUT}.")
        parameters = payload.parameters.model_dump() if payload.parameters else {}
        try:
            # onnxruntime lets the others run meanwhile
            logits, route = await asyncio.to_thread(self._answer, NumpyCodec.decode_input(found), parameters)
        except KlasZooError as error:
            raise MLServerError(str(error)) from error
        return InferenceResponse(
            id=payload.id,
            model_name=self.name,
            model_version=self.version,
            outputs=[
                NumpyCodec.encode_output(OUTPUT, logits),
                StringCodec.encode_output(ROUTE, [route] * len(logits)),
            ],
        )

    def _answer(self, images: Any, parameters: dict[str, object]) -> tuple[Any, str]:
        route = self._answering.route_for(parameters, len(images))
        return self._answering.answer(images, route), route

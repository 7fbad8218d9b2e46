"""For Triton's python backend: all routes of a family as one model. Only Triton's own process can import this.

Requests do not wait in Triton's queue, which does not tell how long they did: `execute` hands each to the family's own
queue at once, and its answer is sent when it is there (a response sender, which Triton 24.08 and later have for models
that are not decoupled).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as triton

from klas_zoo.errors import KlasZooError, Overloaded
from klas_zoo.serving.batching import Answer
from klas_zoo.serving.metrics import METRICS
from klas_zoo.serving.request_handler import OUTPUT, ROUTE, RequestHandler, is_clients_fault, names_of
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor

_ABOUT = "family"  # of the configuration's parameters, the one that is no setting


class TritonPythonModel:
    """`klas-zoo export --format triton` writes the model.py that names this class, and its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"], "family")
        given = {key: value["string_value"] for key, value in config["parameters"].items() if key != _ABOUT}
        settings = ServingSettings.read({"largest_batch": config["max_batch_size"], **given})
        self._handler = RequestHandler(folder, settings, metrics=TritonMetrics(config["name"]))

    def execute(self, requests: list[Any]) -> None:
        """Queues what Triton received; every request is answered by its own response sender."""
        arrived_s = time.monotonic()
        for request in requests:
            sender = request.get_response_sender()
            try:
                future = self._handler.submit(_tensors(request), _parameters(request), arrived_s=arrived_s)
            except Exception as error:  # no request may take those with it that came together
                _send(sender, _refusal(error))
                continue
            future.add_done_callback(partial(_reply, sender))

    def finalize(self) -> None:
        self._handler.close()


class TritonMetrics:
    """Custom metrics of Triton's own endpoint; see `klas_zoo.serving.metrics.Metrics`."""

    def __init__(self, model: str) -> None:
        kind = triton.MetricFamily
        kinds = {"counter": kind.COUNTER, "gauge": kind.GAUGE, "histogram": kind.HISTOGRAM}
        self._model = model
        self._families = {
            name: kind(name=name, description=one.help, kind=kinds[one.kind]) for name, one in METRICS.items()
        }
        self._metrics: dict[tuple[str, ...], Any] = {}

    def add(self, name: str, count: int = 1, /, **labels: str) -> None:
        self._metric(name, labels).increment(count)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metric(name, labels).observe(value)

    def _metric(self, name: str, labels: Mapping[str, str]) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            buckets = {"buckets": list(METRICS[name].buckets)} if METRICS[name].buckets else {}
            self._metrics[key] = self._families[name].Metric(labels={"model": self._model, **labels}, **buckets)
        return self._metrics[key]


def _tensors(request: Any) -> list[Tensor]:
    found = []
    for one in request.inputs():
        array = one.as_numpy()
        datatype = "FP32" if str(array.dtype) == "float32" else str(array.dtype)
        found.append(Tensor(name=one.name(), datatype=datatype, shape=array.shape, data=array))
    return found


def _parameters(request: Any) -> dict[str, object]:
    found = json.loads(request.parameters() or "{}")
    return found if isinstance(found, dict) else {}


def _reply(sender: Any, done: Future[Answer]) -> None:
    _send(sender, _response(done))


def _response(done: Future[Answer]) -> Any:
    error = done.exception()
    if error is not None:
        return _refusal(error)
    answer = done.result()
    names = names_of(answer.route, len(answer.logits))
    return triton.InferenceResponse([triton.Tensor(OUTPUT, answer.logits), triton.Tensor(ROUTE, names)])


def _refusal(error: BaseException) -> Any:
    code = triton.TritonError.INTERNAL
    if isinstance(error, KlasZooError) and is_clients_fault(error):
        code = triton.TritonError.INVALID_ARG
    elif isinstance(error, Overloaded):
        code = triton.TritonError.UNAVAILABLE
    text = str(error).encode("utf-8", "backslashreplace").decode()
    return triton.InferenceResponse(error=triton.TritonError(text, code))


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

"""What a server counts, and where the counts go: Prometheus' own client, or Triton's metrics.

All names begin with `klas_zoo_`, all have the label `model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A family of metrics.

    Attributes:
        labels: besides `model`.
        buckets: of a histogram, their upper bounds.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "klas_zoo_answers_total": Metric(kind="counter", help="Requests that were answered.", labels=("route",)),
    "klas_zoo_refusals_total": Metric(
        kind="counter",
        help="Requests that were not: malformed, nothing fits, overload, late, failed.",
        labels=("reason",),
    ),
    "klas_zoo_late_answers_total": Metric(
        kind="counter", help="Answers after the request's deadline.", labels=("route",)
    ),
    "klas_zoo_request_seconds": Metric(
        kind="histogram", help="From a request's arrival to its answer.", labels=("route",), buckets=_SECONDS
    ),
    "klas_zoo_queue_seconds": Metric(kind="histogram", help="From a request's arrival to its start.", buckets=_SECONDS),
    "klas_zoo_batch_images": Metric(
        kind="histogram", help="Images that were computed together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
    ),
    "klas_zoo_queue_images": Metric(kind="gauge", help="Images that wait."),
    "klas_zoo_cascade_images_total": Metric(
        kind="counter", help="Images that a stage of a cascade answered, from 1.", labels=("route", "stage")
    ),
    "klas_zoo_cascade_stage_seconds": Metric(
        kind="histogram", help="That a stage of a cascade computed, for a batch.", labels=("route", "stage"),
        buckets=_SECONDS,
    ),
    "klas_zoo_cascade_escalated": Metric(
        kind="gauge", help="Of the last thousand images, the share that went on behind a stage.",
        labels=("route", "stage"),
    ),
    "klas_zoo_cascade_drift": Metric(
        kind="gauge", help="1 where that share is not compatible with the images that thresholds were fitted on.",
        labels=("route", "stage"),
    ),
    "klas_zoo_slowdown": Metric(kind="gauge", help="Latencies now, in units of those that were measured."),
}


class Metrics(Protocol):
    """Where counts go. Safe to use from many threads."""

    def add(self, name: str, count: int = 1, /, **labels: str) -> None:
        """So many more of a counter."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """The value of a gauge."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """A value of a histogram."""


class NoMetrics:
    """Counts nothing."""

    def add(self, name: str, count: int = 1, /, **labels: str) -> None:
        """See `Metrics.add`."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """See `Metrics.set`."""

    def observe(self, name: str, value: float, **labels: str) -> None:
        """See `Metrics.observe`."""


class PrometheusMetrics:
    """In the default registry of prometheus_client, which KServe and MLServer publish."""

    _families: dict[str, Any] | None = None  # a name can be registered once in a process

    def __init__(self, model: str) -> None:
        self._model = model
        if PrometheusMetrics._families is None:
            PrometheusMetrics._families = {name: _registered(name, metric) for name, metric in METRICS.items()}
        self._of = PrometheusMetrics._families

    def add(self, name: str, count: int = 1, /, **labels: str) -> None:
        """See `Metrics.add`."""
        self._of[name].labels(model=self._model, **labels).inc(count)

    def set(self, name: str, value: float, **labels: str) -> None:
        """See `Metrics.set`."""
        self._of[name].labels(model=self._model, **labels).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """See `Metrics.observe`."""
        self._of[name].labels(model=self._model, **labels).observe(value)


def _registered(name: str, metric: Metric) -> Any:
    import prometheus_client

    labels = ("model", *metric.labels)
    if metric.kind == "counter":
        return prometheus_client.Counter(name, metric.help, labels)
    if metric.kind == "gauge":
        return prometheus_client.Gauge(name, metric.help, labels, multiprocess_mode="livesum")
    return prometheus_client.Histogram(name, metric.help, labels, buckets=metric.buckets)

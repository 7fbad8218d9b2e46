"""What every server does with one request: images and parameters in, logits and a route's name out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from klas_zoo.errors import BadQuantity, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.runtime import ElasticSession
from klas_zoo.units import parse_latency_ms

INPUT, OUTPUT, ROUTE = "images", "logits", "route"
CALIBRATED = (1, 8)  # batch sizes whose latencies are measured at the start where nobody knows them


class Answering:
    """A package that answers requests. Safe to use from many threads.

    Args:
        package: its folder, or what `Package.open` gave.
        threads: of onnxruntime; None: one for each physical core.
        batches: batch sizes to know the latency of every route at.

    Raises:
        PackageError: the package is damaged, or has no graphs.
        ExportError: onnxruntime cannot load a graph.
    """

    def __init__(
        self, package: Package | Path | str, *, threads: int | None = None, batches: tuple[int, ...] = CALIBRATED
    ) -> None:
        self.session = ElasticSession(package, threads=threads)
        self._batches = tuple(sorted(batches))
        for batch in self._batches:
            try:
                self.session.latencies(batch=batch)
            except UsageError:  # unknown on this machine
                self.session.calibrate(batch=batch, runs=10)

    @property
    def family(self) -> str:
        return self.session.package.manifest.family.name

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.session.package.manifest.family.input_shape

    @property
    def classes(self) -> int:
        return self.session.package.manifest.family.num_classes

    def route_for(self, parameters: Mapping[str, object], batch: int) -> str:
        """The route that answers a request of `batch` images.

        Raises:
            UsageError: both `latency_ms` and `route` were said.
            UnknownName: there is no such route.
            BadQuantity: `latency_ms` is no time above zero.
            NothingFits: no route is within the budget.
        """
        latency, route = parameters.get("latency_ms"), parameters.get("route")
        if latency is not None and route is not None:
            raise UsageError("Say latency_ms or route, not both.")
        if route is not None:
            return self.session.package.route(str(route)).name
        if latency is None:
            return self.session.best(math.inf, batch=self._batches[0])
        # a batch whose latency nobody measured takes at most its share of a smaller one's
        known = max((size for size in self._batches if size <= batch), default=self._batches[0])
        return self.session.best(_milliseconds(latency) * min(1.0, known / batch), batch=known)

    def answer(self, images: np.ndarray, route: str) -> np.ndarray:
        """Images (B, C, H, W) → logits (B, classes).

        Raises:
            UsageError: the images have another shape.
        """
        return self.session.run(images, route=route)


def names_of(route: str, batch: int) -> np.ndarray:
    """A route's name for every image, (B, 1) of bytes, as servers send text."""
    return np.full((batch, 1), route.encode(), dtype=object)


def _milliseconds(value: object) -> float:
    """From a number, or from text such as `5` or `800us`."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return parse_latency_ms(str(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise BadQuantity(f"latency_ms is a time above zero in milliseconds, not {value!r}.")
    return float(value)

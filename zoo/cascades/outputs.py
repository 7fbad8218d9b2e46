"""Logits of static routes on labelled images: all that is needed to evaluate any cascade of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from klas_zoo.errors import DataError, UsageError
from klas_zoo.routes import Route


@dataclass(frozen=True, kw_only=True)
class RouteOutputs:
    """What routes answer to the same images.

    Attributes:
        labels: (N,) classes of the images.
        logits: by route, (N, classes) float32.

    Raises:
        UsageError: routes with different numbers of classes.
        DataError: no images, or logits of other images.
    """

    labels: np.ndarray
    logits: Mapping[Route, np.ndarray]

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise DataError("There are no images to evaluate cascades on.")
        counts: dict[int, Route] = {}
        for route, logits in self.logits.items():
            if logits.ndim != 2 or len(logits) != len(self.labels):
                raise DataError(f"{route} has logits {logits.shape} for {len(self.labels)} labelled images.")
            counts.setdefault(logits.shape[1], route)
        check_exits({str(route): {"classes": classes} for classes, route in counts.items()})

    def __len__(self) -> int:
        return len(self.labels)

    def top1(self, route: Route) -> float:
        """Accuracy of a static route, per cent."""
        return 100 * float((self.logits[route].argmax(1) == self.labels).mean())

    def some(self, numbers: np.ndarray) -> RouteOutputs:
        """Those of some of the images."""
        return RouteOutputs(labels=self.labels[numbers], logits={r: one[numbers] for r, one in self.logits.items()})


def check_exits(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses networks that cannot be stages of one cascade.

    Args:
        facts: by the network's name, what has to be equal: `classes`, and each value of its preprocessing.

    Raises:
        UsageError: they differ; the message names two of them, and in what.
    """
    names = list(facts)
    for name in names[1:]:
        first, other = facts[names[0]], facts[name]
        for key in dict.fromkeys((*first, *other)):
            if first.get(key) != other.get(key):
                raise UsageError(
                    f"{names[0]} and {name} cannot be stages of one cascade: {key} is {first.get(key)} and "
                    f"{other.get(key)}. All stages take the same images and know the same classes."
                )

"""Top-1 of all routes in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from klas_zoo.data.loading import Batch
from klas_zoo.errors import DataError
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet


@torch.inference_mode()
def evaluate(
    supernet: Supernet,
    routes: Sequence[Route],
    batches: Iterable[Batch],
    *,
    team: Team = ALONE,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[Route, float]:
    """Top-1 in per cent of every route; every prefix that routes share is computed once per batch.

    Args:
        team: every process comes with other batches; all get the result over all of them.

    Raises:
        DataError: there are no images.
    """
    supernet.eval()
    hits = dict.fromkeys(routes, 0)
    count = 0
    for images, labels in batches:
        for route, logits in supernet.forward_all(images, list(hits)):
            hits[route] += int((logits.argmax(1) == labels).sum())
        count += len(labels)
        on_batch(len(labels))
    *found, total = team.all_reduce(torch.tensor([*hits.values(), count])).tolist()
    if total == 0:
        raise DataError("There are no images to evaluate on.")
    return {route: 100 * right / total for route, right in zip(hits, found, strict=True)}

"""What stitches answer right after their closed-form T, without any tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route, Seam
from klas_zoo.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class AnchorOutputs:
    """Of every stitch: top-1 in per cent, and mean KL(target's output ‖ stitch's output) in nats."""

    accuracy: dict[Seam, float]
    output_kl: dict[Seam, float]


def fit_stitches(
    chains: dict[str, Chain],
    seams: Iterable[Seam],
    batches: Iterable[Batch],
    *,
    ridge: float = 1e-4,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[Supernet, dict[Seam, float]]:
    """A supernet of all these stitches with T by ridge least squares, as a build initialises it.

    Returns:
        The supernet, and of each seam the share of the target features' variance that T leaves, 0..1.

    Raises:
        SelectionError: see `initialise_stitches`.
    """
    routes = [Route.stitch(s.source, s.i, s.target, s.j, chains[s.target].depth) for s in seams]
    with torch.random.fork_rng(devices=[]):
        # new layers draw weights that are overwritten: later draws must not change
        supernet = Supernet(chains, routes)
    supernet.stitches.to(next(next(iter(chains.values())).parameters()).device)
    return supernet, initialise_stitches(supernet, batches, ridge=ridge, on_batch=on_batch)


@torch.inference_mode()
def measure_answers(
    supernet: Supernet, heldout: Iterable[Batch], *, on_batch: Callable[[int], None] = lambda images: None
) -> AnchorOutputs:
    """Executes every stitch of a supernet; prefixes that stitches share are computed once per batch.

    Raises:
        SelectionError: no images, or answers that are not finite; names the stitch.
    """
    routes = [route for route in supernet.routes if not route.is_anchor]
    targets = {route.segments[-1].anchor for route in routes}
    hits, divergence = dict.fromkeys(routes, 0), dict.fromkeys(routes, 0.0)
    count = 0
    with evaluating(supernet):
        for images, labels in heldout:
            wanted = {name: log_softmax(supernet.chain(name)(images).double(), -1) for name in targets}
            for route, logits in supernet.forward_all(images, routes):
                if not torch.isfinite(logits).all():
                    raise SelectionError(f"The stitch {route} gives answers that are not finite.")
                log, target = log_softmax(logits.double(), -1), wanted[route.segments[-1].anchor]
                hits[route] += int((log.argmax(1) == labels).sum())
                divergence[route] += float((target.exp() * (target - log)).sum())
            count += len(labels)
            on_batch(len(labels))
    if count == 0:
        raise SelectionError("There are no held-out images to execute stitches on.")
    return AnchorOutputs(
        accuracy={route.seams[0]: 100 * found / count for route, found in hits.items()},
        output_kl={route.seams[0]: total / count for route, total in divergence.items()},
    )

"""Stitching layers initialised in closed form: ridge least squares on frozen activations.

For a seam (i, j) the layer T maps the source's features after block i to the target's after
block j (j = 0: the target's stem output; SN-Net's own code fits another feature there):

    T = argmin Σ ‖T x + b − y‖² + λ ‖T‖²,   over all tokens of all images.

Only moments are kept, Σx, Σy, Σxxᵀ and Σyxᵀ, summed batch by batch, so that memory does not
grow with the number of images. Seams after the same block share Σxxᵀ. Features are taken less
their mean in the first batch: a channel far from zero would drown its variance in rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klas_zoo.chains import evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Seam
from klas_zoo.supernet import Supernet

Position = tuple[str, int]


@dataclass
class _Moments:
    """Sums in float64 over rows of features less `shifts`; rows are tokens or pixels of images."""

    rows: dict[Position, int] = field(default_factory=dict)
    shifts: dict[Position, Tensor] = field(default_factory=dict)
    sums: dict[Position, Tensor] = field(default_factory=dict)
    squares: dict[Position, Tensor] = field(default_factory=dict)
    products: dict[Seam, Tensor] = field(default_factory=dict)


@torch.inference_mode()
def initialise_stitches(
    supernet: Supernet,
    batches: Iterable[Batch],
    *,
    ridge: float = 1e-4,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[Seam, float]:
    """Sets every stitching layer to its least-squares value.

    Args:
        ridge: λ as a share of the mean eigenvalue of the source features' covariance.

    Returns:
        For every seam the share of the target features' variance that is left unexplained, 0..1.

    Raises:
        SelectionError: activations of an anchor are not finite, and the message names the block;
            or there are no images.
    """
    moments = _Moments()
    for images, _ in batches:
        _accumulate(supernet, moments, images)
        on_batch(len(images))
    if supernet.seams and not moments.rows:
        raise SelectionError("There are no images to fit the stitching layers to.")
    return {seam: _solve(supernet, moments, seam, ridge) for seam in supernet.seams}


def _accumulate(supernet: Supernet, moments: _Moments, images: Tensor) -> None:
    sources = {(seam.source, seam.i) for seam in supernet.seams}
    wanted = sources | {(seam.target, seam.j) for seam in supernet.seams}
    rows: dict[Position, Tensor] = {}
    for name in {anchor for anchor, _ in wanted}:
        chain = supernet.chain(name)
        with evaluating(chain):
            for block, features in enumerate(chain.walk(images)):
                if (name, block) in wanted:
                    if not torch.isfinite(features).all():
                        raise SelectionError(f"Activations after block {block} of {name} are not finite.")
                    rows[name, block] = chain.layouts[block].channels_last(features).flatten(0, -2)
    for position, values in rows.items():
        if position not in moments.shifts:
            moments.shifts[position] = values.mean(0)
        rows[position] = values = values - moments.shifts[position]
        _add(moments.rows, position, len(values))
        _add(moments.sums, position, values.double().sum(0))
        square = values.T @ values if position in sources else (values**2).sum(0)
        _add(moments.squares, position, square.double())
    for seam in supernet.seams:
        product = rows[seam.target, seam.j].T @ rows[seam.source, seam.i]
        _add(moments.products, seam, product.double())


def _add(sums: dict, key: object, value: Tensor | int) -> None:  # type: ignore[type-arg]
    sums[key] = sums[key] + value if key in sums else value


def _solve(supernet: Supernet, moments: _Moments, seam: Seam, ridge: float) -> float:
    source, target = (seam.source, seam.i), (seam.target, seam.j)
    count = moments.rows[source]  # both sides of a seam have as many
    mean_x, mean_y = moments.sums[source] / count, moments.sums[target] / count
    covariance = moments.squares[source] / count - torch.outer(mean_x, mean_x)
    cross = moments.products[seam] / count - torch.outer(mean_y, mean_x)
    width = len(mean_x)
    strength = ridge * covariance.trace().clamp_min(1e-12) / width
    weight = torch.linalg.solve(covariance + torch.diag(strength.expand(width)), cross.T).T
    layer = supernet.stitch(seam).linear
    layer.weight.copy_(weight)
    layer.bias.copy_(moments.shifts[target] + mean_y - weight @ (moments.shifts[source] + mean_x))
    squares = moments.squares[target]
    variance = (squares.diagonal() if squares.ndim == 2 else squares).sum() / count - mean_y @ mean_y
    explained = 2 * (weight * cross).sum() - ((weight @ covariance) * weight).sum()
    return float((1 - explained / variance).clamp(0, 1)) if variance > 0 else 0.0

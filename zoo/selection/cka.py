"""Linear centred kernel alignment between blocks (Kornblith et al. 2019, arXiv 1905.00414, Eq. 1).

    CKA(X, Y) = HSIC(X, Y) / √(HSIC(X, X) · HSIC(Y, Y)),   HSIC(X, Y) = ⟨K, L⟩ / (B − 1)²

K = X Xᵀ and L = Y Yᵀ are Gram matrices (B, B) of features flattened to a row per image, each feature
less its mean over the batch. HSIC is the plain, biased estimate, averaged over batches (the minibatch
CKA of Nguyen et al. 2021, arXiv 2010.15327, without its unbiased estimator): small batches lift all
values towards 1. Each block has one Gram matrix a batch, and all pairs of two anchors are one product
of these, instead of three HSICs for every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Seam

# a share of features' squares that is rounding in float32: such features never change
_ROUNDING = 1e-12
# a share of features' squares below which centring their products would leave mostly rounding
_CANCELLED = 1e-2


@torch.inference_mode()
def measure_cka(
    chains: dict[str, Chain],
    seams: Iterable[Seam],
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[Seam, float]:
    """CKA, 0..1, between the source's features after block i and the target's after block j, 1 ≤ j.

    Memory grows with the square of a batch, not with the number of images. Batches of one image
    say nothing and are left out.

    Raises:
        SelectionError: no batch of two images, or activations that are not finite; names the block.
    """
    seams = list(seams)
    pairs = list(dict.fromkeys((seam.source, seam.target) for seam in seams))
    names = [name for name in chains if any(name in pair for pair in pairs)]
    crossed = {pair: torch.zeros(chains[pair[0]].depth, chains[pair[1]].depth).double() for pair in pairs}
    own = {name: torch.zeros(chains[name].depth).double() for name in names}
    count = 0
    for images, _ in batches:
        if len(images) > 1:
            grams = {name: _grams(chains[name], name, images) for name in names}
            for f, g in pairs:
                crossed[f, g] += (grams[f] @ grams[g].T).cpu()
            for name, gram in grams.items():
                own[name] += gram.square().sum(1).cpu()
            count += 1
        on_batch(len(images))
    if seams and count == 0:
        raise SelectionError("CKA needs at least one batch of two images or more.")
    found = {}
    for seam in seams:
        both = own[seam.source][seam.i - 1] * own[seam.target][seam.j - 1]
        shared = crossed[seam.source, seam.target][seam.i - 1, seam.j - 1]
        # features that never change are like nothing
        found[seam] = float(shared / both.sqrt()) if both > 0 else 0.0
    return found


def _grams(chain: Chain, name: str, images: Tensor) -> Tensor:
    """Centred Gram matrices after block 1..n, over B − 1, one flat row each: (n, B²) in float64."""
    rows = []
    with evaluating(chain):
        for block, features in enumerate(chain.walk(images)):
            if block == 0:
                continue
            gram = _centred_gram(features.flatten(1))
            # whatever is not finite in the features is not finite on the diagonal
            if not torch.isfinite(gram).all():
                raise SelectionError(f"Activations after block {block} of {name} are not finite.")
            rows.append(gram.flatten() / (len(images) - 1))
    return torch.stack(rows)


def _centred_gram(flat: Tensor) -> Tensor:
    """Gram matrix (B, B) in float64 of rows less their mean, (B, D)."""
    raw = (flat @ flat.T).double()
    # centring B × B numbers in place of B × D spares two passes over memory
    gram = raw - raw.mean(0) - raw.mean(1, keepdim=True) + raw.mean()
    if gram.trace() < _CANCELLED * raw.trace():
        flat = flat - flat.mean(0)
        gram = (flat @ flat.T).double()
    return torch.zeros_like(gram) if gram.trace() <= _ROUNDING * raw.trace() else gram

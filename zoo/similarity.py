"""Θ: how far one block's class distribution is from another's (KLAS §3.2, Eq. 1).

    Θ(P, Q) = mean over images of KL( P(x) ‖ Q(x) ), in nats, source first, target second.

It is not symmetric. All pairs of two anchors come from one matrix product over
log-probabilities, Θ = mean Σ P log P − (1/N) ⟨P, log Q⟩, summed batch by batch, so that memory
does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch

from klas_zoo.chains import Chain
from klas_zoo.data import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.probes import Probes, log_probabilities

FloatArray = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Similarities:
    """Θ of everything selection asks for, in nats.

    Attributes:
        between: (source, target) → (n_source + 1, n_target + 1); row i − 1 is the probe after
            block i, the last row and column are the anchors' own outputs. Source is the cheaper
            anchor, or the same one.
        probe_accuracy: anchor → (n + 1,), top-1 in per cent on the held-out images.
        images: how many held-out images.
    """

    between: dict[tuple[str, str], FloatArray]
    probe_accuracy: dict[str, FloatArray]
    images: int

    def theta(self, source: str, i: int, target: str, j: int) -> float:
        """Θ(P_i of source, P_j of target); i and j count blocks from 1."""
        return float(self.between[source, target][i - 1, j - 1])

    def of_outputs(self, source: str, target: str) -> float:
        """Θ between the anchors' own final outputs."""
        return float(self.between[source, target][-1, -1])


@torch.inference_mode()
def measure_similarities(
    chains: dict[str, Chain],
    probes: dict[str, Probes],
    heldout: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Similarities:
    """Θ between all positions of every pair of anchors, cheaper first, over held-out images.

    Raises:
        SelectionError: no images, or an anchor gives values that are not finite.
    """
    names = list(chains)
    pairs = list(combinations_with_replacement(names, 2))
    crossed = {(f, g): np.zeros((chains[f].depth + 1, chains[g].depth + 1)) for f, g in pairs}
    negative_entropy = {name: np.zeros(chains[name].depth + 1) for name in names}
    hits = {name: np.zeros(chains[name].depth + 1) for name in names}
    count = 0
    for images, labels in heldout:
        logs = {n: log_probabilities(chains[n], probes[n], images).double().flatten(1) for n in names}
        probabilities = {name: log.exp() for name, log in logs.items()}
        for name, log in logs.items():
            if not torch.isfinite(log).all():
                raise SelectionError(f"Anchor {name} gives probabilities that are not finite.")
            negative_entropy[name] += (probabilities[name] * log).sum(1).cpu().numpy()
            best = log.view(len(log), len(labels), -1).argmax(-1)
            hits[name] += (best == labels).sum(1).cpu().numpy()
        for f, g in pairs:
            crossed[f, g] += (probabilities[f] @ logs[g].T).cpu().numpy()
        count += len(labels)
        on_batch(len(labels))
    if count == 0:
        raise SelectionError("There are no held-out images to measure similarities on.")
    return Similarities(
        between={(f, g): (negative_entropy[f][:, None] - crossed[f, g]) / count for f, g in pairs},
        probe_accuracy={name: 100 * found / count for name, found in hits.items()},
        images=count,
    )

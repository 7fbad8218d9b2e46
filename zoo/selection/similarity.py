"""Θ: how far one block's class distribution is from another's (KLAS §3.2, Eq. 1).

    Θ(P, Q) = mean over images of KL( P(x) ‖ Q(x) ), in nats, source first, target second.

It is not symmetric. All pairs of two anchors come from one matrix product over
log-probabilities, Θ = mean Σ P log P − (1/N) ⟨P, log Q⟩, summed batch by batch, so that memory
does not grow with the number of images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.selection.probes import log_probabilities

FloatArray = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Similarities:
    """Θ of everything selection asks for, in nats.

    Attributes:
        between: (source, target) → (n_source + 1, n_target + 1); row i − 1 is the probe after
            block i, the last row and column are the anchors' own outputs.
        probe_accuracy: anchor → (n + 1,), top-1 in per cent on the held-out images.
        images: how many held-out images.
        entropy: anchor → (n + 1,), mean entropy H(P_i) in nats.
        chance: per cent of the held-out images that are of the most frequent class: what a probe gets
            right that has learned nothing.
    """

    between: dict[tuple[str, str], FloatArray]
    probe_accuracy: dict[str, FloatArray]
    images: int
    entropy: dict[str, FloatArray] = field(default_factory=dict)
    chance: float = 0.0

    def theta(self, source: str, i: int, target: str, j: int) -> float:
        """Θ(P_i of source, P_j of target); i and j count blocks from 1.

        Raises:
            SelectionError: an older klas-zoo measured, and only from small to large.
        """
        if (source, target) not in self.between:
            raise SelectionError(f"Θ from {source} to {target} was not measured: build again to stitch that way.")
        return float(self.between[source, target][i - 1, j - 1])

    def cross_entropy(self, source: str, i: int, target: str, j: int) -> float:
        """H(P_i, P_j) = −mean Σ P_i log P_j = Θ(P_i, P_j) + H(P_i), in nats."""
        return self.theta(source, i, target, j) + float(self.entropy[source][i - 1])

    def of_outputs(self, source: str, target: str) -> float:
        """Θ between the anchors' own final outputs."""
        return float(self.between[source, target][-1, -1])


@torch.inference_mode()
def measure_similarities(
    chains: dict[str, Chain],
    probes: Mapping[str, nn.Module],
    heldout: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Similarities:
    """Θ between all positions of every two anchors, in both directions, over held-out images.

    Args:
        probes: of each anchor, called with pooled features of block 1..n, gives logits (n, B, classes).

    Raises:
        SelectionError: no images, or an anchor gives values that are not finite.
    """
    names = list(chains)
    pairs = list(product(names, repeat=2))
    crossed = {(f, g): np.zeros((chains[f].depth + 1, chains[g].depth + 1)) for f, g in pairs}
    negative_entropy = {name: np.zeros(chains[name].depth + 1) for name in names}
    hits = {name: np.zeros(chains[name].depth + 1) for name in names}
    count = 0
    of_class: Counter[int] = Counter()
    for images, labels in heldout:
        logs = {n: log_probabilities(chains[n], probes[n], images).double().flatten(1) for n in names}
        probabilities = {name: log.exp() for name, log in logs.items()}
        for name, log in logs.items():
            _check_finite(log, name)
            negative_entropy[name] += (probabilities[name] * log).sum(1).cpu().numpy()
            best = log.view(len(log), len(labels), -1).argmax(-1)
            hits[name] += (best == labels).sum(1).cpu().numpy()
        for f, g in pairs:
            crossed[f, g] += (probabilities[f] @ logs[g].T).cpu().numpy()
        of_class.update(labels.tolist())
        count += len(labels)
        on_batch(len(labels))
    if count == 0:
        raise SelectionError("There are no held-out images to measure similarities on.")
    return Similarities(
        between={(f, g): (negative_entropy[f][:, None] - crossed[f, g]) / count for f, g in pairs},
        probe_accuracy={name: 100 * found / count for name, found in hits.items()},
        images=count,
        entropy={name: -found / count for name, found in negative_entropy.items()},
        chance=100 * max(of_class.values()) / count,
    )


@torch.inference_mode()
def measure_outputs(
    chains: dict[str, Chain], heldout: Iterable[Batch], *, on_batch: Callable[[int], None] = lambda images: None
) -> dict[tuple[str, str], float]:
    """Θ between the final outputs of every two anchors, smaller first, in nats; needs no probes.

    Raises:
        SelectionError: no images, or an anchor gives values that are not finite.
    """
    sums = dict.fromkeys(combinations(chains, 2), 0.0)
    count = 0
    for images, labels in heldout:
        logs = {}
        for name, chain in chains.items():
            with evaluating(chain):
                logs[name] = log_softmax(chain(images).double(), -1)
            _check_finite(logs[name][None], name)
        for f, g in sums:
            sums[f, g] += float((logs[f].exp() * (logs[f] - logs[g])).sum())
        count += len(labels)
        on_batch(len(labels))
    if count == 0:
        raise SelectionError("There are no held-out images to measure similarities on.")
    return {pair: total / count for pair, total in sums.items()}


def _check_finite(log: Tensor, anchor: str) -> None:
    """Log-probabilities (n + 1, …), or (1, …) of an output alone."""
    bad = (~torch.isfinite(log.flatten(1)).all(1)).nonzero().flatten().tolist()
    if not bad:
        return
    if bad[0] == len(log) - 1:
        raise SelectionError(f"Anchor {anchor} gives probabilities that are not finite.")
    raise SelectionError(f"The probe after block {bad[0] + 1} of {anchor} gives probabilities that are not finite.")

"""Pooled features of frozen anchors: of one batch, or stored for a whole split.

A frozen anchor gives the same features in every epoch of the probes. Where those of a split fit into memory,
each image passes through the anchors once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.processes.team import ALONE, Team

MOST_BYTES = 512 * 2**20
"""Features of a split are stored if they take no more than this."""


def walk_pooled(chain: Chain, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """One forward pass: pooled features of block 1..n, each (B, D_k), and the logits (B, classes)."""
    pooled = []
    with evaluating(chain):
        for position, features in enumerate(chain.walk(images)):
            if position > 0:
                pooled.append(chain.pool(features, chain.layouts[position]))
        return pooled, chain.head(features)


def bytes_of(chains: Mapping[str, Chain], count: int) -> int:
    """What the features of `count` images take in fp32."""
    return 4 * count * sum(chain.width(block) for chain in chains.values() for block in range(1, chain.depth + 1))


@dataclass(frozen=True, kw_only=True)
class PooledFeatures:
    """Pooled features of every image of a split.

    Attributes:
        blocks: by anchor, of block 1..n, each (N, D_k).
        labels: (N,).
    """

    blocks: Mapping[str, list[Tensor]]
    labels: Tensor

    def at(self, anchor: str, positions: Tensor) -> list[Tensor]:
        """Features of some images: block 1..n, each (B, D_k)."""
        return [block[positions] for block in self.blocks[anchor]]

    def batches(self, order: Iterable[Tensor]) -> Iterator[Batch]:
        """For each batch of positions (B,), these and their labels (B,)."""
        for positions in order:
            here = positions.to(self.labels.device)
            yield here, self.labels[here]


def pool_features(
    chains: Mapping[str, Chain],
    images: Iterable[tuple[Tensor, Batch]],
    count: int,
    *,
    team: Team = ALONE,
    on_batch: Callable[[int], None] = lambda images: None,
) -> PooledFeatures:
    """Runs every image through every anchor once.

    Args:
        images: batches with the positions (B,) of their images in the split, of each process its share.
        count: images in the split.
        team: ends with all features in every process.
        on_batch: called with the number of images that the team has done since, after each batch.
    """
    device = next(next(iter(chains.values())).parameters()).device
    blocks = {
        name: [torch.zeros(count, chain.width(block), device=device) for block in range(1, chain.depth + 1)]
        for name, chain in chains.items()
    }
    labels = torch.zeros(count, dtype=torch.long, device=device)
    done = 0
    for positions, (batch, truth) in images:
        here = positions.to(device)
        labels[here] = truth
        for name, chain in chains.items():
            with torch.inference_mode():
                pooled, _ = walk_pooled(chain, batch)
            for stored, features in zip(blocks[name], pooled, strict=True):
                stored[here] = features.float()
        before, done = done, min(count, done + len(truth) * team.size)  # the others' last batch may be short
        on_batch(done - before)
    for stored in (labels, *(one for several in blocks.values() for one in several)):
        team.all_reduce(stored)  # of the others' images a process has zeros
    return PooledFeatures(blocks=blocks, labels=labels)

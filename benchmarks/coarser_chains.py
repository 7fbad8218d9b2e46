"""Families with seams behind every n-th block only: so few candidates that all of them can be tuned on a CPU."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from klas_zoo.chains import Chain
from klas_zoo.families.anchors import Family


def coarser(family: Family, every: int) -> Family:
    """The same networks with the same weights; a block is `every` of theirs in a row, the last one may be shorter."""
    if every == 1:
        return family
    return replace(family, chains={name: _joined(chain, every) for name, chain in family.chains.items()})


def _joined(chain: Chain, every: int) -> Chain:
    ends = [*range(every, chain.depth, every), chain.depth]
    blocks = [nn.Sequential(*chain.blocks[end - every : end]) for end in ends[:-1]]
    last = nn.Sequential(*chain.blocks[(len(ends) - 1) * every :])
    layouts = [chain.layouts[end] for end in (0, *ends)]
    return Chain(
        chain.stem, [*blocks, last], chain.head, input_shape=chain.input_shape, layout=layouts, pool=chain.pool
    )

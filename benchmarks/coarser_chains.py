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
    starts = range(0, chain.depth, every)
    blocks = [nn.Sequential(*chain.blocks[start : start + every]) for start in starts]
    layouts = [chain.layouts[place] for place in (*starts, chain.depth)]
    return Chain(chain.stem, blocks, chain.head, input_shape=chain.input_shape, layout=layouts, pool=chain.pool)

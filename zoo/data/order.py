"""Which image comes when: in order or shuffled, once or forever, for one process or a team.

All of it follows from the seed and from counting. So a run can resume at any batch, and a team sees
the batches that one process would see, each process a part of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from klas_zoo.errors import UsageError
from klas_zoo.processes.randomness import mixed
from klas_zoo.processes.team import Team


class Draw(NamedTuple):
    """An image by its place in a split, and what its random transforms start from."""

    position: int
    seed: int


class Order(Iterable[list[Draw]]):
    """What DataLoader takes for a batch sampler; read once."""

    def __init__(self, order: Iterator[list[Draw]]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._order


def in_order(length: int, size: int, team: Team) -> Iterator[list[Draw]]:
    """Whole batches by turns; the last one ends short."""
    for first in range(team.rank * size, length, team.size * size):
        yield [Draw(position, 0) for position in range(first, min(first + size, length))]


def shuffled(length: int, size: int, seed: int, forever: bool, start: int, team: Team) -> Iterator[list[Draw]]:
    """Each process's share of every batch, which has to come out even, from batch `start` on.

    Batch k holds places k · size … (k + 1) · size of one permutation after the other.

    Raises:
        UsageError: a batch cannot be shared out evenly.
    """
    if size % team.size:
        raise UsageError(f"A batch of {size} images cannot be shared by {team.size} processes evenly.")
    share = size // team.size
    number, order = -1, torch.empty(0)
    for batch in count(start) if forever else range(start, length // size):
        draws = []
        for place in range(batch * size + team.rank * share, batch * size + (team.rank + 1) * share):
            epoch, within = divmod(place, length)
            if epoch != number:
                number, order = epoch, permutation(length, seed, epoch)
            position = int(order[within])
            draws.append(Draw(position, mixed(seed, epoch, position)))
        yield draws


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch, (length,)."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(mixed(seed, epoch)))

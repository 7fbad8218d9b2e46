"""The processes that do a build together, as torchrun starts them; most builds are done by one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

# the others wait while the first one does what only one can do, such as fitting stitching layers
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Team:
    """`size` processes, this one is number `rank`. Every method is called by all of them, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def tell(self, value: Any) -> Any:
        """The first process's value, for all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def average(self, values: Sequence[Tensor]) -> None:
        """Makes every tensor the mean of the processes', in place and in one exchange."""
        if self.size == 1:
            return
        flat = self.add(torch.cat([value.flatten() for value in values])).div_(self.size)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))

    def follow(self, values: Iterable[Tensor]) -> None:
        """Makes tensors what the first process has, in place."""
        if self.size > 1:
            for value in values:
                dist.broadcast(value, 0)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's values, in the order of ranks."""
        if self.size == 1:
            return [value]
        box = [None] * self.size
        dist.all_gather_object(box, value)
        return box

    def wait(self) -> None:
        """Until all have come here."""
        self.add(torch.zeros(()))  # on the CPU: a barrier of torch's own would ask for a GPU


ALONE = Team()


def under_torchrun() -> bool:
    """Whether torchrun started this process; it says so in the environment."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def join(torch_device: str) -> Team:
    """The team that torchrun started, or one process alone. NCCL on GPUs, gloo on CPUs."""
    if not under_torchrun():
        return ALONE
    if torch_device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # objects and barriers go over gloo, so that they need no GPU
    backend = "cpu:gloo,cuda:nccl" if torch_device == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # processes that torchrun restarts meet in the store of those before them, whose addresses are still in
        # it; over several machines this number is not the same everywhere (docs/builds.md)
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return Team(rank, size)


def leave(team: Team) -> None:
    """Takes the process out of its team; the others may go on."""
    if team.size > 1:
        dist.destroy_process_group()

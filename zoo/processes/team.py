"""The processes of one build, as torchrun starts them; most builds run in a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from klas_zoo.cores import physical_cores

# the others wait while the first one does what only one can do, such as fitting stitching layers
_PATIENCE = timedelta(hours=6)
_REPORT_PATIENCE = timedelta(seconds=30)


@dataclass(frozen=True)
class Team:
    """`size` processes, this one is number `rank`. Every method is called by all of them, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
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
        flat = self.all_reduce(torch.cat([value.flatten() for value in values])).div_(self.size)
        for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))

    def sync(self, values: Iterable[Tensor]) -> None:
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

    def barrier(self) -> None:
        """Until all have come here."""
        self.all_reduce(torch.zeros(()))  # on the CPU: a barrier of torch's own would ask for a GPU


ALONE = Team()


def limit_threads() -> None:
    """torch starts a thread for each core of the machine; of a container it may have fewer."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), physical_cores()))


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
    """Takes the process out of its team; the others may continue."""
    if team.size > 1:
        dist.destroy_process_group()


def report_once(say: Callable[[], None]) -> None:
    """Calls `say` in the first process of a team that gets here; the others wait until it has.

    They meet in the store that torchrun keeps for its processes. It ends them all when the first has ended,
    so none may end before the sentence is written. Where the store cannot be reached, every process calls `say`.
    """
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=_REPORT_PATIENCE,
        )  # fmt: skip
        life = f"klas-zoo error, restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
        if store.add(f"{life}: reported by", 1) > 1:
            store.wait([f"{life}: reported"])
            return
    except RuntimeError:  # torch's errors of stores; also where the process that was to report has died
        say()
        return
    say()
    try:
        store.set(f"{life}: reported", "")
    except RuntimeError:
        return  # no other process is left

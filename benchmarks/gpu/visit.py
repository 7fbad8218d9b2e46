"""What the stages of a visit to a GPU share: where numbers go, what they mean, and how a session is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpu import graphs
from gpu.records import Rows

BATCHES = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Visit:
    """Where numbers go, and whether they mean anything.

    Attributes:
        graphs: the folder that `graphs.py` fills.
        measured: false on the fake driver.
        quick: few runs and small families, to try the stages out.
        deadline: of `time.monotonic`.
    """

    out: Path
    graphs: Path
    measured: bool
    quick: bool
    deadline: float
    only: str = ""
    tables: list[Rows] = field(default_factory=list)

    def rows(self, name: str) -> Rows:
        found = Rows(self.out, name, measured=self.measured, deadline=self.deadline, only=self.only)
        self.tables.append(found)
        return found

    @property
    def incomplete(self) -> bool:
        return any(one.incomplete for one in self.tables)

    def method(self) -> Any:
        from klas_zoo.profiles.timing import Method

        if self.quick:
            return Method(warmup_ms=0, min_runs=2, min_ms=0, max_ms=100, rounds=1)
        return Method(warmup_ms=60, min_runs=30, min_ms=200, max_ms=3000, rounds=4)

    @property
    def families(self) -> list[str]:
        return ["deit-micro", "resnet"] if self.quick else graphs.families()

    @property
    def profiled(self) -> str:
        """The family whose profile is measured."""
        return "deit-micro" if self.quick else graphs.PROFILED

    def wait_for(self, family: str) -> Path:
        """The folder of a family's graphs, as soon as they are there."""
        folder = self.graphs / family
        while not (folder / "done.json").is_file():
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"the graphs of {family} are not there")
            time.sleep(0.5)
        return folder


def ready_first(visit: Visit) -> Iterator[str]:
    """Families, those whose graphs are there first."""
    left = list(visit.families)
    while left:
        left.sort(key=lambda name: (not (visit.graphs / name / "done.json").is_file(), name))
        if time.monotonic() < visit.deadline and not (visit.graphs / left[0] / "done.json").is_file():
            time.sleep(0.5)
            continue
        yield left.pop(0)


def timed_session(visit: Visit, session: Any, shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    from klas_zoo.profiles.runners import SessionRunner, images_of
    from klas_zoo.profiles.timing import time_in_turn

    runner = SessionRunner(session, images_of(batch, shape), device_clock=True)
    times = time_in_turn({"one": runner}, visit.method())["one"]
    return medians(times)


def medians(times: Any) -> dict[str, Any]:
    host, device = times.host_ms, times.device_ms
    found = {"runs": len(host), "host_p50_ms": float(np.median(host)), "host_p90_ms": float(np.percentile(host, 90)),
             "host_min_ms": float(host.min())}  # fmt: skip
    if device is not None:
        found |= {"device_p50_ms": float(np.median(device)), "device_min_ms": float(device.min())}
    return found


def events_ms(work: Callable[[], object], *, warm: int = 3, runs: int = 10) -> float:
    """Median milliseconds between CUDA events."""
    import torch

    for _ in range(warm):
        work()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times))

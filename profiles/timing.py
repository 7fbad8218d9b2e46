"""Timing many networks in turn, so that whatever drifts meanwhile hits all of them alike.

As trtexec and MLPerf's LoadGen do: a warm-up by time, then runs until there are enough of them and
they lasted long enough, and no outlier is thrown away. Unlike them the runs come in rounds: each
network runs a burst, then the next one does, forwards in one round and backwards in the following.
A burst starts with a run that does not count, because the network before it has emptied the caches.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol, TypeVar

import numpy as np

from klas_zoo.profiles.profile import NOISY_VARIATION, Statistics

Key = TypeVar("Key", bound=Hashable)
DRIFT = 0.03
"""Difference between both halves of a measurement above which it is doubtful."""


class Runner(Protocol):
    """A network that is loaded and has its batch at hand."""

    def run(self) -> None:
        """One batch, from the call to the answer."""

    def time(self, count: int) -> tuple[list[float], list[float] | None]:
        """Milliseconds of `count` runs, one after another, by the host's clock, and by the device's if it has one."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How long is measured, of every network.

    Attributes:
        warmup_ms: before the first round.
        min_runs, min_ms: at least so many runs that count, lasting at least so long together...
        max_ms: ... unless this is over first.
        rounds: in how many bursts.
    """

    warmup_ms: float = 200
    min_runs: int = 100
    min_ms: float = 1_000
    max_ms: float = 60_000
    rounds: int = 10


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of every run that counted, in order, (runs,); `device_ms` only where the device has a clock."""

    host_ms: np.ndarray
    device_ms: np.ndarray | None = None


def time_in_turn(
    runners: Mapping[Key, Runner], method: Method, *, on_burst: Callable[[Key], None] = lambda key: None
) -> dict[Key, Times]:
    """Times every runner in rounds."""
    device: dict[Key, list[float]] = {key: [] for key in runners}
    host: dict[Key, list[float]] = {key: [] for key in runners}
    bursts = {key: _burst(_warm_up(runner, method.warmup_ms), method) for key, runner in runners.items()}
    with no_garbage_collection():
        for number in range(method.rounds):
            for key in list(runners) if number % 2 == 0 else list(runners)[::-1]:
                if sum(host[key]) < method.max_ms:
                    runners[key].run()
                    host_ms, device_ms = runners[key].time(bursts[key])
                    host[key] += host_ms
                    device[key] += device_ms or []
                on_burst(key)
    return {
        key: Times(host_ms=np.array(host[key]), device_ms=np.array(device[key]) if device[key] else None)
        for key in runners
    }


def _warm_up(runner: Runner, warmup_ms: float) -> float:
    """Runs for that long, at least once; milliseconds of the fastest run."""
    fastest, start = math.inf, perf_counter_ns()
    while True:
        before = perf_counter_ns()
        runner.run()
        after = perf_counter_ns()
        fastest = min(fastest, (after - before) / 1e6)
        if after - start >= warmup_ms * 1e6:
            return fastest


def _burst(run_ms: float, method: Method) -> int:
    """How many runs a round takes; one run more than needed would be a round more for nothing."""
    wanted = max(method.min_runs, method.min_ms / max(run_ms, 1e-6))
    most = max(method.max_ms / max(run_ms, 1e-6), method.rounds)
    return max(1, math.ceil(min(wanted, most) / method.rounds))


def statistics_of(runs_ms: np.ndarray) -> Statistics:
    """Of all runs, (runs,) milliseconds; outliers count."""
    p50, p90, p95, p99 = (float(one) for one in np.percentile(runs_ms, (50, 90, 95, 99)))
    return Statistics(
        runs=len(runs_ms),
        min_ms=float(runs_ms.min()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        coefficient_of_variation=float(runs_ms.std() / runs_ms.mean()),
    )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """The collector's pauses are Python's, not the network's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def doubts(runs_ms: Mapping[str, np.ndarray], rounds: int) -> list[str]:
    """What makes measurements doubtful, a sentence each: noise within networks, drift between rounds."""
    found = []
    noisy = {name: float(runs.std() / runs.mean()) for name, runs in runs_ms.items()}
    worst = max(noisy, key=lambda name: noisy[name])
    count = sum(variation > NOISY_VARIATION for variation in noisy.values())
    if count:
        found.append(
            f"{count} of {len(noisy)} networks varied by more than {NOISY_VARIATION:.0%} "
            f"(coefficient of variation; most of all {worst}, {noisy[worst]:.0%})."
        )
    drifts = {name: _drift(runs, rounds) for name, runs in runs_ms.items()}
    moved = [name for name, drift in drifts.items() if drift > DRIFT]
    if moved:
        most = max(moved, key=lambda name: drifts[name])
        found.append(
            f"The medians of {len(moved)} of {len(drifts)} networks moved by more than {DRIFT:.0%} between the first "
            f"and the second half of the rounds (most of all {most}, {drifts[most]:.0%})."
        )
    return found


def _drift(runs_ms: np.ndarray, rounds: int) -> float:
    """How far the medians of the first and the second half of the rounds are apart, relative."""
    if rounds < 2 or len(runs_ms) < 2:
        return 0.0
    first, second = (float(np.median(half)) for half in np.array_split(runs_ms, 2))
    return abs(second - first) / min(first, second)

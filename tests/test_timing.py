"""How runs are shared out among networks; no test here depends on how long anything takes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from klas_zoo.profiles import timing
from klas_zoo.profiles.timing import Method, doubts, statistics_of, time_in_turn


class Clock:
    """Nanoseconds that pass only while a runner of it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.log: list[str] = []
        monkeypatch.setattr(timing, "perf_counter_ns", lambda: self.now_ns)


class Fake:
    """A network that takes `run_ms`, and `cold_ms` when another one ran before."""

    def __init__(self, clock: Clock, name: str, run_ms: float, cold_ms: float = 0.0, device_ms: float = 0.0) -> None:
        self.clock, self.name, self.run_ms, self.cold_ms, self.device_ms = clock, name, run_ms, cold_ms, device_ms

    def run(self) -> None:
        cold = self.clock.log[-1:] != [self.name]
        self.clock.log.append(self.name)
        self.clock.now_ns += int(1e6 * (self.run_ms + (self.cold_ms if cold else 0)))

    def time(self, count: int) -> tuple[list[float], list[float] | None]:
        times = []
        for _ in range(count):
            before = self.clock.now_ns
            self.run()
            times.append((self.clock.now_ns - before) / 1e6)
        return times, [self.device_ms] * count if self.device_ms else None


def test_networks_take_turns_there_and_back_and_none_runs_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    networks = {name: Fake(clock, name, 10) for name in "abc"}
    bursts: list[str] = []
    method = Method(warmup_ms=0, min_runs=8, min_ms=0, rounds=4)
    times = time_in_turn(networks, method, on_burst=bursts.append)
    assert "".join(bursts) == "abccbaabccba"
    assert {name: len(found.host_ms) for name, found in times.items()} == dict.fromkeys("abc", 8)
    assert all(found.device_ms is None for found in times.values())


def test_a_run_after_another_network_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    networks = {name: Fake(clock, name, 10, cold_ms=5) for name in "ab"}
    times = time_in_turn(networks, Method(warmup_ms=50, min_runs=6, min_ms=0, rounds=3))
    assert all((found.host_ms == 10).all() for found in times.values())


def test_fast_networks_run_more_often_and_slow_ones_no_longer_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    networks = {"fast": Fake(clock, "fast", 1), "slow": Fake(clock, "slow", 100), "stuck": Fake(clock, "stuck", 5_000)}
    times = time_in_turn(networks, Method(warmup_ms=0, min_runs=20, min_ms=1_000, max_ms=10_000, rounds=10))
    assert len(times["fast"].host_ms) == 1_000
    assert len(times["slow"].host_ms) == 20
    assert len(times["stuck"].host_ms) == 2  # and at least one


def test_a_devices_own_time_and_the_hosts_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = time_in_turn(
        {"a": Fake(clock, "a", 10, device_ms=8)}, Method(warmup_ms=0, min_runs=4, min_ms=0, rounds=2)
    )
    assert times["a"].host_ms.tolist() == [10] * 4
    assert times["a"].device_ms is not None and times["a"].device_ms.tolist() == [8] * 4


def test_the_warm_up_lasts_as_long_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    time_in_turn({"a": Fake(clock, "a", 30)}, Method(warmup_ms=200, min_runs=1, min_ms=0, rounds=1))
    assert len(clock.log) == math.ceil(200 / 30) + 2  # the first run of the burst, and the one that counts


def test_statistics_are_those_of_all_runs() -> None:
    found = statistics_of(np.arange(1.0, 102.0))  # 1 … 101: percentiles fall on runs
    assert (found.runs, found.min_ms, found.p50_ms) == (101, 1, 51)
    assert (found.p90_ms, found.p95_ms, found.p99_ms) == (91, 96, 100)
    assert found.coefficient_of_variation == pytest.approx(((101**2 - 1) / 12) ** 0.5 / 51)


def test_noise_and_drift_are_named_and_their_absence_is_silent() -> None:
    calm = np.full(40, 10.0)
    assert doubts({"a": calm, "b": calm}, 10) == []
    noisy = np.tile([10.0, 12.0], 20)
    (said,) = doubts({"a": calm, "b": noisy}, 10)
    assert said == "1 of 2 networks varied by more than 5% (coefficient of variation; most of all b, 9%)."
    drifting = np.concatenate([np.full(20, 10.0), np.full(20, 10.5)])
    (said,) = doubts({"a": calm, "b": drifting}, 10)
    assert "1 of 2 networks moved by more than 3% between the first and the second half" in said
    assert doubts({"b": drifting}, 1) == []

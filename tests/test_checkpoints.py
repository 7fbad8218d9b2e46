"""Tuning that is interrupted and gone on with ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import random_batches, same_state, snapshot, three_chains

from klas_zoo.data.loading import Batch
from klas_zoo.errors import Interrupted
from klas_zoo.processes.signals import Signals
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.settings import TuningSettings
from klas_zoo.tuning.tuner import Tuner

STEPS = 7
SETTINGS = TuningSettings(
    steps=STEPS, epochs=1, batch=8, anchor_rate=1e-3, stitch_rate=1e-2, weight_decay=0.1, warmup=0.2, distillation=0.6,
    hard=False, clip=1.0, augmentation="light", init_images=8, precision="fp32", seed=3,
)  # fmt: skip


def supernet() -> Supernet:
    """With dropout, so that every step draws from torch's generator too."""
    torch.manual_seed(7)
    chains = three_chains()
    for chain in chains.values():
        chain.blocks[0].append(nn.Dropout(0.3))
    routes = [Route.anchor("tiny", 3), Route.anchor("base", 5), Route.stitch("tiny", 2, "base", 1, 5)]
    return Supernet(chains, routes).eval()


def stream(start: int) -> Iterator[Batch]:
    return islice(cycle(random_batches((8, 8, 8, 8, 8))), start, None)


def life(folder: Path, settings: TuningSettings, until: int = STEPS, **options: Any) -> Supernet:
    """What one process does of a tuning, from its last checkpoint up to a step."""
    net = supernet()
    tuner = Tuner(net, STEPS, settings)
    torch.manual_seed(11)
    checkpoints = Checkpoints(folder, **{"every_s": 1e9, **options})
    checkpoints.restore(tuner)
    batches = stream(tuner.batches_taken)
    with tuner.running():
        while tuner.done < until:
            tuner.step(batches)
            checkpoints.after_step(tuner)
    tuner.finish()
    return net


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.9}, {"accumulate": 2}, {"reuse": 2}, {"precision": "bf16"}, {"memory_format": "channels-last"}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = replace(SETTINGS, **changes)
    whole = life(tmp_path / "never stopped", settings)
    for until in (1, 3, 6):
        life(tmp_path / "often stopped", settings, until, every_s=0)
    assert same_state(life(tmp_path / "often stopped", settings), snapshot(whole))


def test_a_killed_run_loses_at_most_the_steps_since_its_last_checkpoint(tmp_path: Path) -> None:
    ticks = iter(range(0, 1000, 10))
    net = supernet()
    tuner = Tuner(net, STEPS, SETTINGS)
    checkpoints = Checkpoints(tmp_path, every_s=25, clock=lambda: next(ticks))
    with tuner.running():
        for _ in range(STEPS):
            tuner.step(stream(tuner.done))
            checkpoints.after_step(tuner)
    again = Tuner(supernet(), STEPS, SETTINGS)
    assert Checkpoints(tmp_path, every_s=25).restore(again)
    assert 0 < again.done < STEPS


def test_writing_never_takes_more_than_a_fortieth_of_the_time(tmp_path: Path) -> None:
    now = [0.0]

    class Slow(Checkpoints):
        def save(self, tuner: Tuner) -> None:
            began = now[0]
            now[0] += 8  # seconds that writing takes
            self._last, self._cost = now[0], now[0] - began
            self.count += 1

    checkpoints = Slow(tmp_path, every_s=1, clock=lambda: now[0])
    tuner = Tuner(supernet(), STEPS, SETTINGS)
    for _ in range(5_000):
        now[0] += 1  # second a step takes
        checkpoints.after_step(tuner)
    assert 8 * checkpoints.count <= now[0] / 40 + 8
    assert checkpoints.count > 10


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_checkpoint_that_cannot_be_read_is_as_good_as_none(content: bytes, tmp_path: Path) -> None:
    tuner = Tuner(supernet(), STEPS, SETTINGS)
    checkpoints = Checkpoints(tmp_path, every_s=0)
    assert not checkpoints.restore(tuner)
    checkpoints.file.write_bytes(content)
    assert not checkpoints.restore(tuner)
    assert tuner.done == 0


def test_a_flipped_bit_of_a_checkpoint_makes_it_as_good_as_none(tmp_path: Path) -> None:
    life(tmp_path, SETTINGS, 1, every_s=0)
    checkpoints = Checkpoints(tmp_path, every_s=0)
    content = checkpoints.file.read_bytes()
    for place in range(0, len(content), 97):
        checkpoints.file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not checkpoints.restore(Tuner(supernet(), STEPS, SETTINGS)), place
    checkpoints.file.write_bytes(content)
    assert checkpoints.restore(Tuner(supernet(), STEPS, SETTINGS))


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    life(tmp_path, SETTINGS, 1, every_s=0)
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert found["tuner"]["done"] == 1
    assert len(found["randomness"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_puts_tuning_away_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    whole = life(tmp_path / "never stopped", SETTINGS)
    signals = Signals()

    def batches(tuner: Tuner) -> Iterator[Batch]:
        for place, batch in enumerate(stream(tuner.done)):
            if place == 2:
                os.kill(os.getpid(), number)
            yield batch

    tuner = Tuner(supernet(), STEPS, SETTINGS)
    torch.manual_seed(11)
    checkpoints = Checkpoints(tmp_path / "stopped", every_s=1e9, signals=signals)
    given = batches(tuner)
    with pytest.raises(Interrupted) as stopped, signals.installed(), signals.patiently(), tuner.running():
        while tuner.done < STEPS:
            tuner.step(given)
            checkpoints.after_step(tuner)
    assert stopped.value.exit_code == 128 + number
    assert str(stopped.value) == (
        f"Stopped by {number.name} at step 3 of 7 of tuning. What was done is cached: run the same command again "
        "(without --redo) to resume."
    )
    assert same_state(life(tmp_path / "stopped", SETTINGS), snapshot(whole))


def test_a_signal_stops_at_once_what_cannot_be_put_away() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with signals.installed(), pytest.raises(Interrupted, match="Stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signals.received is signal.SIGTERM


def test_one_press_of_a_key_that_comes_twice_counts_once_and_a_later_one_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("klas_zoo.processes.signals.time.monotonic", lambda: now[0])
    signals = Signals()
    with pytest.raises(Interrupted), signals.installed(), signals.patiently():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is signal.SIGINT
        now[0] += 5
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)

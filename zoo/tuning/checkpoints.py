"""Checkpoints of tuning: everything the next step depends on, in one file that is there as a whole or not at all.

    model, optimiser, scheduler, running average, the number of steps (which gives the position in the data),
    the generator that draws routes, and every process's generators that dropout and the like draw from;
    then the SHA-256 of all that

A run that resumes from a checkpoint ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from klas_zoo.errors import KlasZooError
from klas_zoo.files import replacing, sha256_of
from klas_zoo.processes.randomness import mixed, randomness, restore_randomness, seed_everything
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.tuning.tuner import Tuner

SCHEMA_VERSION = 2  # 1: without a SHA-256 at the end
_DIGITS = 64
_MOST = 1 / 40  # of the time goes into writing: 2.5 %


class Checkpoints:
    """Writes a checkpoint now and then, and the last one before the process has to stop.

    Args:
        folder: where `checkpoint.pt` goes; made when there is something to put in it.
        every_s: seconds between two; more where writing one takes more than a fortieth of that.
        seed: of generators of a team of another size than the one that was interrupted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_s: float,
        seed: int = 0,
        team: Team = ALONE,
        signals: Signals | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.file = folder / "checkpoint.pt"
        self.seconds, self.count = 0.0, 0
        self._every_s, self._seed, self._team, self._clock = every_s, seed, team, clock
        self._signals = signals or Signals()
        self._last, self._cost = clock(), 0.0

    def restore(self, tuner: Tuner) -> bool:
        """Puts a tuner where the last checkpoint was taken; whether there was one that can be read.

        The first process decides for all: at different steps they would exchange gradients of different routes.

        Raises:
            KlasZooError: another process does not find the same checkpoint; raised in all of them.
        """
        found = self._read()
        steps = self._team.gather(found["tuner"]["done"] if found else None)
        if steps[0] is None:
            return False
        if odd := [rank for rank, step in enumerate(steps) if step != steps[0]]:
            raise KlasZooError(
                f"Process {odd[0]} cannot read the checkpoint of step {steps[0]:,} in {self.file}, which process 0 "
                "reads: all machines of a build must see the registry's folder."
            )
        assert found is not None
        tuner.restore(found["tuner"])
        states = found["randomness"]
        if len(states) == self._team.size:
            restore_randomness(states[self._team.rank])
        else:
            seed_everything(mixed(self._seed, tuner.done, self._team.rank))
        return True

    def _read(self) -> dict[str, Any] | None:
        """What this process finds in the file; what cannot be read is as good as not there."""
        try:
            if not _is_intact(self.file):
                return None
            # weights_only: no code in it is ever run
            found = torch.load(self.file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged pickle raises nearly anything
            return None
        readable = isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION
        return found if readable else None

    def after_step(self, tuner: Tuner) -> None:
        """Called by every process after each step, the last one too.

        Raises:
            Interrupted: a signal came to one of the processes; a checkpoint has been written.
        """
        # after the last step the result itself is written
        due_here = self._team.is_main and tuner.done < tuner.steps and self._due()
        due, stop = self._team.all_reduce(
            torch.tensor([due_here, self._signals.received is not None], dtype=torch.int32)
        ).tolist()
        if due or stop:
            self.save(tuner)
        if stop:
            raise self._signals.stop(f"at step {tuner.done:,} of {tuner.steps:,} of tuning")

    def save(self, tuner: Tuner) -> None:
        started = self._clock()
        states = self._team.gather(randomness())
        if self._team.is_main:
            state: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "tuner": tuner.state(), "randomness": states}
            with replacing(self.file) as temporary, temporary.open("wb") as file:
                torch.save(state, file)  # to a path it would not say that the disk is full
                file.flush()
                # torch does not check the sums of its own archives, and ignores what follows them
                file.write(sha256_of(temporary).encode())
        self._last = self._clock()
        self._cost = self._last - started
        self.seconds += self._cost
        self.count += 1

    def _due(self) -> bool:
        return self._clock() - self._last >= max(self._every_s, self._cost / _MOST)


def _is_intact(file: Path) -> bool:
    """Whether a file ends in the SHA-256 of what stands before."""
    digest, left = hashlib.sha256(), file.stat().st_size - _DIGITS
    with file.open("rb") as content:
        while left > 0 and (chunk := content.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        return content.read() == digest.hexdigest().encode()

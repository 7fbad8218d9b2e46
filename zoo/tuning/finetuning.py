"""One anchor tuned on the user's images: the tuner of supernets with a single network in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.settings import TuningSettings
from klas_zoo.tuning.tuner import Progress, Tuner


def finetune(
    name: str,
    chain: Chain,
    batches: Callable[[int], Iterator[Batch]],
    steps: int,
    settings: TuningSettings,
    *,
    unfinished: Path,
    checkpoint_s: float = 60.0,
    team: Team = ALONE,
    signals: Signals | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Tunes all weights of a chain, in place. Resumes from the last checkpoint in `unfinished`.

    Args:
        batches: from a number of steps that are done already, endless training batches.

    Raises:
        Interrupted: a signal came; a checkpoint has been written.
        SelectionError: the loss is not finite.
    """
    signals = signals or Signals()
    supernet = Supernet({name: chain}, [Route.anchor(name, chain.depth)])
    tuner = Tuner(supernet, steps, settings, team=team)
    checkpoints = Checkpoints(unfinished, every_s=checkpoint_s, seed=settings.seed, team=team, signals=signals)
    checkpoints.restore(tuner)
    stream = batches(tuner.batches_taken)
    with signals.patiently(), tuner.running():
        while tuner.done < steps:
            on_step(tuner.step(stream))
            checkpoints.after_step(tuner)
    tuner.finish()

"""What every process does that torchrun starts for test_team.py; the first one writes what came out."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toys import data_of, random_batches, token_chain

from klas_zoo.data.loading import Batch
from klas_zoo.data.order import in_order, shuffled
from klas_zoo.errors import KlasZooError
from klas_zoo.processes.team import Team, join, leave
from klas_zoo.routes import Route
from klas_zoo.selection.measuring import images_of, learn_probes
from klas_zoo.selection.probes import Probes, ProbeSettings, train_probes
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import TuningSettings
from klas_zoo.tuning.tuner import Tuner

STEPS = 8
SETTINGS = TuningSettings(
    steps=STEPS, epochs=1, batch=12, anchor_rate=1e-3, stitch_rate=1e-2, weight_decay=0.1, warmup=0.2,
    distillation=0.6, hard=False, clip=0.5, augmentation="light", init_images=8, precision="fp32", seed=3,
)  # fmt: skip
PROBING = ProbeSettings(epochs=3, batch=10)
WAYS: dict[str, dict[str, Any]] = {"plain": {}, "accumulated and averaged": {"accumulate": 3, "ema": 0.8}}
((IMAGES, LABELS),) = random_batches((50,))


def supernet() -> Supernet:
    chains = {"small": token_chain((5, 5, 5), seed=1), "large": token_chain((8, 8, 8, 8), seed=2)}
    torch.manual_seed(1)
    routes = [Route.anchor("small", 2), Route.anchor("large", 3), Route.stitch("small", 1, "large", 2, 3)]
    return Supernet(chains, routes).eval()


def pick(positions: list[int]) -> Batch:
    return IMAGES[positions], LABELS[positions]


def tuned(team: Team, settings: TuningSettings, folder: Path | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after tuning, and the loss of every step. With a folder, a process dies in the middle, once."""
    net, losses = supernet(), []
    tuner = Tuner(net, STEPS, settings, team=team)
    checkpoints = Checkpoints(folder or Path(), every_s=0 if folder else 1e9, team=team)
    if folder:
        checkpoints.restore(tuner)
    size = settings.batch // settings.accumulate
    order = shuffled(len(IMAGES), size, 5, True, tuner.batches_taken, team)
    stream = (pick([draw.position for draw in draws]) for draws in order)
    with tuner.running():
        while tuner.done < STEPS:
            losses.append(tuner.step(stream).last)
            if folder:
                if tuner.done == 5 and team.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), signal.SIGKILL)
                checkpoints.after_step(tuner)
    tuner.finish()
    return net.state_dict(), losses


def probed(team: Team) -> dict[str, Tensor]:
    epochs = [shuffled(len(IMAGES), 10, epoch, False, 0, team) for epoch in range(3)]
    streams = ((pick([draw.position for draw in draws]) for draws in order) for order in epochs)
    return _weights(train_probes(dict(supernet().chains.items()), streams, PROBING, team=team))


def probed_from_stored_features(team: Team) -> dict[str, Tensor]:
    """Every process computes features of whole batches of 7 by turns: 4 of them the first, 4 the second."""
    data = data_of([(IMAGES, LABELS)], random_batches())
    images = images_of(data, probing=PROBING, batch=7, init_images=8, seed=0, team=team)
    return _weights(learn_probes(dict(supernet().chains.items()), images, PROBING, team=team))


def _weights(probes: dict[str, Probes]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, one in probes.items() for key, value in one.state_dict().items()}


def evaluated(team: Team) -> list[float]:
    net = supernet()
    order = (pick([draw.position for draw in draws]) for draws in in_order(len(IMAGES), 7, team))
    return list(evaluate(net, net.routes, order, team=team).values())


def everything(team: Team) -> dict[str, Any]:
    ways = {name: tuned(team, replace(SETTINGS, **changes)) for name, changes in WAYS.items()}
    return {
        "tuned": ways, "probes": probed(team), "probes of stored features": probed_from_stored_features(team),
        "top1": evaluated(team),
    }  # fmt: skip


def restored(team: Team, folder: Path, having: set[int]) -> list[Any]:
    """What every process gets from a checkpoint that only some of them can see: whether it resumes, or an error."""
    mine = folder / f"seen by {team.rank}"
    if team.rank in having:
        Checkpoints(mine, every_s=0).save(Tuner(supernet(), STEPS, SETTINGS))
    tuner = Tuner(supernet(), STEPS, SETTINGS, team=team)
    try:
        found: Any = Checkpoints(mine, every_s=0, team=team).restore(tuner)
    except KlasZooError as error:
        found = str(error)
    return team.gather(found)


def main(out: Path, what: str) -> None:
    torch.set_num_threads(1)
    team = join("cpu")
    found: Any = everything(team) if what == "everything" else tuned(team, SETTINGS, out.parent / "checkpoints")
    if what == "everything":
        # another route on every process
        weights, _ = tuned(team, replace(SETTINGS, routes="each"))
        cases = {"all": {0, 1}, "the first": {0}, "the second": {1}}
        found["restored"] = {name: restored(team, out.parent / name, having) for name, having in cases.items()}
        found["each"] = team.gather({name: value.clone() for name, value in weights.items()})
    if team.is_main:
        torch.save(found, out)
    leave(team)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

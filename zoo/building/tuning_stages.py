"""The stages of a build up to the accuracy of every route; `klas_zoo.building.engine_stages` has those after them.

    (selection →)   initialise → evaluate untuned → tune → evaluate tuned
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from klas_zoo.building.cache import Json
from klas_zoo.building.ground import Ground
from klas_zoo.building.keeping import read_json, write_json, write_tensors
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.settings import plain
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.tuner import Progress, Tuner

Accuracies = dict[Route, float]


@dataclass(frozen=True)
class Stitched:
    """A supernet with its stitching layers fitted, and the share of variance each leaves unexplained, 0..1."""

    supernet: Supernet
    unexplained: dict[Seam, float]


class Initialise(Stage[Stitched]):
    """The supernet, its stitching layers fitted in closed form."""

    name = "initialise"

    def __init__(self, ground: Ground, selection: Outcome[Selection]) -> None:
        self.ground, self.selection = ground, selection

    def inputs(self) -> Json:
        settings = self.ground.settings
        return {
            "anchors": self.ground.anchors(),
            "images": self.ground.training_images(),
            "routes": self.selection.key,
            "init_images": settings.tuning.init_images,
            "batch": settings.batch,
        }

    def run(self, work: Work) -> Stitched:
        supernet, images = self._supernet(), self.ground.streams()
        with work.watch("initialise", images.fit_count, "images") as advance:
            left = initialise_stitches(supernet, images.fit(), on_batch=lambda n: advance(n, ""))
        return Stitched(supernet, left)

    def save(self, result: Stitched, folder: Path) -> None:
        write_tensors(result.supernet.stitches, folder / "stitches.safetensors")
        left = [[s.source, s.i, s.target, s.j, share] for s, share in result.unexplained.items()]
        write_json({"unexplained": left}, folder / "unexplained.json")

    def load(self, folder: Path) -> Stitched:
        supernet = self._supernet()
        supernet.stitches.load_state_dict(load_file(folder / "stitches.safetensors"))
        left = read_json(folder / "unexplained.json")["unexplained"]
        return Stitched(supernet, {Seam(s, i, t, j): share for s, i, t, j, share in left})

    def _supernet(self) -> Supernet:
        chains = self.ground.family.chains
        anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
        return Supernet(chains, [*anchors, *self.selection.value.routes]).to(self.ground.device.torch_device)


class Tune(Stage[Supernet]):
    """Anchors and stitching layers tuned together, in place. Goes on from the last checkpoint.

    The result is `supernet.safetensors`, every tensor by its name in the supernet.
    """

    name = "tune"
    version = 2  # 1: AdamW one operation after another, which rounds differently
    together = True

    def __init__(self, ground: Ground, stitched: Outcome[Stitched]) -> None:
        self.ground, self.stitched = ground, stitched
        self.steps = ground.settings.tuning.total_steps(len(ground.data.train))

    def inputs(self) -> Json:
        ground, settings = self.ground, self.ground.settings.tuning
        return {
            "initialised": self.stitched.key,
            "images": ground.training_images(),
            "settings": plain(settings),
            "steps": self.steps,
            # with one route for all a team takes the steps that one process would
            "processes": ground.team.size if settings.routes == "each" else 1,
        }

    def run(self, work: Work) -> Supernet:
        ground, settings = self.ground, self.ground.settings.tuning
        supernet = self.stitched.value.supernet
        if self.steps == 0:
            return supernet
        tuner = Tuner(supernet, self.steps, settings, team=work.team)
        checkpoints = Checkpoints(
            work.unfinished, every_s=ground.settings.checkpoint_s, seed=ground.settings.seed, team=work.team,
            signals=ground.signals,
        )  # fmt: skip
        if checkpoints.restore(tuner):
            work.listener.say(f"Going on with tuning from step {tuner.done:,} of {self.steps:,}.")
        stream = ground.batches(
            ground.data.augmented, settings.batch // settings.accumulate, shuffle_seed=ground.settings.seed,
            forever=True, start=tuner.done * settings.accumulate,
        )  # fmt: skip
        with work.watch("tune", self.steps * settings.batch, "images") as advance:
            advance(tuner.done * settings.batch, "skipped")
            with ground.signals.patiently(), tuner.running():
                while tuner.done < self.steps:
                    progress = tuner.step(stream)
                    advance(progress.images, f"loss {progress.loss:.3f}")
                    work.listener.scalars(progress.step, _scalars(progress))
                    if tuner.done < self.steps:
                        checkpoints.after_step(tuner)
        tuner.finish()
        work.notes["checkpoints"] = {"count": checkpoints.count, "seconds": round(checkpoints.seconds, 3)}
        return supernet

    def save(self, result: Supernet, folder: Path) -> None:
        write_tensors(result, folder / "supernet.safetensors")

    def load(self, folder: Path) -> Supernet:
        supernet = self.stitched.value.supernet
        supernet.load_state_dict(load_file(folder / "supernet.safetensors"))
        return supernet.eval()


class Evaluate(Stage[Accuracies]):
    """Top-1 of every route, in per cent."""

    together = True

    def __init__(self, name: str, ground: Ground, weights: Outcome[Stitched] | Outcome[Supernet]) -> None:
        self.name, self.ground, self.weights = name, ground, weights

    def inputs(self) -> Json:
        return {
            "weights": self.weights.key,
            "images": self.ground.images(self.ground.data.test_fingerprint),
            "batch": self.ground.settings.batch,
        }

    def run(self, work: Work) -> Accuracies:
        weights, test = self.weights.value, self.ground.data.test
        supernet = weights.supernet if isinstance(weights, Stitched) else weights
        with work.watch(self.name, len(test), "images") as advance:
            stream = self.ground.batches(test)
            return evaluate(
                supernet, supernet.routes, stream, team=work.team,
                on_batch=lambda n: advance(min(n * work.team.size, len(test)), ""),
            )  # fmt: skip

    def save(self, result: Accuracies, folder: Path) -> None:
        write_json({"top1": [[route.to_json(), top1] for route, top1 in result.items()]}, folder / "top1.json")

    def load(self, folder: Path) -> Accuracies:
        return {Route.from_json(route): top1 for route, top1 in read_json(folder / "top1.json")["top1"]}


def _scalars(progress: Progress) -> dict[str, float]:
    return {"loss": progress.last, "rate": progress.rate}

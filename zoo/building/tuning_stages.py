"""The stages of a build up to the accuracy of every route; `klas_zoo.building.engine_stages` has those after them.

    (selection →)   initialise → evaluate untuned → tune → evaluate tuned

A family that comes with a tuned supernet goes straight to its last stage, see `klas_zoo.building.shipped_stages`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from klas_zoo.building.cache import Json, registered_packages
from klas_zoo.building.context import BuildContext
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.settings import plain
from klas_zoo.chains import Chain
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.stored_supernet import read_supernet
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.registry import Registry
from klas_zoo.registry.packages import is_intact, package_folder
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection
from klas_zoo.supernet import Supernet
from klas_zoo.tensors import write_tensors
from klas_zoo.tuning.anchors import keep_better_anchors
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.tuner import Progress, Tuner

Accuracies = dict[Route, float]
SUPERNET = "supernet.safetensors"


@dataclass(frozen=True)
class Stitched:
    """A supernet with its stitching layers fitted, and the share of variance each leaves unexplained, 0..1."""

    supernet: Supernet
    unexplained: dict[Seam, float]


class Initialise(Stage[Stitched]):
    """The supernet, its stitching layers fitted in closed form."""

    name = "initialise"

    def __init__(self, context: BuildContext, selection: Outcome[Selection]) -> None:
        self.context, self.selection = context, selection

    def inputs(self) -> Json:
        settings = self.context.settings
        return {
            "anchors": self.context.anchors(),
            "images": self.context.training_images(),
            "routes": self.selection.key,
            "init_images": settings.tuning.init_images,
            "batch": settings.batch,
        }

    def run(self, work: Work) -> Stitched:
        supernet, images = self._supernet(), self.context.streams()
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
        # tuning changes the supernet: the family stays what its fingerprint, part of every key, was computed from
        chains = copy.deepcopy(self.context.family.chains)
        anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
        return Supernet(chains, [*anchors, *self.selection.value.routes]).to(self.context.device.torch_device)


class Tune(Stage[Supernet]):
    """Anchors and stitching layers tuned together, in place. Resumes from the last checkpoint.

    The result is `supernet.safetensors`, every tensor by its name in the supernet.
    """

    name = "tune"
    # 1: AdamW one operation after another, which rounds differently; 2: anchors that tuning made worse stayed so
    version = 3
    together = True

    def __init__(self, context: BuildContext, stitched: Outcome[Stitched], registry: Registry) -> None:
        self.context, self.stitched, self.registry = context, stitched, registry
        self.steps = context.settings.tuning.total_steps(len(context.data.train))

    def inputs(self) -> Json:
        context, settings = self.context, self.context.settings.tuning
        return {
            "initialised": self.stitched.key,
            "images": context.training_images(),
            "settings": plain(settings),
            "steps": self.steps,
            # with one route for all a team takes the steps that one process would
            "processes": context.team.size if settings.routes == "each" else 1,
        }

    def run(self, work: Work) -> Supernet:
        context, settings = self.context, self.context.settings.tuning
        supernet = self.stitched.value.supernet
        if self.steps == 0:
            return supernet
        tuner = Tuner(supernet, self.steps, settings, team=work.team)
        checkpoints = Checkpoints(
            work.unfinished, every_s=context.settings.checkpoint_s, seed=context.settings.seed, team=work.team,
            signals=context.signals,
        )  # fmt: skip
        if checkpoints.restore(tuner):
            work.listener.say(f"Tuning resumes at step {tuner.done:,} of {self.steps:,}.")
        stream = context.batches(
            context.data.augmented, settings.batch // settings.accumulate, shuffle_seed=context.settings.seed,
            forever=True, start=tuner.batches_taken,
        )  # fmt: skip
        with work.watch("tune", self.steps * settings.batch, "images") as advance:
            advance(tuner.done * settings.batch, "skipped")
            with context.signals.patiently(), tuner.running():
                while tuner.done < self.steps:
                    progress = tuner.step(stream)
                    advance(progress.images, f"loss {progress.loss:.3f}")
                    work.listener.scalars(progress.step, _scalars(progress))
                    checkpoints.after_step(tuner)
        tuner.finish()
        if settings.anchors == "tuned":
            work.notes["anchors"] = self._keep_better_anchors(supernet, work)
        work.notes["checkpoints"] = {"count": checkpoints.count, "seconds": round(checkpoints.seconds, 3)}
        return supernet

    def _keep_better_anchors(self, supernet: Supernet, work: Work) -> Json:
        """Measured on held-out training images; what reports accuracy decides nothing."""
        heldout = self.context.batches(self.context.data.heldout)
        found = keep_better_anchors(supernet, self.context.family.chains, heldout, team=work.team)
        worse = [name for name, choice in found.items() if not choice.keeps_tuned]
        if worse:
            work.listener.say(
                f"Tuning made {', '.join(worse)} less accurate on held-out images: kept with the weights from before."
            )
        return {name: {"before": one.before, "after": one.after} for name, one in found.items()}

    def save(self, result: Supernet, folder: Path) -> None:
        write_tensors(result, folder / SUPERNET)

    def load(self, folder: Path) -> Supernet:
        registered = self._registered(folder)
        if registered is None:
            state = load_file(folder / SUPERNET)
        else:
            state = read_supernet(Package.open(registered[0], content=False))
        chains, routes = self._parts()
        supernet = Supernet.of_state(chains, routes, state).to(self.context.device.torch_device)
        supernet.load_state_dict(state)
        return supernet.eval()

    def _parts(self) -> tuple[dict[str, Chain], tuple[Route, ...]]:
        """Chains to load weights into, and the routes of the supernet."""
        supernet = self.stitched.value.supernet
        return {name: supernet.chain(name) for name in self.context.family.chains}, supernet.routes

    def holds(self, folder: Path) -> bool:
        registered = self._registered(folder)
        if registered is None:
            return (folder / SUPERNET).is_file()
        # graphs hold no weights
        return is_intact(*registered, content=lambda name: not name.endswith(".onnx"))

    def _registered(self, folder: Path) -> tuple[Path, str] | None:
        """The registry's fp32 package with its digest, where it holds the weights instead of the cache."""
        digest = registered_packages(folder).get("fp32")
        return (package_folder(self.registry.root, digest), digest) if digest else None


class Evaluate(Stage[Accuracies]):
    """Top-1 of every route, in per cent."""

    together = True

    def __init__(self, name: str, context: BuildContext, weights: Outcome[Stitched] | Outcome[Supernet]) -> None:
        self.name, self.context, self.weights = name, context, weights

    def inputs(self) -> Json:
        return {
            "weights": self.weights.key,
            "images": self.context.images(self.context.data.test_fingerprint),
            "batch": self.context.settings.batch,
        }

    def run(self, work: Work) -> Accuracies:
        weights, test = self.weights.value, self.context.data.test
        supernet = weights.supernet if isinstance(weights, Stitched) else weights
        with work.watch(self.name, len(test), "images") as advance:
            stream = self.context.batches(test)
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

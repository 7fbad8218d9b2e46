"""The stages of a build up to the accuracy of every route; `klas_zoo.building.engine_stages` has those after it.

    probes → similarity → selection → initialise → evaluate untuned → tune → evaluate tuned

What they do lies in modules of their own. Here stands what determines each one's result, and how
the result is kept: numbers as JSON, weights as safetensors.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klas_zoo.building.cache import Json, content_key
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.settings import BuildSettings, plain
from klas_zoo.costs.counting import part_costs
from klas_zoo.costs.predicted import PredictedCosts
from klas_zoo.data.loading import Batch, Data, Split, batches
from klas_zoo.families.anchors import Family
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.macs import Cost as RouteCost
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection, select
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.measurements import Measurements, Need
from klas_zoo.selection.measuring import Images, learn_probes, measure
from klas_zoo.selection.probes import Probes
from klas_zoo.selection.streams import images_of
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.tuner import Progress, Tuner
from klas_zoo.versions import versions_of

Accuracies = dict[Route, float]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all stages stand on: anchors, images, settings and where they are computed."""

    family: Family
    data: Data
    settings: BuildSettings
    device: Device
    cost_of: Callable[[Route], RouteCost]
    team: Team = ALONE
    signals: Signals
    costs: PredictedCosts | None = None

    def price(self, route: Route) -> float:
        """What the frontier is drawn over: predicted milliseconds where there are any, else multiply-adds."""
        return self.costs(route) if self.costs else self.macs(route)

    def macs(self, route: Route) -> float:
        return self.cost_of(route).macs

    def anchors(self) -> Json:
        """What determines the anchors and everything computed with them."""
        return {
            "weights": self.family.fingerprint,
            "architecture": self.family.architecture,
            "computed": self.device.torch_device,
            "versions": versions_of("torch", "timm"),
        }

    def images(self, fingerprint: str) -> Json:
        """What determines images as tensors."""
        config = {key: plain(value) for key, value in self.family.data_config.items()}
        versions = versions_of("torchvision", "pillow", "numpy")
        return {"fingerprint": fingerprint, "config": config, "versions": versions}

    def training_images(self) -> Json:
        return {**self.images(self.data.train_fingerprint), "seed": self.settings.seed}

    def streams(self) -> Images:
        return images_of(
            self.data, probing=self.settings.probes, batch=self.settings.batch,
            init_images=self.settings.tuning.init_images, seed=self.settings.seed,
            device=self.device.torch_device, workers=self.settings.workers, team=self.team,
        )  # fmt: skip

    def batches(self, split: Split, size: int | None = None, **options: Any) -> Iterator[Batch]:
        return batches(
            split, size or self.settings.batch, device=self.device.torch_device, workers=self.settings.workers,
            team=self.team, **options,
        )  # fmt: skip


class LearnProbes(Stage[dict[str, Probes]]):
    """One linear probe on every block of every anchor."""

    name = "probes"
    together = True

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    def inputs(self) -> Json:
        ground = self.ground
        return {
            "anchors": ground.anchors(),
            "images": ground.training_images(),
            "settings": plain(ground.settings.probes),
        }

    def run(self, work: Work) -> dict[str, Probes]:
        ground = self.ground
        return learn_probes(
            ground.family.chains, ground.streams(), ground.settings.probes, stage=work.watch, team=work.team
        )

    def save(self, result: dict[str, Probes], folder: Path) -> None:
        for name, probes in result.items():
            _write_tensors(probes, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> dict[str, Probes]:
        found = {}
        for name, chain in self.ground.family.chains.items():
            found[name] = Probes(chain).to(self.ground.device.torch_device).eval()
            found[name].load_state_dict(load_file(folder / f"{name}.safetensors"))
        return found


class Measure(Stage[Measurements]):
    """What the selector asks for, besides latency."""

    name = "similarity"

    def __init__(self, ground: Ground, needs: frozenset[Need], probes: Outcome[dict[str, Probes]] | None) -> None:
        self.ground, self.needs, self.probes = ground, needs, probes

    def inputs(self) -> Json:
        ground, settings = self.ground, self.ground.settings
        return {
            "anchors": ground.anchors(),
            "images": ground.training_images(),
            "probes": self.probes.key if self.probes else None,
            "needs": sorted(self.needs),
            "pairs": plain(settings.selection.pairs),
            "batch": settings.batch,
            "init_images": settings.tuning.init_images if self.needs & {"residual", "accuracy", "output_kl"} else None,
        }

    def run(self, work: Work) -> Measurements:
        ground, settings = self.ground, self.ground.settings
        return measure(
            ground.family.chains, self.needs, ground.streams(), ground.macs, settings.selection,
            probing=settings.probes, probes=self.probes.value if self.probes else None, stage=work.watch,
            warn=work.listener.say,
        )  # fmt: skip

    def save(self, result: Measurements, folder: Path) -> None:
        write_json(result.to_json(), folder / "measurements.json")

    def load(self, folder: Path) -> Measurements:
        return Measurements.from_json(read_json(folder / "measurements.json"))


class Select(Stage[Selection]):
    """Which stitches are built. Runs no network; those after it depend on the choice, not on its reasons."""

    name = "selection"
    instant = True

    def __init__(
        self, ground: Ground, measured: Outcome[Measurements], anchors_ms: Outcome[dict[str, float]] | None
    ) -> None:
        self.ground, self.measured, self.anchors_ms = ground, measured, anchors_ms

    def inputs(self) -> Json:
        return {}

    def run(self, work: Work) -> Selection:
        ground, measured, unit = self.ground, self.measured.value, "multiply-adds"
        cost: Callable[[Route], float] = ground.macs
        if self.anchors_ms is not None:
            measured, unit = replace(measured, latency_ms=self.anchors_ms.value), "ms"
            cost = ground.costs or latency_cost(part_costs(ground.family), self.anchors_ms.value, ground.macs)
        found = select(ground.family.chains, measured, cost, ground.settings.selection, unit=unit)
        for sentence in found.remarks():
            work.listener.say(sentence)
        return found

    def identity(self, result: Selection, key: str) -> str:
        return content_key({"routes": [route.to_json() for route in result.routes]})


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
        _write_tensors(result.supernet.stitches, folder / "stitches.safetensors")
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
        _write_tensors(result, folder / "supernet.safetensors")

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


def _write_tensors(module: nn.Module, file: Path) -> None:
    tensors: dict[str, Tensor] = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        # it tells of the disk in words only
        full = "No space left" in str(error) or "StorageFull" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from error


def write_json(value: Json, file: Path) -> None:
    file.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))

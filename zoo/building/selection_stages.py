"""The stages of a build that choose routes; `klas_zoo.building.tuning_stages` has those after them.

    probes → similarity → selection

What stages do lies in modules of their own. These state what determines each one's result, and how the
result is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from klas_zoo.building.cache import Json, content_key
from klas_zoo.building.context import BuildContext
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.settings import plain
from klas_zoo.profiles.macs import part_costs
from klas_zoo.routes import Route
from klas_zoo.selection import Selection, select
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.measurements import SEAM_NEEDS, Measurements, Need
from klas_zoo.selection.measuring import learn_probes, measure
from klas_zoo.selection.probes import Probes
from klas_zoo.tensors import write_tensors


class LearnProbes(Stage[dict[str, Probes]]):
    """One linear probe on every block of every anchor."""

    name = "probes"
    together = True

    def __init__(self, context: BuildContext) -> None:
        self.context = context

    def inputs(self) -> Json:
        context = self.context
        return {
            "anchors": context.anchors(),
            "images": context.training_images(),
            "settings": plain(context.settings.probes),
        }

    def run(self, work: Work) -> dict[str, Probes]:
        context = self.context
        return learn_probes(
            context.family.chains, context.streams(), context.settings.probes, stage=work.watch, team=work.team
        )

    def save(self, result: dict[str, Probes], folder: Path) -> None:
        for name, probes in result.items():
            write_tensors(probes, folder / f"{name}.safetensors")

    def load(self, folder: Path) -> dict[str, Probes]:
        found = {}
        for name, chain in self.context.family.chains.items():
            found[name] = Probes(chain).to(self.context.device.torch_device).eval()
            found[name].load_state_dict(load_file(folder / f"{name}.safetensors"))
        return found


class Measure(Stage[Measurements]):
    """What the selector asks for, besides latency."""

    name = "similarity"

    def __init__(
        self, context: BuildContext, needs: frozenset[Need], probes: Outcome[dict[str, Probes]] | None
    ) -> None:
        self.context, self.needs, self.probes = context, needs, probes

    def inputs(self) -> Json:
        context, settings = self.context, self.context.settings
        return {
            "anchors": context.anchors(),
            "images": context.training_images(),
            "probes": self.probes.key if self.probes else None,
            "needs": sorted(self.needs),
            "pairs": plain(settings.selection.pairs),
            "direction": settings.selection.direction if self.needs & SEAM_NEEDS else None,
            "batch": settings.batch,
            "init_images": settings.tuning.init_images if self.needs & {"residual", "accuracy", "output_kl"} else None,
        }

    def run(self, work: Work) -> Measurements:
        context, settings = self.context, self.context.settings
        return measure(
            context.family.chains, self.needs, context.streams(), context.macs, settings.selection,
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
        self, context: BuildContext, measured: Outcome[Measurements], anchors_ms: Outcome[dict[str, float]] | None
    ) -> None:
        self.context, self.measured, self.anchors_ms = context, measured, anchors_ms

    def inputs(self) -> Json:
        return {}

    def run(self, work: Work) -> Selection:
        context, measured, unit = self.context, self.measured.value, "multiply-adds"
        cost: Callable[[Route], float] = context.macs
        if self.anchors_ms is not None:
            measured, unit = replace(measured, latency_ms=self.anchors_ms.value), "ms"
            cost = context.costs or latency_cost(part_costs(context.family), self.anchors_ms.value, context.macs)
        found = select(context.family.chains, measured, cost, context.settings.selection, unit=unit)
        for sentence in found.remarks():
            work.listener.say(sentence)
        return found

    def identity(self, result: Selection, key: str) -> str:
        return content_key({"routes": [route.to_json() for route in result.routes]})

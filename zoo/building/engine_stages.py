"""The stages of a build that make engines; `klas_zoo.building.registry_stages` has those after them.

    (time anchors →)   evaluate tuned → export → latency
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from klas_zoo.building.cache import Json, content_key
from klas_zoo.building.engines import EngineMaker, RouteResult, time_anchors, time_engine
from klas_zoo.building.ground import Ground
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.tuning_stages import Accuracies
from klas_zoo.costs.counting import part_costs
from klas_zoo.data.loading import batches
from klas_zoo.frontier import frontier
from klas_zoo.progress.listeners import Listener
from klas_zoo.registry import Registry
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.supernet import Supernet
from klas_zoo.versions import versions_of

Results = list[RouteResult]


class TimeAnchors(Stage[dict[str, float]]):
    """Median ms of every whole anchor as an engine, for selectors that go by latency."""

    name = "time anchors"

    def __init__(self, ground: Ground, registry: Registry) -> None:
        self.ground, self.registry = ground, registry

    def inputs(self) -> Json:
        settings = self.ground.settings
        batch = settings.latency_batches[0]
        return {"anchors": self.ground.anchors(), "batch": batch, **_timed_on(self.ground)}

    def run(self, work: Work) -> dict[str, float]:
        ground, settings = self.ground, self.ground.settings
        chains = ground.family.chains
        with (
            _alone(self.registry, work.listener),
            work.watch(self.name, len(chains), "engines") as advance,
        ):
            found = time_anchors(
                ground.family, ground.device, batch=settings.latency_batches[0], threads=settings.threads,
                on_anchor=lambda name: advance(1, name),
            )  # fmt: skip
        # refuses before any time is spent on probes
        cost = latency_cost(part_costs(ground.family), found, ground.macs)
        stitchable_pairs(chains, cost, settings.selection, unit="ms")
        return found

    def save(self, result: dict[str, float], folder: Path) -> None:
        write_json(result, folder / "anchors_ms.json")

    def load(self, folder: Path) -> dict[str, float]:
        found: dict[str, float] = read_json(folder / "anchors_ms.json")
        return found


class PredictAnchors(Stage[dict[str, float]]):
    """The same from a profile of the device, or from its roofline."""

    name = "predict anchors"
    instant = True

    def __init__(self, ground: Ground) -> None:
        self.ground = ground

    def inputs(self) -> Json:
        return {"costs": self.ground.costs.key() if self.ground.costs else None}

    def run(self, work: Work) -> dict[str, float]:
        assert self.ground.costs is not None
        stitchable_pairs(self.ground.family.chains, self.ground.costs, self.ground.settings.selection, unit="ms")
        return self.ground.costs.anchors_ms()


class Judge(Stage[Results]):
    """What each route costs and is worth, and which lie on the frontier."""

    name = "frontier"
    instant = True

    def __init__(self, ground: Ground, before: Outcome[Accuracies], after: Outcome[Accuracies]) -> None:
        self.ground, self.before, self.after = ground, before, after

    def inputs(self) -> Json:
        return {}

    def run(self, work: Work) -> Results:
        ground, before, after = self.ground, self.before.value, self.after.value
        best = frontier(list(after), ground.price, lambda route: after[route])
        costs = ground.costs
        return [
            RouteResult(
                route=r, cost=ground.cost_of(r), top1_before=before[r], top1=after[r], on_frontier=r in best,
                predicted_ms=costs(r) if costs else None, predicted_by=costs.origin(r) if costs else "",
            )
            for r in sorted(after, key=ground.macs)
        ]  # fmt: skip

    def identity(self, result: Results, key: str) -> str:
        return content_key({"routes": [one.to_json() for one in result]})


class _Kept(Stage[Results]):
    """A stage whose results lie in its folder as `routes.json`."""

    def save(self, result: Results, folder: Path) -> None:
        write_json({"routes": [one.to_json() for one in result]}, folder / "routes.json")

    def load(self, folder: Path) -> Results:
        return [RouteResult.from_json(one) for one in read_json(folder / "routes.json")["routes"]]


class Export(_Kept):
    """Engines of the frontier and of the anchors, each compared with its route on the test images.

    They lie in the stage's folder as `<route>.onnx`; a rejected route has none.
    """

    name = "export and verify"

    def __init__(self, ground: Ground, tuned: Outcome[Supernet], judged: Outcome[Results]) -> None:
        self.ground, self.tuned, self.judged = ground, tuned, judged

    def inputs(self) -> Json:
        ground = self.ground
        return {
            "weights": self.tuned.key,
            "routes": self.judged.key,
            "family": [ground.family.name, ground.family.weights],
            "images": ground.images(ground.data.test_fingerprint),
            "batch": ground.settings.batch,
            "provider": ground.device.provider,
            "threads": ground.settings.threads,
            "versions": versions_of("onnx", "onnxscript", "onnxruntime-gpu"),
        }

    def run(self, work: Work) -> Results:
        ground = self.ground
        results = {one.route: one for one in self.judged.value}
        wanted = [one for one in results.values() if one.wanted]
        with work.watch(self.name, len(wanted), "engines") as advance:
            maker = EngineMaker(self.tuned.value.cpu(), ground.family, ground.device, ground.settings.threads)
            for one in wanted:
                images = batches(ground.data.test, ground.settings.batch)
                results[one.route], _ = maker.make(one, images, work.folder)
                advance(1, str(one.route))
        return list(results.values())

    def holds(self, folder: Path) -> bool:
        return all((folder / file_name(one)).is_file() for one in self.load(folder) if has_engine(one))


class Time(_Kept):
    """Latency of every engine at every batch size, one engine at a time."""

    name = "latency"

    def __init__(self, ground: Ground, exported: Outcome[Results], registry: Registry) -> None:
        self.ground, self.exported, self.registry = ground, exported, registry

    def inputs(self) -> Json:
        batch_sizes = self.ground.settings.latency_batches
        return {"engines": self.exported.key, "batches": list(batch_sizes), **_timed_on(self.ground)}

    def run(self, work: Work) -> Results:
        ground, settings = self.ground, self.ground.settings
        results = {one.route: one for one in self.exported.value}
        engines = [one for one in results.values() if has_engine(one)]
        if not ground.device.here:
            name = ground.device.name
            work.listener.say(f"Nothing is timed: {name} is not here. A profile of it fills latencies in.")
            return list(results.values())
        with (
            _alone(self.registry, work.listener),
            work.watch(self.name, len(engines), "engines") as advance,
        ):
            for one in engines:
                timed = time_engine(
                    self.exported.folder / file_name(one), ground.family, ground.device,
                    batch_sizes=settings.latency_batches, threads=settings.threads,
                )  # fmt: skip
                results[one.route] = replace(one, latencies=timed)
                advance(1, str(one.route))
        return list(results.values())


def _timed_on(ground: Ground) -> dict[str, Any]:
    """What determines a latency, besides the engine."""
    return {
        "hardware": ground.device.hardware,
        "provider": ground.device.provider,
        "threads": ground.settings.threads,
        "versions": versions_of("onnxruntime-gpu"),
    }


def _alone(registry: Registry, listener: Listener) -> AbstractContextManager[None]:
    """Two builds that time engines at once would measure each other."""
    waiting = f"Another build is timing engines for {registry.root}; waiting for it."
    return registry.writing(lambda: listener.say(waiting))


def has_engine(result: RouteResult) -> bool:
    return result.wanted and not result.rejected


def file_name(result: RouteResult) -> str:
    return f"{result.route}.onnx"

"""The stages of a build that make engines; `klas_zoo.building.registry_stages` has those after them.

    (time anchors →)   evaluate tuned → export → latency
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from klas_zoo.building.cache import Json, content_key, read_note, registered_packages
from klas_zoo.building.context import BuildContext
from klas_zoo.building.engines import EngineResult, RouteResult, is_verified, time_anchors
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.packaging import export_packages
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.tuning_stages import Accuracies
from klas_zoo.errors import ExportError
from klas_zoo.exporters.limits import limits_for
from klas_zoo.frontier import frontier
from klas_zoo.profiles.latency import measure_engine
from klas_zoo.profiles.macs import part_costs
from klas_zoo.progress.listeners import Advance, Listener
from klas_zoo.registry import Registry
from klas_zoo.registry.packages import MANIFEST, digest_of, is_intact, package_folder
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.supernet import Supernet
from klas_zoo.versions import versions_of

Results = list[RouteResult]


class TimeAnchors(Stage[dict[str, float]]):
    """Median ms of every whole anchor as an engine, for selectors that go by latency."""

    name = "time anchors"

    def __init__(self, context: BuildContext, registry: Registry) -> None:
        self.context, self.registry = context, registry

    def inputs(self) -> Json:
        settings = self.context.settings
        batch = settings.latency_batches[0]
        return {"anchors": self.context.anchors(), "batch": batch, **timed_on(self.context)}

    def run(self, work: Work) -> dict[str, float]:
        context, settings = self.context, self.context.settings
        chains = context.family.chains
        with (
            alone(self.registry, work.listener),
            work.watch(self.name, len(chains), "engines") as advance,
        ):
            found = time_anchors(
                context.family, context.device, batch=settings.latency_batches[0], threads=settings.threads,
                on_anchor=lambda name: advance(1, name),
            )  # fmt: skip
        # refuses before any time is spent on probes
        cost = latency_cost(part_costs(context.family), found, context.macs)
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

    def __init__(self, context: BuildContext) -> None:
        self.context = context

    def inputs(self) -> Json:
        return {"costs": self.context.costs.key() if self.context.costs else None}

    def run(self, work: Work) -> dict[str, float]:
        assert self.context.costs is not None
        stitchable_pairs(self.context.family.chains, self.context.costs, self.context.settings.selection, unit="ms")
        return self.context.costs.anchors_ms()


class FrontierStage(Stage[Results]):
    """What each route costs and is worth, and which lie on the frontier."""

    name = "frontier"
    instant = True

    def __init__(self, context: BuildContext, before: Outcome[Accuracies], after: Outcome[Accuracies]) -> None:
        self.context, self.before, self.after = context, before, after

    def inputs(self) -> Json:
        return {}

    def run(self, work: Work) -> Results:
        context, before, after = self.context, self.before.value, self.after.value
        best = frontier(list(after), context.price, lambda route: after[route])
        costs = context.costs
        return [
            RouteResult(
                route=r, cost=context.cost_of(r), top1_before=before[r], top1=after[r], on_frontier=r in best,
                predicted_ms=costs(r) if costs else None, predicted_by=costs.origin(r) if costs else "",
            )
            for r in sorted(after, key=context.macs)
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

    They are in the stage's folder as one package for each precision. When they are registered, the registry's
    copy is the only one, and what is noted here has its digests.
    """

    name = "export and verify"
    version = 3  # 1: one fp32 file for each route; 2: fp16 as a CPU computes it

    def __init__(
        self, context: BuildContext, tuned: Outcome[Supernet], judged: Outcome[Results], registry: Registry
    ) -> None:
        self.context, self.tuned, self.judged, self.registry = context, tuned, judged, registry

    def inputs(self) -> Json:
        context = self.context
        return {
            "weights": self.tuned.key,
            "routes": self.judged.key,
            "family": [context.family.name, context.family.weights],
            "images": context.images(context.data.test_fingerprint),
            "batch": context.settings.batch,
            "provider": context.device.provider,
            "threads": context.settings.threads,
            "precisions": list(context.precisions),
            "runtimes": list(context.runtimes),
            "opset": context.opset,
            "weight_bits": context.weight_bits,
            "limits": [asdict(limits_for(one, context.family.weights)) for one in context.precisions],
            "versions": versions_of("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
        }

    def run(self, work: Work) -> Results:
        results = self.judged.value
        wanted = sum(one.wanted for one in results)
        count = wanted * len(self.context.precisions)
        with work.watch(self.name, count, "engines") as advance:
            made = export_packages(
                self.context, self.tuned.value, results, work.folder, on_engine=lambda name: advance(1, name)
            )
        return [replace(one, engines=made.get(one.route, ())) for one in results]

    def holds(self, folder: Path) -> bool:
        registered = registered_packages(folder)
        needed = {(engine.package, engine.file) for one in self.load(folder) for engine in one.engines if engine.exists}
        if not all((packaged(folder, name, self.registry).folder / file).is_file() for name, file in needed):
            return False
        # what lies in the cache itself was hashed before
        return all(is_intact(package_folder(self.registry.root, digest), digest) for digest in registered.values())


@dataclass(frozen=True, kw_only=True)
class StagePackage:
    """A package that `Export` left: its folder, and the SHA-256 of its manifest when it was written there."""

    folder: Path
    digest: str

    def check(self) -> None:
        """
        Raises:
            ExportError: the manifest is not the one that was written, which names all other files by their SHA-256.
        """
        try:
            same = digest_of(self.folder) == self.digest
        except OSError:
            same = False
        if not same:
            raise ExportError(f"The package {self.folder} was changed after it was verified: run the build again.")


def packaged(folder: Path, name: str, registry: Registry) -> StagePackage:
    """A package that `Export` left in its own folder: there, or in the registry once it was registered."""
    note = read_note(folder) or {}
    if digest := note.get("registered", {}).get(name):
        return StagePackage(folder=package_folder(registry.root, digest), digest=digest)
    digest = note.get("files", {}).get(f"{name}/{MANIFEST}", {}).get("sha256", "")
    return StagePackage(folder=folder / name, digest=digest)


class Time(_Kept):
    """Latency of every verified engine at every batch size, one engine at a time."""

    name = "latency"
    version = 2  # 1: one engine for each route

    def __init__(self, context: BuildContext, exported: Outcome[Results], registry: Registry) -> None:
        self.context, self.exported, self.registry = context, exported, registry

    def inputs(self) -> Json:
        batch_sizes = self.context.settings.latency_batches
        return {"engines": self.exported.key, "batches": list(batch_sizes), **timed_on(self.context)}

    def run(self, work: Work) -> Results:
        context, results = self.context, self.exported.value
        if not context.device.here:
            name = context.device.name
            work.listener.say(f"Nothing is timed: {name} is not on this machine. A profile of it adds latencies.")
            return results
        count = sum(is_verified(engine) for one in results for engine in one.engines)
        with (
            alone(self.registry, work.listener),
            work.watch(self.name, count, "engines") as advance,
        ):
            return [
                replace(one, engines=tuple(self._timed(engine, one, advance) for engine in one.engines))
                for one in results
            ]

    def _timed(self, engine: EngineResult, result: RouteResult, advance: Advance) -> EngineResult:
        if not is_verified(engine):
            return engine
        context, settings = self.context, self.context.settings
        file = packaged(self.exported.folder, engine.package, self.registry).folder / engine.file
        latencies = tuple(
            measure_engine(
                file, runtime=engine.runtime, precision=engine.precision, device=context.device,
                input_shape=context.family.input_shape, batch=batch, threads=settings.threads,
            )
            for batch in settings.latency_batches
        )  # fmt: skip
        advance(1, f"{result.route} {engine.precision}")
        return replace(engine, latencies=latencies)


def timed_on(context: BuildContext) -> dict[str, Any]:
    """What determines a latency, besides the engine."""
    return {
        "hardware": context.device.hardware,
        "provider": context.device.provider,
        "threads": context.settings.threads,
        "versions": versions_of("onnxruntime", "onnxruntime-gpu"),
    }


def alone(registry: Registry, listener: Listener) -> AbstractContextManager[None]:
    """Two builds that time engines at once would measure each other."""
    waiting = f"Another build is timing engines for {registry.root}; waiting for it."
    return registry.writing(lambda: listener.say(waiting))

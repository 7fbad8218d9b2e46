"""The stage of a build that fits cascades of its engines: on held-out images, judged on all test images, timed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path

import numpy as np

from klas_zoo.building.cache import Json
from klas_zoo.building.context import BuildContext
from klas_zoo.building.engine_stages import Results, alone, packaged, timed_on
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.cascades.fitting import FittedCascade, images_needed, outcome
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.cascades.search import SearchSettings
from klas_zoo.data.loading import Split, batches
from klas_zoo.errors import VerificationError
from klas_zoo.exporters.cascade_fitting import find_cascades, outputs_of, time_paths, verify_cascade
from klas_zoo.exporters.cascade_fitting import packaged as packaged_cascade
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade, PackagedCascades, cascades_text, parse_cascades
from klas_zoo.profiles.latency import provider_on
from klas_zoo.progress.listeners import Advance
from klas_zoo.registry import Registry
from klas_zoo.registry.records import VERIFIED

Cascades = Mapping[str, PackagedCascades]
"""By the name of the package."""
_MOST_HELDOUT = 2_000
_MOST_ROUTES = 16
"""That cascades are made of, besides anchors: triples grow with the third power of it."""
_MOST_MACS = 5e13
"""That engines may take on a processor for all images: half an hour on two cores."""
_SETTINGS = SearchSettings(most=4)


def may_fit(context: BuildContext) -> bool:
    """Whether a build can have cascades: engines that run here, trained networks, enough held-out images."""
    return (
        context.device.here
        and "onnxruntime" in context.runtimes
        and context.family.weights != "random"
        and len(context.data.heldout) >= images_needed()
    )


class FitCascades(Stage[Cascades]):
    """Cascades of the verified engines of the fastest package, with top-1 on the test images and latencies here.

    Cascades in a slower precision would take as long again to fit, and would be picked for the little that the faster
    one loses.
    """

    name = "cascades"
    version = 2  # 1: of every package

    def __init__(
        self, context: BuildContext, exported: Outcome[Results], timed: Outcome[Results], registry: Registry
    ) -> None:
        self.context, self.exported, self.timed, self.registry = context, exported, timed, registry

    def inputs(self) -> Json:
        # timed with the engines: what is measured anew of them is measured anew of cascades
        return {
            "engines": [self.timed.key, self.timed.digest],
            "images": self.context.training_images(),
            "most": [_MOST_HELDOUT, _MOST_ROUTES, _MOST_MACS, _SETTINGS.most],
            **timed_on(self.context),
        }

    def run(self, work: Work) -> Cascades:
        packages = self._packages()
        name = fastest_package(self.timed.value, packages)
        if name is None or len(packages[name]) < 2 or self._takes_long(name, packages[name], work):
            return {}
        package = Package.open(packaged(self.exported.folder, name, self.registry).folder, content=False)
        return {name: self._fitted(package, packages[name], work)}

    def _takes_long(self, name: str, routes: list[str], work: Work) -> bool:
        data, cost = self.context.data, {str(one.route): one.cost.macs for one in self.timed.value}
        images = min(_MOST_HELDOUT, len(data.heldout)) + len(data.test)
        if self.context.device.kind != "cpu" or images * sum(cost[one] for one in routes) <= _MOST_MACS:
            return False
        work.listener.say(
            f"No cascades of {name}: {len(routes)} engines would answer {images:,} images, which takes long on a "
            "processor. klas-zoo cascades fits them on fewer."
        )
        return True

    def save(self, result: Cascades, folder: Path) -> None:
        for name, cascades in result.items():
            (folder / f"{name}.json").write_text(cascades_text(cascades), encoding="utf-8")

    def load(self, folder: Path) -> Cascades:
        return {
            path.stem: parse_cascades(path.read_bytes(), str(path))
            for path in sorted(folder.glob("*.json"))
            if path.stem in self._packages()
        }

    def _packages(self) -> dict[str, list[str]]:
        """By a package's name, the routes with an engine that onnxruntime runs here."""
        found: dict[str, list[str]] = {}
        for result in self.timed.value:
            for engine in result.engines:
                if (engine.runtime, engine.format, engine.status) == ("onnxruntime", "onnx", VERIFIED):
                    found.setdefault(engine.package, []).append(str(result.route))
        anchors = {str(one.route) for one in self.timed.value if one.route.is_anchor}
        return {name: _thinned(routes, anchors) for name, routes in found.items()}

    def _fitted(self, package: Package, routes: list[str], work: Work) -> PackagedCascades:
        data, precision = self.context.data, package.manifest.precision
        images = data.heldout.spread(_MOST_HELDOUT)
        with work.watch(f"{self.name} {precision}", len(images) * len(routes), "images") as advance:
            heldout = self._outputs(package, routes, images, advance)
        chosen = find_cascades(package, heldout, _SETTINGS)[0].cascades
        used = [name for name in routes if any(name == str(r) for one in chosen for r in one.cascade.routes)]
        with work.watch(f"{self.name} {precision} test", len(data.test) * len(used), "images") as advance:
            test = self._outputs(package, used, data.test, advance) if used else None
        made = list(self._verified(package, chosen, test, work)) if test else []
        about = {"description": data.description, "fingerprint": data.test_fingerprint}
        return PackagedCascades(cascades=tuple(self._timed(package, made, work)) if made else (), data=about)

    def _outputs(self, package: Package, routes: list[str], images: Split, advance: Advance) -> RouteOutputs:
        settings = self.context.settings

        def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for some, labels in batches(images, settings.batch, workers=settings.workers):
                yield some.numpy(), labels.numpy()

        return outputs_of(
            package, routes, stream, provider=self._provider, threads=settings.threads,
            on_images=lambda count: advance(count, ""),
        )  # fmt: skip

    def _verified(
        self, package: Package, chosen: Iterable[FittedCascade], test: RouteOutputs, work: Work
    ) -> Iterator[PackagedCascade]:
        for one in chosen:
            try:
                seen = verify_cascade(
                    package, one.cascade, provider=self._provider, threads=self.context.settings.threads
                )
            except VerificationError as error:
                work.listener.say(str(error))
                continue
            yield packaged_cascade(package, one, outcome(one.cascade, test), seen)

    def _timed(self, package: Package, made: list[PackagedCascade], work: Work) -> Iterator[PackagedCascade]:
        device = self.context.device
        with alone(self.registry, work.listener):
            times = time_paths(
                package, [one.cascade for one in made], device=device, provider=self._provider,
                threads=self.context.settings.threads,
            )  # fmt: skip
        for one in made:
            yield replace(one, latencies=(times.latency(one.cascade, one.facts.heldout.shares, device.name),))

    @property
    def _provider(self) -> str:
        return provider_on("onnxruntime", self.context.device)


def fastest_package(results: Results, names: Iterable[str]) -> str | None:
    """The package whose anchors take least time in all; of those without some anchor, one that lacks the fewest."""

    def cost(name: str) -> tuple[int, float]:
        timed = [
            engine.latencies[0].p50_ms
            for one in results if one.route.is_anchor
            for engine in one.engines if engine.package == name and engine.latencies
        ]  # fmt: skip
        return -len(timed), sum(timed)

    return min(names, key=cost, default=None)


def _thinned(routes: list[str], always: Set[str]) -> list[str]:
    """At most so many routes, evenly spread from small to large, and those that are always kept."""
    if len(routes) <= _MOST_ROUTES:
        return routes
    kept = {round(number * (len(routes) - 1) / (_MOST_ROUTES - 1)) for number in range(_MOST_ROUTES)}
    return [one for number, one in enumerate(routes) if number in kept or one in always]

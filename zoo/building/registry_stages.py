"""The last stage of a build: its packages registered. The registry's copy of the weights is then the only one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from klas_zoo.building.cache import Json, moved_to_registry
from klas_zoo.building.cascade_stage import Cascades
from klas_zoo.building.context import BuildContext
from klas_zoo.building.engine_stages import Results, packaged
from klas_zoo.building.engines import EngineResult, RouteResult
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.pipeline import Outcome, Stage, Work
from klas_zoo.building.tuning_stages import SUPERNET
from klas_zoo.errors import ExportError
from klas_zoo.exporters.manifest import PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.packaged_cascades import write_cascades
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry import Registry
from klas_zoo.registry.cascades import new_cascade
from klas_zoo.registry.packages import digest_of, is_intact
from klas_zoo.registry.records import BuildRecord, NewEngine, Status
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet


class Register(Stage[int]):
    """Makes the engines the current ones of their family and device. The result is the build's number.

    A build that died after its commit is found in the registry, not registered twice.
    """

    name = "register"
    version = 3  # 1: one file for each engine; 2: latencies that were measured anew had the same key

    def __init__(
        self,
        context: BuildContext,
        tuned: Outcome[Supernet],
        exported: Outcome[Results],
        timed: Outcome[Results],
        cascades: Outcome[Cascades] | None,
        registry: Registry,
        record: Callable[[str], BuildRecord],
    ) -> None:
        self.context, self.tuned, self.exported, self.timed = context, tuned, exported, timed
        self.cascades, self.registry, self.record = cascades, registry, record

    def inputs(self) -> Json:
        # the result too: what is measured anew is registered anew
        cascades = {"cascades": [self.cascades.key, self.cascades.digest]} if self.cascades else {}
        return {"engines": self.timed.key, "result": self.timed.digest, **cascades}

    def run(self, work: Work) -> int:
        number = self._registered()
        if number is None:
            results = self.timed.value
            made = [(result, engine) for result in results for engine in result.engines if engine.exists]
            if not made:
                first = next(one.rejected for one in results if one.rejected)
                raise ExportError(f"No engine passed its checks, so nothing was registered; the first: {first}")
            record = self.record(self.key)
            with work.watch(self.name, 1, "family"):
                packages = self._packages(made, work.folder / "packages")
                engines = [self._engine(result, engine, packages[engine.package], record) for result, engine in made]
                engines += self._cascades(packages, record)
                number = self.registry.register(record, engines, link=True)
            self._release({name: digest_of(folder) for name, folder in packages.items()})
            shutil.rmtree(work.folder / "packages")
        return number

    def save(self, result: int, folder: Path) -> None:
        write_json({"build_id": result}, folder / "build.json")

    def load(self, folder: Path) -> int:
        return int(read_json(folder / "build.json")["build_id"])

    def holds(self, folder: Path) -> bool:
        return self._registered() == self.load(folder)

    def _registered(self) -> int | None:
        """The family's current build for the device, if that is this one and its packages are undamaged."""
        device = self.context.device
        number = self.registry.current_build(self.context.family.name, device.name, device.hardware)
        if number is None or self.registry.build(number).manifest.get("key") != self.key:
            return None
        intact = all(is_intact(one.path, one.digest) for one in self.registry.packages(number))
        return number if intact else None

    def _packages(self, made: list[tuple[RouteResult, EngineResult]], place: Path) -> dict[str, Path]:
        """The exported packages with the latencies of this build in their manifests; files are linked."""
        found = {}
        for name in dict.fromkeys(engine.package for _, engine in made):
            source = packaged(self.exported.folder, name, self.registry)
            package = Package.open(source.folder, content=False)
            source.check()
            latencies: dict[Route, tuple[LatencyRecord, ...]] = {}
            for result, engine in made:
                if engine.package == name:  # one file may be timed in several runtimes
                    latencies[result.route] = (*latencies.get(result.route, ()), *engine.latencies)
            folder = place / name
            folder.mkdir(parents=True)
            for file in package.manifest.files:
                _link(source.folder / file, folder / file)
            manifest = replace(package.manifest, routes=_timed(package, latencies))
            if cascades := self._fitted.get(name):
                manifest = write_cascades(folder, manifest, cascades)
            write_manifest(folder, manifest)
            found[name] = folder
        return found

    @property
    def _fitted(self) -> Cascades:
        return self.cascades.value if self.cascades else {}

    def _cascades(self, packages: Mapping[str, Path], record: BuildRecord) -> list[NewEngine]:
        """The cascades of the packages as engines."""
        return [
            new_cascade(
                one, Package.open(folder, content=False).manifest, folder, device=record.device,
                dataset=record.dataset, data_fingerprint=record.data_fingerprint,
            )
            for name, folder in packages.items() if name in self._fitted
            for one in self._fitted[name].cascades
        ]  # fmt: skip

    def _engine(self, result: RouteResult, engine: EngineResult, package: Path, record: BuildRecord) -> NewEngine:
        family, seen = self.context.family, engine.verification
        top1 = result.top1
        if seen is not None and seen.lost is not None:
            # both were compared on the same images, which may be fewer than those that measured the route
            top1 = min(100.0, max(0.0, top1 - seen.lost))
        return NewEngine(
            family=record.family, route=result.route, device=record.device, format=engine.format,
            runtime=engine.runtime, precision=engine.precision, status=cast(Status, engine.status),
            reason=engine.reason,
            macs=result.cost.macs, parameters=result.cost.parameters, top1=top1, images=len(self.context.data.test),
            input_shape=family.input_shape, num_classes=family.num_classes,
            preprocessing=preprocessing_json(family.data_config), verification=seen, latencies=engine.latencies,
            weights=record.weights, dataset=record.dataset, data_fingerprint=record.data_fingerprint,
            file=package / engine.file, size_bytes=engine.size_bytes,
        )  # fmt: skip

    def _release(self, digests: Mapping[str, str]) -> None:
        """Removes from the cache what the registry holds now; digests of the packages take its place."""
        moved_to_registry(self.exported.folder, digests, lambda file: file.partition("/")[0] in digests)
        if "fp32" in digests:
            moved_to_registry(self.tuned.folder, {"fp32": digests["fp32"]}, lambda file: file == SUPERNET)


def _timed(package: Package, latencies: Mapping[Route, tuple[LatencyRecord, ...]]) -> tuple[PackagedRoute, ...]:
    return tuple(replace(one, latencies=latencies.get(one.route, ())) for one in package.routes)


def preprocessing_json(data_config: Mapping[str, object]) -> dict[str, object]:
    """How images are prepared, as timm's data configuration in JSON types."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data_config.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)

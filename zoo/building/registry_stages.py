"""The last stages of a build: its engines registered, its supernet kept for packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from klas_zoo.building import tuned
from klas_zoo.building.cache import Json
from klas_zoo.building.engine_stages import Results, file_name, has_engine
from klas_zoo.building.engines import RouteResult
from klas_zoo.building.ground import Ground
from klas_zoo.building.keeping import read_json, write_json
from klas_zoo.building.pipeline import NotDone, Outcome, Stage, Work
from klas_zoo.errors import ExportError, WeightsError
from klas_zoo.registry import Registry
from klas_zoo.registry.records import BuildRecord, NewEngine
from klas_zoo.supernet import Supernet


class Register(Stage[int]):
    """Makes the engines the current ones of their family and device. The result is the build's number.

    A build that died after its commit is found in the registry, not registered twice.
    """

    name = "register"

    def __init__(
        self,
        ground: Ground,
        exported: Outcome[Results],
        timed: Outcome[Results],
        registry: Registry,
        record: Callable[[str], BuildRecord],
    ) -> None:
        self.ground, self.exported, self.timed = ground, exported, timed
        self.registry, self.record = registry, record

    def inputs(self) -> Json:
        return {"engines": self.timed.key}

    def run(self, work: Work) -> int:
        if (known := self._registered()) is not None:
            return known
        record, folder = self.record(self.key), self.exported.folder
        results = self.timed.value
        engines = [_new_engine(one, folder / file_name(one), record, self.ground) for one in results if has_engine(one)]
        if not engines:
            first = next(one.rejected for one in results if one.rejected)
            raise ExportError(f"No engine passed its checks, so nothing was registered; the first: {first}")
        with work.watch(self.name, 1, "family"):
            return self.registry.register(record, engines)

    def save(self, result: int, folder: Path) -> None:
        write_json({"build_id": result}, folder / "build.json")

    def load(self, folder: Path) -> int:
        return int(read_json(folder / "build.json")["build_id"])

    def holds(self, folder: Path) -> bool:
        return self._registered() == self.load(folder)

    def _registered(self) -> int | None:
        """The family's current build for the device, if that is this one."""
        current = self.registry.engines(self.ground.family.name, self.ground.device.name)
        if not current:
            return None
        number = current[0].build_id
        return number if self.registry.build(number).manifest.get("key") == self.key else None


class Keep(Stage[Path]):
    """Leaves the tuned supernet in the registry, for packages that are made of it later."""

    name = "keep weights"

    def __init__(
        self, ground: Ground, tuned: Outcome[Supernet], timed: Outcome[Results], registered: Outcome[int],
        registry: Registry,
    ) -> None:  # fmt: skip
        self.ground, self.tuned, self.timed, self.registered = ground, tuned, timed, registered
        self.registry = registry

    def inputs(self) -> Json:
        return {"build": self.registered.key}

    def run(self, work: Work) -> Path:
        ground, number = self.ground, self.registered.value
        with self.registry.changing_files():  # else klas-zoo registry gc would take it for left over
            return tuned.keep(
                self.registry.root, self.tuned.value, self.registry.build(number), number, self.timed.value,
                len(ground.data.test), ground.family.data_config,
            )  # fmt: skip

    def save(self, result: Path, folder: Path) -> None:
        """It lies elsewhere."""

    def load(self, folder: Path) -> Path:
        return tuned.find(self.registry.root, self.ground.family.name, self.ground.device.name).path

    def holds(self, folder: Path) -> bool:
        try:
            found = tuned.find(self.registry.root, self.ground.family.name, self.ground.device.name)
            return found.build_id == self.registered.value
        except (WeightsError, NotDone):
            return False


def _new_engine(result: RouteResult, file: Path, record: BuildRecord, ground: Ground) -> NewEngine:
    assert result.verification is not None
    return NewEngine(
        family=record.family, route=result.route, device=record.device, runtime="onnxruntime",
        precision="fp32", macs=result.cost.macs, parameters=result.cost.parameters, top1=result.top1,
        images=len(ground.data.test), input_shape=ground.family.input_shape, verification=result.verification,
        latencies=result.latencies, weights=record.weights, dataset=record.dataset,
        data_fingerprint=record.data_fingerprint, file=file,
    )  # fmt: skip

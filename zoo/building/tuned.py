"""The tuned supernet of a family: in the fp32 package of its newest build.

Builds of earlier versions left it in a file of its own, `<registry>/supernets/<family>-<device>.safetensors`, whose
header has what the manifest of a package has now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.errors import RegistryError, UsageError, WeightsError
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.manifest_reading import route_from_json
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.stored_supernet import read_supernet
from klas_zoo.families.specs import AnchorSpec, FamilySpec
from klas_zoo.registry import Registry
from klas_zoo.registry.tags import builds_of, registered_device
from klas_zoo.registry.upkeep import legacy_supernet
from klas_zoo.supernet import Supernet

_LEGACY_SCHEMA = 1
_LEGACY_HEADER = "klas_zoo"


@dataclass(frozen=True, kw_only=True)
class TunedSupernet:
    """A tuned supernet and what was measured of its routes.

    Attributes:
        path: a package's folder, or a file of an earlier version.
        build: the build's record; `build_id` is its number in the registry.
        anchors: depth of each anchor by its name, smallest first.
        facts: the family as the package describes it; None for a file of an earlier version.
    """

    path: Path
    build_id: int
    build: Mapping[str, Any]
    anchors: Mapping[str, int]
    data_config: Mapping[str, Any]
    routes: tuple[PackagedRoute, ...]
    facts: FamilyFacts | None = None

    def spec(self) -> FamilySpec | None:
        """The family as a family file would describe it; None where its anchors are not all timm's, or not known."""
        if self.facts is None or not all(one.get("model") for one in self.facts.anchors):
            return None
        return FamilySpec(
            name=self.facts.name, input_shape=self.facts.input_shape,  # type: ignore[arg-type]
            num_classes=self.facts.num_classes,
            anchors=tuple(
                AnchorSpec(name=one["name"], model=one["model"], arguments=dict(one.get("arguments") or {}))
                for one in self.facts.anchors
            ),
        )  # fmt: skip

    def load(self, chains: dict[str, Chain]) -> Supernet:
        """The supernet, in chains of the same family whose weights it replaces.

        Raises:
            WeightsError: they are of another family, or the file is damaged.
            PackageError: the package is damaged.
        """
        if {name: chain.depth for name, chain in chains.items()} != dict(self.anchors):
            raise WeightsError(f"{self.path} holds the anchors {dict(self.anchors)}, not those of this family.")
        try:
            state = self._state()
            supernet = Supernet.of_state(chains, [one.route for one in self.routes], state)
            self._refuse_former_names(supernet, state)
            # the tensors of the file replace the others: they are mapped, not copied
            supernet.load_state_dict(state, assign=True)
        except (safetensors.SafetensorError, RuntimeError, OSError) as error:
            raise WeightsError(f"{self.path} is not the supernet of this family: build it again.") from error
        return supernet.eval().requires_grad_(False)

    def _refuse_former_names(self, supernet: Supernet, state: Mapping[str, Tensor]) -> None:
        """Tells another family from this one as an earlier version named its tensors: all shapes are there."""
        here = supernet.state_dict()
        unknown, missing = sorted(state.keys() - here.keys()), sorted(here.keys() - state.keys())
        shapes = (sorted(tuple(tensor.shape) for tensor in one.values()) for one in (here, state))
        if unknown and missing and next(shapes) == next(shapes):
            raise WeightsError(
                f"{self.path} holds this family's tuned supernet under tensor names of an earlier klas-zoo "
                f"({unknown[0]}, here {missing[0]}), which cannot be assigned safely: engines built from it still run; "
                "to export or tune further, build the family again (klas-zoo build)."
            )

    def _state(self) -> dict[str, Tensor]:
        return read_supernet(Package.open(self.path)) if self.path.is_dir() else load_file(self.path)


def find(
    root: Path, family: str, device: str | None = None, argument: str | None = None, *, preferred: str | None = None
) -> TunedSupernet:
    """The supernet of the newest build of a family, or of the build that a tag such as `deit@prod` points to.

    Args:
        argument: of `--family`, to build it. Default: its name.
        preferred: of builds for several devices, the one for this device, if there is one.

    Raises:
        UsageError: there are those of several devices, and none was named.
        UnknownName: there is no such tag.
        WeightsError: there is none, or it cannot be read.
        RegistryError: there is no registry, or it cannot be read.
    """
    try:
        registry = Registry.open(root, create=False)
        with registry.reading() as connection:
            chosen, names = builds_of(connection, family, device)
            found = connection.execute(
                f"SELECT id, family, device FROM builds WHERE {chosen} AND kind = 'build' ORDER BY device", names
            ).fetchall()
            wanted = registered_device(connection, preferred)
    except RegistryError as error:
        if not (root / "registry.sqlite").exists():
            found, wanted = [], None
        else:
            raise error
    if not found:
        raise WeightsError(
            f"No build has left a tuned supernet of {family} in {root}: run klas-zoo build --family "
            f"{argument or family} first, or pass --random-weights."
        )
    found = [one for one in found if one["device"] == wanted] or found
    if len(found) > 1:
        devices = ", ".join(row["device"] for row in found)
        raise UsageError(f"{root} holds tuned supernets of {family} for several devices, {devices}: pass --device.")
    return _of_build(registry, found[0]["id"], found[0]["family"], found[0]["device"])


def _of_build(registry: Registry, number: int, family: str, device: str) -> TunedSupernet:
    packages = [one for one in registry.packages(number) if (one.format, one.precision) == ("onnx", "fp32")]
    if not packages:
        legacy = legacy_supernet(registry.root, family, device)
        if legacy.is_file():
            return _read_legacy(legacy)
        raise WeightsError(
            f"Build {number} of {family} has no fp32 package, and so no supernet: build it with --precision fp32."
        )
    package = Package.open(packages[0].path, content=False)
    stored = package.manifest.supernet
    if stored is None:
        raise WeightsError(f"The package {package.folder} holds no supernet: build {family} again.")
    timed = {one.route: one.latencies for one in package.routes}
    return TunedSupernet(
        path=package.folder,
        build_id=number,
        build=asdict(registry.build(number)),
        anchors={one["name"]: one["depth"] for one in package.manifest.family.anchors},
        data_config=package.manifest.family.data_config,
        facts=package.manifest.family,
        routes=tuple(replace(one, latencies=timed.get(one.route, ())) for one in stored.routes),
    )


def _read_legacy(path: Path) -> TunedSupernet:
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_LEGACY_HEADER])
        if header["schema_version"] > _LEGACY_SCHEMA:
            raise WeightsError(f"{path} was left by a newer klas-zoo: upgrade klas-zoo, or build again.")
        return TunedSupernet(
            path=path,
            build_id=int(header["build_id"]),
            build=header["build"],
            anchors=header["anchors"],
            data_config=header["data_config"],
            routes=tuple(route_from_json(one, str(path), WeightsError) for one in header["routes"]),
        )
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a tuned supernet ({error}): build it again.") from error

"""The cascades of a package: `cascades.json` beside its engines.

    {"schema_version": 1,
     "data":     the images behind the accuracies: description and fingerprint
     "engines":  SHA-256 of the engine of each route, by its name: thresholds hold for these networks only
     "cascades": [{"cascade": measure and stages, "macs", "worst_macs", "parameters", "size_bytes",
                   "heldout": what became of the images that thresholds were fitted on,
                   "test":    what became of images that decided nothing,
                   "verification": of answers and exits, "latencies": of one image, measured; may be empty}]}

The manifest names the file as every other, so that it is under the package's digest; versions that do not know it leave
it alone. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from klas_zoo.cascades.definition import Cascade, Measure
from klas_zoo.cascades.records import CascadeFacts, Outcome
from klas_zoo.errors import DamagedPackage, PackageError
from klas_zoo.exporters.manifest import FileEntry, Manifest
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.records import Verification
from klas_zoo.files import sha256_of
from klas_zoo.profiles.records import CascadeLatency
from klas_zoo.reading import Count, Positive, Sha256, Text, read

CASCADES = "cascades.json"
SCHEMA_VERSION = 1
_COUNTS = ("macs", "worst_macs", "parameters", "size_bytes")


@dataclass(frozen=True, kw_only=True)
class PackagedCascade:
    """A cascade of a package's routes.

    Attributes:
        facts: what becomes of images.
        macs: multiply-adds for one image, mean over the images that thresholds were fitted on.
        worst_macs: of an image that every stage executes.
        parameters: weights that its stages read, each counted once.
        size_bytes: of its graphs and of those weights.
        verification: of its answers and exits, against those of torch.
        latencies: may be empty.
    """

    cascade: Cascade
    facts: CascadeFacts
    macs: int
    worst_macs: int
    parameters: int
    size_bytes: int
    verification: Verification
    latencies: tuple[CascadeLatency, ...] = ()

    @property
    def name(self) -> str:
        return str(self.cascade)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in _COUNTS}
        return {
            **plain, **self.facts.to_json(), "cascade": self.cascade.to_json(),
            "verification": vars(self.verification), "latencies": [one.to_json() for one in self.latencies],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackagedCascades:
    """All that a package has.

    Attributes:
        data: description and fingerprint of the test images; empty where they are not known.
        engines: SHA-256 of the file of each route's engine; empty before they are written into a package.
    """

    cascades: tuple[PackagedCascade, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, str] = field(default_factory=dict)


def read_cascades(package: Package) -> PackagedCascades:
    """What a package carries; empty where it has no such file.

    Raises:
        DamagedPackage: the file is not what its format says, or names routes the package does not have.
        PackageError: it cannot be read.
    """
    path = package.folder / CASCADES
    if CASCADES not in package.manifest.files:
        return PackagedCascades()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error
    found = parse_cascades(content, str(path))
    known = engines_of(package.manifest)
    for route in dict.fromkeys(str(route) for one in found.cascades for route in one.cascade.routes):
        if route not in known:
            raise DamagedPackage(f"{path} has a cascade of the route {route}, which the package does not have.")
        if found.engines.get(route) != known[route]:
            raise DamagedPackage(f"{path} belongs to another package: its cascades were fitted on another {route}.")
    return found


def engines_of(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of the engine of each route that has a file, by the route's name."""
    found = ((one.name, manifest.files.get(one.file or "")) for one in manifest.routes)
    return {name: entry.sha256 for name, entry in found if entry is not None}


def parse_cascades(content: str | bytes, where: str) -> PackagedCascades:
    """
    Raises:
        DamagedPackage: it is not what `cascades_text` gives.
    """
    found = read(content, _Document, where, DamagedPackage, newest=SCHEMA_VERSION)
    return PackagedCascades(
        cascades=tuple(one.record for one in found.cascades), data=found.data, engines=found.engines
    )


def cascades_text(found: PackagedCascades) -> str:
    """What `cascades.json` holds."""
    cascades = [one.to_json() for one in found.cascades]
    tables = {"data": dict(found.data), "engines": dict(found.engines), "cascades": cascades}
    table = {"schema_version": SCHEMA_VERSION, **tables}
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def write_cascades(folder: Path, manifest: Manifest, found: PackagedCascades) -> Manifest:
    """Writes the file into a package's folder; returns the manifest that names it, which is still to be written.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / CASCADES
    path.unlink(missing_ok=True)  # it may be a link to another package's
    with path.open("x", encoding="utf-8") as file:
        file.write(cascades_text(replace(found, engines=engines_of(manifest))))
        file.flush()
        os.fsync(file.fileno())
    entry = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))
    return replace(manifest, files={**manifest.files, CASCADES: entry})


@dataclass(frozen=True, kw_only=True)
class _Stage:
    route: tuple[tuple[Text, Positive, Positive], ...]
    threshold: float | None
    temperature: float
    shared: Count


@dataclass(frozen=True, kw_only=True)
class _Definition:
    measure: Measure
    stages: tuple[_Stage, ...]


@dataclass(frozen=True, kw_only=True)
class _Cascade:
    """A `PackagedCascade` as it is written."""

    cascade: _Definition
    heldout: Outcome
    test: Outcome
    macs: Count
    worst_macs: Count
    parameters: Count
    size_bytes: Annotated[int, Meta(ge=1)]
    verification: Verification
    latencies: tuple[CascadeLatency, ...]

    def __post_init__(self) -> None:
        count = len(self.record.cascade.stages)
        sizes = {len(self.heldout.shares), len(self.test.shares), *(len(one.paths_ms) for one in self.latencies)}
        if sizes != {count}:
            raise ValueError(f"a cascade of {count} stages has as many shares and paths")
        if not self.verification.passed:
            raise ValueError("it did not pass its verification")

    @property
    def record(self) -> PackagedCascade:
        table = asdict(self.cascade)
        for stage in table["stages"]:
            stage["route"] = [list(one) for one in stage["route"]]
        plain = {name: getattr(self, name) for name in (*_COUNTS, "verification")}
        return PackagedCascade(
            **plain, cascade=Cascade.from_json(table), facts=CascadeFacts(heldout=self.heldout, test=self.test),
            latencies=self.latencies,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Document:
    data: dict[str, str]
    engines: dict[str, Sha256]
    cascades: tuple[_Cascade, ...]

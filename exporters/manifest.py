"""What a family package says of itself in `manifest.json`. Imports nothing heavy.

    {"schema_version": 1, "format": "onnx", "precision": "fp32",
     "family":     name, input_shape, num_classes, weights, data_config, anchors
     "weights":    the one file that holds every route's weights; null where each engine holds its own
     "references": real images, and what torch answers to them
     "routes":     name, segments, file, MACs, accuracy, verification, latencies; cheapest first
     "files":      size and SHA-256 of every file but this one
     "provenance": versions, hardware, images, command, dates}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from klas_zoo.errors import DamagedPackage, NewerPackage
from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.stored import is_plain_name, is_sha256, refuse_newer, schema_of

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
NOT_RUN = "built, not run"
GRAPH_FORMATS = ("onnx", "model-package")
"""In which every route is an ONNX graph that reads the one weights file."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as it was when the package was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """The family a package was made of.

    Attributes:
        input_shape: one image, (C, H, W).
        weights: `random` when nobody trained the anchors, so that accuracies mean nothing.
        data_config: how images are scaled, cropped and normalised, as timm says it.
        anchors: cheapest first; `name`, `depth`, and timm's `model` and `arguments` where it is one of timm's.
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    weights: Literal["pretrained", "random"]
    data_config: Mapping[str, Any]
    anchors: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class PackagedRoute:
    """A route of a package.

    Attributes:
        file: its engine's name in the package's folder; None where the weights file alone is the route.
        top1: accuracy in per cent of the fp32 torch route over `images` test images; None: not measured.
        verification: of its engine; None where it could not be run when it was written.
        latencies: measured or predicted; `origin` says which. May be empty.
    """

    route: Route
    file: str | None
    macs: int
    parameters: int
    top1: float | None
    images: int
    on_frontier: bool
    verification: Verification | None
    latencies: tuple[LatencyRecord, ...] = ()

    @property
    def name(self) -> str:
        return str(self.route)

    @property
    def status(self) -> str:
        """`verified`, or `built, not run`: what was found to be another function is in no package."""
        return "verified" if self.verification is not None else NOT_RUN


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` holds."""

    format: str
    precision: str
    family: FamilyFacts
    weights: str | None
    references: str
    routes: tuple[PackagedRoute, ...]
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("format", "precision", "weights", "references", "provenance")}
        return {
            "schema_version": SCHEMA_VERSION,
            **plain,
            "family": asdict(self.family),
            "routes": [route_to_json(one) for one in self.routes],
            "files": {name: vars(entry) for name, entry in self.files.items()},
        }


def route_to_json(one: PackagedRoute) -> dict[str, Any]:
    """Every field; the route by its name, with its segments beside it."""
    plain = {key: value for key, value in vars(one).items() if key not in ("route", "verification", "latencies")}
    return plain | {
        "route": one.name,
        "segments": one.route.to_json(),
        "status": one.status,
        "verification": None if one.verification is None else vars(one.verification),
        "latencies": [asdict(latency) for latency in one.latencies],
    }


def read_manifest(table: Any, where: str) -> Manifest:
    """Checks what JSON gave, and that every file it names is one that lies in the package itself.

    Args:
        where: the manifest's path, for messages.

    Raises:
        NewerPackage: a newer klas-zoo wrote it.
        DamagedPackage: it is no manifest, names a file that cannot be in the folder, or leaves one out.
    """
    version = schema_of(table)
    if version is None:
        raise DamagedPackage(f"{where} is no manifest of a package: it has no schema_version.")
    refuse_newer(version, SCHEMA_VERSION, where, NewerPackage)
    try:
        manifest = _manifest(table)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DamagedPackage(f"{where} cannot be understood ({type(error).__name__}: {error}).") from error
    _check_names(manifest, where)
    return manifest


def _manifest(table: Mapping[str, Any]) -> Manifest:
    family = table["family"]
    shape = tuple(family["input_shape"])
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"input_shape {shape}")
    if family["weights"] not in ("pretrained", "random"):
        raise ValueError(f"weights {family['weights']!r}")
    routes = tuple(map(route_from_json, table["routes"]))
    if not routes or len({one.name for one in routes}) < len(routes):
        raise ValueError("routes are missing or named twice")
    return Manifest(
        format=_text(table["format"]),
        precision=_text(table["precision"]),
        family=FamilyFacts(
            name=_text(family["name"]),
            input_shape=shape,
            num_classes=_count(family["num_classes"]),
            weights=family["weights"],
            data_config=dict(family["data_config"]),
            anchors=tuple(dict(anchor) for anchor in family["anchors"]),
        ),
        weights=None if table["weights"] is None else _text(table["weights"]),
        references=_text(table["references"]),
        routes=routes,
        files={
            _text(name): FileEntry(size_bytes=_count(entry["size_bytes"]), sha256=_text(entry["sha256"]))
            for name, entry in table["files"].items()
        },
        provenance=dict(table["provenance"]),
    )


def route_from_json(table: Mapping[str, Any]) -> PackagedRoute:
    """
    Raises:
        KeyError, TypeError, ValueError: it is not what `route_to_json` gives, or did not pass.
    """
    route = Route.from_json(table["segments"])
    if table["route"] != str(route):
        raise ValueError(f"a route {table['route']!r} with the segments of {route}")
    seen, top1 = table["verification"], table["top1"]
    verification = None if seen is None else Verification.from_json(seen)
    if verification is not None and not verification.passed:
        raise ValueError(f"the route {route} did not pass its verification")
    return PackagedRoute(
        route=route,
        file=None if table["file"] is None else _text(table["file"]),
        macs=_count(table["macs"]),
        parameters=_count(table["parameters"]),
        top1=None if top1 is None else float(top1),
        images=_count(table["images"]),
        on_frontier=bool(table["on_frontier"]),
        verification=verification,
        latencies=tuple(_latency(one) for one in table["latencies"]),
    )


def _latency(table: Mapping[str, Any]) -> LatencyRecord:
    known = {field.name: table[field.name] for field in fields(LatencyRecord) if field.name in table}
    return LatencyRecord(**{**known, "shape": tuple(table["shape"])})


def _check_names(manifest: Manifest, where: str) -> None:
    for name, entry in manifest.files.items():
        if not is_plain_name(name) or name == MANIFEST:
            raise DamagedPackage(f"{where} names a file {name!r}, which is no plain file of the package's own folder.")
        if not is_sha256(entry.sha256):
            raise DamagedPackage(f"{where} has no SHA-256 of {name}.")
    if manifest.weights is None and manifest.format in (*GRAPH_FORMATS, "torch"):
        raise DamagedPackage(f"{where} names no weights.")
    named = [("references", manifest.references)]
    named += [("weights", manifest.weights)] if manifest.weights is not None else []
    named += [(f"route {one.name}", one.file) for one in manifest.routes if one.file is not None]
    for what, name in named:
        if name not in manifest.files:
            raise DamagedPackage(f"{where} names {name!r} for its {what}, and no such file among its files.")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"a text was expected, not {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a number from zero on was expected, not {value!r}")
    return value

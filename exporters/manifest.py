"""The manifest of a package, `manifest.json`; `klas_zoo.exporters.manifest_reading` reads it. Imports nothing heavy.

    {"schema_version": 2, "format": "onnx", "precision": "fp32",
     "family":     name, input_shape, num_classes, weights, data_config, anchors, classes
     "weights":    the one file that holds every route's weights; null where each engine holds its own
     "references": real images, and torch's logits for them
     "routes":     name, segments, file, MACs, accuracy, verification, latencies; smallest first
     "data":       the test images behind the accuracies: description and fingerprint; may be missing
     "supernet":   where the tuned supernet's tensors are, and all of its routes; may be missing or null
     "files":      size and SHA-256 of every file but this one
     "provenance": versions, hardware, images, dates
     "sha256":     of the manifest itself without this field, as JSON with sorted keys}

So every byte of a package is under a hash: of its other files here, and of this file in itself. The SHA-256 of the
whole file is the package's digest, under which a registry stores it. Manifests of schema 1 have no `sha256`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from klas_zoo.exporters.records import Verification
from klas_zoo.files import sealed
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.reading import Count, Percent, Sha256, Text
from klas_zoo.routes import Route
from klas_zoo.runtimes import NOT_RUN, VERIFIED

SCHEMA_VERSION = 2
FIRST_SEALED_SCHEMA = 2
"""From which on a manifest has its own SHA-256."""
MANIFEST = "manifest.json"
GRAPH_FORMATS = ("onnx", "model-package")
"""In which every route is an ONNX graph that reads the one weights file."""
PREPROCESSING = "preprocessing"
"""The key of a graph's metadata under which it says how images are prepared."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_MOST_VALUES = 2**28  # of one image: a gigabyte
_Edge = Annotated[int, Meta(ge=1, le=2**16)]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file as it was when the package was written."""

    size_bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """The family a package was made of.

    Attributes:
        input_shape: one image, (C, H, W).
        weights: `random` for untrained anchors, so that accuracies mean nothing.
        data_config: how images are scaled, cropped and normalised, as timm says it.
        anchors: smallest first; `name`, `depth`, timm's `model` and `arguments` where it is one of timm's, and
            `weights`: the `source`, `url` and `license` of its weights, where they are known.
        classes: names by number; empty where they are not known.
    """

    name: Text
    input_shape: Annotated[tuple[_Edge, ...], Meta(min_length=3, max_length=3)]
    num_classes: Annotated[int, Meta(ge=1, le=10**7)]
    weights: Literal["pretrained", "random"]
    data_config: Mapping[str, Any]
    anchors: tuple[Mapping[str, Any], ...]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_printable("its name", self.name)
        if len(self.classes) > self.num_classes:
            raise ValueError(f"it names {len(self.classes)} classes of {self.num_classes}")
        if math.prod(self.input_shape) > _MOST_VALUES:
            raise ValueError(f"an image of {' × '.join(map(str, self.input_shape))} is too large")
        for one in self.anchors:
            depth = one.get("depth")
            if not isinstance(one.get("name"), str) or not one["name"] or type(depth) is not int or depth < 1:
                raise ValueError(f"an anchor has no name or depth: {one!r:.80}")
            _check_printable("an anchor", one["name"])
        for name in ("mean", "std"):
            _check_channels(name, self.data_config.get(name))


def graph_metadata(facts: FamilyFacts, route: str, precision: str) -> dict[str, str]:
    """What the metadata of an ONNX graph say, for programs that have the graph alone.

    `preprocessing` is JSON: the `data_config` of the family.
    """
    prepared = json.dumps(dict(facts.data_config), sort_keys=True)
    return {
        "family": facts.name, "route": route, "weights": facts.weights, "precision": precision, PREPROCESSING: prepared,
    }  # fmt: skip


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
    file: Text | None
    macs: Count
    parameters: Count
    top1: Percent | None
    images: Count
    on_frontier: bool
    verification: Verification | None
    latencies: tuple[LatencyRecord, ...]

    def __post_init__(self) -> None:
        _check_printable("a route", self.name)
        if self.verification is not None and not (
            self.verification.passed and math.isfinite(self.verification.tolerance)
        ):
            raise ValueError("its verification did not pass")

    @property
    def name(self) -> str:
        return str(self.route)

    @property
    def status(self) -> str:
        """`verified`, or `built, not run`: what was found to be another function is in no package."""
        return VERIFIED if self.verification is not None else NOT_RUN


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a float32 tensor of a supernet is in the package's weights file.

    Attributes:
        offset: in bytes.
        shape: as the supernet has it; the file holds it the other way round where it is `transposed`.
    """

    offset: Count
    shape: tuple[Count, ...]
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class StoredSupernet:
    """The tuned supernet of a package; see klas_zoo.exporters.stored_supernet.

    Attributes:
        file: holds the tensors that are not among the graphs' weights.
        tensors: the others, by their names in the supernet.
        routes: all that were tuned, whether or not they have an engine.
    """

    file: Text
    tensors: Mapping[str, StoredTensor]
    routes: tuple[PackagedRoute, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "tensors": {name: vars(one) for name, one in self.tensors.items()},
            "routes": [route_to_json(one) for one in self.routes],
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` holds."""

    format: Text
    precision: str
    family: FamilyFacts
    weights: Text | None
    references: Text
    routes: Annotated[tuple[PackagedRoute, ...], Meta(min_length=1)]
    files: Mapping[str, FileEntry]
    provenance: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)
    supernet: StoredSupernet | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"its precision is {self.precision!r}, not one of {', '.join(PRECISIONS)}")
        if len({one.route for one in self.routes}) < len(self.routes):
            raise ValueError("routes are named twice")

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("format", "precision", "weights", "references", "provenance")}
        return {
            "schema_version": SCHEMA_VERSION,
            **plain,
            "family": asdict(self.family),
            "routes": [route_to_json(one) for one in self.routes],
            "data": dict(self.data),
            "supernet": None if self.supernet is None else self.supernet.to_json(),
            "files": {name: vars(entry) for name, entry in self.files.items()},
        }


def manifest_text(manifest: Manifest) -> str:
    """What `manifest.json` holds."""
    return sealed(manifest.to_json())


def route_to_json(one: PackagedRoute) -> dict[str, Any]:
    """Every field; the route by its name, with its segments beside it."""
    plain = {key: value for key, value in vars(one).items() if key not in ("route", "verification", "latencies")}
    return plain | {
        "route": one.name,
        "segments": one.route.to_json(),
        "status": one.status,
        "verification": None if one.verification is None else vars(one.verification),
        "latencies": [latency.to_json() for latency in one.latencies],
    }


def _check_channels(name: str, values: Any) -> None:
    """Of a data configuration: what images are scaled with, where it says so."""
    if values is None:
        return
    # abs: an integer can be too long for isfinite
    plain = isinstance(values, (list, tuple)) and all(type(one) in (int, float) and abs(one) <= 1e9 for one in values)
    if not plain or (name == "std" and min(values, default=0) <= 0):
        raise ValueError(f"{name} of its data_config is {values!r:.80}")


def _check_printable(what: str, text: str) -> None:
    """Names are shown in terminals, and stand in error messages of one line."""
    if not text.isprintable():
        raise ValueError(f"{what} is named {ascii(text)[:80]}, which no terminal shows")

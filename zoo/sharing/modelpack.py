"""A family package as an OCI artifact: CNCF ModelPack's media types, and what our annotations say.

Every file is a layer of its own, uncompressed, so that its digest is the SHA-256 that `manifest.json` has, and what
two packages share is stored once. The artifact's digest follows from the package alone: no dates, no users.

Source: https://github.com/modelpack/model-spec, docs/spec.md, docs/config.md and docs/annotations.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from klas_zoo.errors import RemoteError
from klas_zoo.exporters.manifest import MANIFEST, Manifest, PackagedRoute
from klas_zoo.reading import Count, PlainName, convert, parse

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT, SETTINGS, DOCUMENT, DATA = (
    f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc", "dataset")
)
FILE_PATH, TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
MOST_MANIFEST_BYTES = 4 * 2**20
"""What registries accept at least (OCI distribution specification)."""
_OURS = "io.klas-zoo"
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}
_OF_A_LATENCY = ("hardware", "runtime", "runtime_version", "provider", "precision", "threads", "batch", "p50_ms",
                 "p90_ms", "origin")  # fmt: skip
Digest = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """Where a blob is: its digest and size."""

    mediaType: str  # noqa: N815  the specification's names
    digest: Digest
    size: Count
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a registry stores as the manifest of a package."""

    schemaVersion: Literal[2]  # noqa: N815
    mediaType: Literal["application/vnd.oci.image.manifest.v1+json"]  # noqa: N815
    artifactType: Literal["application/vnd.cncf.model.manifest.v1+json"]  # noqa: N815
    config: Descriptor
    layers: tuple[Descriptor, ...]

    @property
    def files(self) -> dict[str, Descriptor]:
        """Layers by the name of their file."""
        return {one.annotations[FILE_PATH]: one for one in self.layers}


def config_of(manifest: Manifest, digests: Mapping[str, str]) -> bytes:
    """ModelPack's configuration of a package.

    Args:
        digests: `sha256:…` of each file.
    """
    family = manifest.family
    table = {
        "descriptor": {
            "family": family.name,
            "name": family.name,
            "version": digests[MANIFEST].removeprefix("sha256:")[:12],
            "title": f"{family.name}: {len(manifest.routes)} routes, {manifest.precision}",
            "licenses": sorted({one["weights"]["license"] for one in family.anchors if _licensed(one)}),
        },
        "config": {
            "format": manifest.format,
            "precision": _PRECISIONS.get(manifest.precision, manifest.precision),
            "paramSize": _size(max(one.parameters for one in manifest.routes)),
            "capabilities": {"inputTypes": ["image"], "outputTypes": ["other"]},
        },
        "modelfs": {"type": "layers", "diffIds": [digests[name] for name in sorted(digests)]},
    }
    return _encoded(table)


def artifact_of(manifest: Manifest, files: Mapping[str, tuple[str, int]], config: bytes) -> bytes:
    """The artifact of a package.

    Args:
        files: digest and size in bytes of each file.
        config: what `config_of` gave.
    """
    routes = {one.file: one for one in manifest.routes if one.file is not None}
    layers = [
        {
            "mediaType": _media_type(name, manifest),
            "digest": digest,
            "size": size,
            "annotations": {FILE_PATH: name, TITLE: name, **(_about(routes[name]) if name in routes else {})},
        }
        for name, (digest, size) in sorted(files.items())
    ]
    table = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT,
        "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": layers,
        "annotations": _summary(manifest),
    }
    return _encoded(table)


def read_artifact(content: bytes, where: str) -> Artifact:
    """
    Args:
        where: its URL, for messages.

    Raises:
        RemoteError: it is no package that klas-zoo pushed.
    """
    table = parse(content, where, RemoteError)
    if table.get("artifactType") != ARTIFACT:
        kind = str(table.get("artifactType") or table.get("mediaType") or "something else")
        raise RemoteError(f"{where} is no package: it is {kind[:100]!a}, and packages are {ARTIFACT}.")
    found = convert(table, Artifact, where, RemoteError, more=True)
    names = [one.annotations.get(FILE_PATH) for one in found.layers]
    for name in names:
        convert(name, PlainName, where, RemoteError, path=f"{FILE_PATH}.")
    if MANIFEST not in names or len({str(name).lower() for name in names}) < len(names):
        raise RemoteError(f"{where} is no package of klas-zoo: it has no {MANIFEST}, or a file twice.")
    return found


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _licensed(anchor: Mapping[str, Any]) -> bool:
    weights = anchor.get("weights")
    return isinstance(weights, Mapping) and isinstance(weights.get("license"), str)


def _media_type(name: str, manifest: Manifest) -> str:
    if name == MANIFEST:
        return SETTINGS
    if name == manifest.references:
        return DATA
    return DOCUMENT if name.endswith((".json", ".md", ".sig")) else WEIGHT


def _about(route: PackagedRoute) -> dict[str, str]:
    """Accuracy and latency of the route that a layer is the engine of."""
    found = {f"{_OURS}.route": route.name, f"{_OURS}.macs": str(route.macs), f"{_OURS}.status": route.status}
    if route.top1 is not None:
        found |= {f"{_OURS}.top1": f"{route.top1:g}", f"{_OURS}.test-images": str(route.images)}
    if route.latencies:
        latencies = [{name: getattr(one, name) for name in _OF_A_LATENCY} for one in route.latencies]
        found[f"{_OURS}.latencies"] = json.dumps(latencies, sort_keys=True)
    return found


def _summary(manifest: Manifest) -> dict[str, str]:
    """What a list of artifacts may show without reading one."""
    found = {
        TITLE: manifest.family.name,
        f"{_OURS}.family": manifest.family.name,
        f"{_OURS}.format": manifest.format,
        f"{_OURS}.precision": manifest.precision,
        f"{_OURS}.routes": str(len(manifest.routes)),
    }
    accuracies = [one.top1 for one in manifest.routes if one.top1 is not None]
    if accuracies:
        found |= {f"{_OURS}.top1.min": f"{min(accuracies):g}", f"{_OURS}.top1.max": f"{max(accuracies):g}"}
    times = [one.p50_ms for route in manifest.routes for one in route.latencies if one.batch == 1]
    if times:
        found |= {f"{_OURS}.latency-ms.min": f"{min(times):.4g}", f"{_OURS}.latency-ms.max": f"{max(times):.4g}"}
    return found


def _size(parameters: int) -> str:
    for unit, scale in (("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12)):
        if parameters < 999.95 * scale or unit == "T":
            return f"{parameters / scale:.1f}{unit}"
    raise AssertionError


def _encoded(table: Mapping[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()

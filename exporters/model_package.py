"""onnxruntime's own model packages: a component for each route, all of them on one shared asset.

    manifest.json                         schema "1.0": components, variants, additional metadata
    shared_assets/sha256-<digest>/        the family: weights.bin, the graphs and the references of our own package

An application opens the folder, asks for a component by its route's name, and gets a session.
onnxruntime selects among the variants of a component by execution provider only; accuracy and latency
stand in `additional_metadata`, for the application to choose its route by.

The asset's digest is the SHA-256 of a text with a line for each file, sorted, as sha256sum writes it.

The additional metadata of the package and of its components together are the manifest of a package of our own,
by which it is checked again: `read_model_package` gives the asset as a `Package`. Their `sha256` is that of
the whole `manifest.json` without it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from klas_zoo.errors import DamagedPackage
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.manifest import (
    FIRST_SEALED_SCHEMA,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    PackagedRoute,
    route_to_json,
)
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.exporters.onnx_session import open_onnx
from klas_zoo.exporters.package import Package, not_as_written
from klas_zoo.exporters.package_verification import verify_routes
from klas_zoo.files import json_text, replacing, seal_of
from klas_zoo.reading import schema_of
from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER

FORMAT = "model-package"
_SEAL = "sha256"
_VARIANTS = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}


def derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]:
    """Fills an empty folder with a model package of all routes, and runs each where it now lies.

    Raises:
        ExportError: an engine does not run.
        OSError: a file cannot be written.
    """
    manifest = replace(package.manifest, format=FORMAT)
    asset = _asset(folder, manifest)
    asset.mkdir(parents=True)
    for name in manifest.files:
        shutil.copyfile(package.folder / name, asset / name)
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(_text(manifest), encoding="utf-8")
    artifacts = [
        Artifact(
            route=one.name, format=FORMAT, precision=manifest.precision, path=asset / package.engine(one).name
        )
        for one in package.routes
    ]
    return verify_routes(package, artifacts, partial(open_onnx, provider=CPU_PROVIDER, threads=None))


def read_model_package(folder: Path, table: Mapping[str, Any], digest: str) -> Package:
    """The asset of a model package, checked as `Package.open` checks ours.

    Args:
        table: what its `manifest.json` holds.
        digest: the SHA-256 of that file.

    Raises:
        NewerPackage: a newer klas-zoo wrote it.
        DamagedPackage: a file is missing, altered, cut short, a link, or reaches outside; or the components
            are not those that klas-zoo wrote for its routes.
    """
    where = str(folder / MANIFEST)
    components, about = table["components"], table.get("additional_metadata")
    if not isinstance(about, dict) or "files" not in about or not isinstance(components, dict):
        raise DamagedPackage(f"{where} is no model package that klas-zoo wrote: it has no metadata of a family.")
    _check_seal(folder / MANIFEST, table, digest)
    routes = [one.get("additional_metadata") if isinstance(one, dict) else None for one in components.values()]
    manifest = read_manifest({**about, "format": FORMAT, "routes": routes}, where)
    # components are sorted by name, routes of a package from small to large
    manifest = replace(manifest, routes=tuple(sorted(manifest.routes, key=lambda one: one.macs)))
    expected = json.loads(json.dumps(_manifest(manifest)["components"]))
    for name, component in components.items():
        if component != expected.get(name):
            raise DamagedPackage(f"{where}: the component {name} does not name what was written for a route of it.")
    asset = _asset(folder, manifest)
    for place in (asset.parent, asset):
        if place.is_symlink() or not place.is_dir():
            raise DamagedPackage(f"{place} is missing, or no folder of the package's own. Copy the package again.")
    package = Package(asset, manifest, digest)
    package.check(content=True)
    return package


def _check_seal(path: Path, table: Mapping[str, Any], digest: str) -> None:
    about = table["additional_metadata"]
    if not FIRST_SEALED_SCHEMA <= (schema_of(about) or 0) <= SCHEMA_VERSION:
        return
    others = {key: value for key, value in about.items() if key != _SEAL}
    whole = hashlib.sha256(json_text(table).encode()).hexdigest() == digest
    if not whole or about.get(_SEAL) != seal_of({**table, "additional_metadata": others}):
        raise not_as_written(path)


def _asset(folder: Path, manifest: Manifest) -> Path:
    return folder / "shared_assets" / _uri(manifest).replace(":", "-")


def _uri(manifest: Manifest) -> str:
    return asset_uri({name: entry.sha256 for name, entry in manifest.files.items()})


def asset_uri(hashes: Mapping[str, str]) -> str:
    """onnxruntime's name of a shared asset, from the SHA-256 of each of its files."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _text(manifest: Manifest) -> str:
    table = _manifest(manifest)
    about = {**table["additional_metadata"], _SEAL: seal_of(table)}
    return json_text({**table, "additional_metadata": about})


def _manifest(manifest: Manifest) -> dict[str, Any]:
    family = manifest.family
    about = manifest.to_json()
    return {
        "schema_version": "1.0",
        "package_name": family.name,
        "package_version": "1",
        "description": f"Routes of {family.name} in {manifest.precision}, one component each, from klas-zoo",
        "layout": "portable",
        "components": {one.name: _component(one, _uri(manifest)) for one in manifest.routes},
        "additional_metadata": {key: value for key, value in about.items() if key not in ("routes", "format")},
    }


def _component(route: PackagedRoute, uri: str) -> dict[str, Any]:
    def of_device(device: str, provider: str) -> dict[str, Any]:
        latencies = [one.to_json() for one in route.latencies if one.provider == provider]
        return {
            "ep": provider,
            "additional_metadata": {"device": device, "latencies": latencies},
            "executor_info": {"ort": {"model_file": f"{uri}/{route.file}"}},
        }

    return {
        "variants": {device: of_device(device, provider) for device, provider in _VARIANTS.items()},
        "additional_metadata": route_to_json(route),
    }

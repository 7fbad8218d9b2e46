"""onnxruntime's own model packages: a component for each route, all of them on one shared asset.

    manifest.json                         schema "1.0": components, variants, additional metadata
    shared_assets/sha256-<digest>/        the family: weights.bin, the graphs and the references of our own package

An application opens the folder, asks for a component by its route's name, and gets a session.
onnxruntime selects among the variants of a component by execution provider only; accuracy and latency
stand in `additional_metadata`, for the application to choose its route by.

The asset's digest is the SHA-256 of a text with a line for each file, sorted, as sha256sum writes it.

The additional metadata of the package and of its components together are the manifest of a package of our own,
by which it is checked again: `read_model_package` gives the asset as a `Package`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from klas_zoo.errors import DamagedPackage
from klas_zoo.exporters.contract import Artifact, Verdict, judge, of_references
from klas_zoo.exporters.manifest import MANIFEST, Manifest, PackagedRoute, read_manifest, route_to_json
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.precision import limits_for
from klas_zoo.exporters.verify import open_artifact
from klas_zoo.files import replacing
from klas_zoo.profiles.devices import CPU_PROVIDER, CUDA_PROVIDER

FORMAT = "model-package"
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
    text = json.dumps(_manifest(manifest), indent=1, sort_keys=True) + "\n"
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [_judged(package, one, asset) for one in package.routes]


def is_model_package(table: Any) -> bool:
    """Whether a `manifest.json` is that of a model package."""
    return isinstance(table, dict) and "components" in table


def read_model_package(folder: Path, table: Mapping[str, Any]) -> Package:
    """The asset of a model package, checked as `Package.open` checks ours.

    Args:
        table: what its `manifest.json` holds.

    Raises:
        NewerPackage: a newer klas-zoo wrote it.
        DamagedPackage: a file is missing, altered, cut short, a link, or reaches outside; or the components
            are not those that klas-zoo wrote for its routes.
    """
    where = str(folder / MANIFEST)
    components, about = table["components"], table.get("additional_metadata")
    if not isinstance(about, dict) or "files" not in about or not isinstance(components, dict):
        raise DamagedPackage(f"{where} is no model package that klas-zoo wrote: it has no metadata of a family.")
    routes = [one.get("additional_metadata") if isinstance(one, dict) else None for one in components.values()]
    manifest = read_manifest({**about, "format": FORMAT, "routes": routes}, where)
    # components are sorted by name, routes of a package from cheap to dear
    manifest = replace(manifest, routes=tuple(sorted(manifest.routes, key=lambda one: one.macs)))
    expected = json.loads(json.dumps(_manifest(manifest)["components"]))
    for name, component in components.items():
        if component != expected.get(name):
            raise DamagedPackage(f"{where}: the component {name} does not name what was written for a route of it.")
    asset = _asset(folder, manifest)
    for place in (asset.parent, asset):
        if place.is_symlink() or not place.is_dir():
            raise DamagedPackage(f"{place} is missing, or no folder of the package's own. Copy the package again.")
    package = Package(asset, manifest)
    package.check(content=True)
    return package


def _asset(folder: Path, manifest: Manifest) -> Path:
    return folder / "shared_assets" / _uri(manifest).replace(":", "-")


def _uri(manifest: Manifest) -> str:
    return asset_uri({name: entry.sha256 for name, entry in manifest.files.items()})


def asset_uri(hashes: Mapping[str, str]) -> str:
    """onnxruntime's name of a shared asset, from the SHA-256 of each of its files."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


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
        latencies = [asdict(one) for one in route.latencies if one.provider == provider]
        return {
            "ep": provider,
            "additional_metadata": {"device": device, "latencies": latencies},
            "executor_info": {"ort": {"model_file": f"{uri}/{route.file}"}},
        }

    return {
        "variants": {device: of_device(device, provider) for device, provider in _VARIANTS.items()},
        "additional_metadata": route_to_json(route),
    }


def _judged(package: Package, route: PackagedRoute, asset: Path) -> Verdict:
    precision = package.manifest.precision
    artifact = Artifact(
        route=route.name, format=FORMAT, precision=precision, path=asset / package.engine(route).name
    )
    return judge(
        artifact,
        lambda one: open_artifact(one, provider=CPU_PROVIDER, threads=None),
        of_references(package.references(), route.name),
        limits_for(precision, package.manifest.family.weights),
    )

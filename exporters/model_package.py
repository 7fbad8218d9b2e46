"""onnxruntime's own model packages: a component for each route, all of them on one shared asset.

    manifest.json                         schema "1.0": components, variants, additional metadata
    shared_assets/sha256-<digest>/        the family: weights.bin and the graphs, as in our own package
    references.safetensors                real images, and what torch answers

An application opens the folder, asks for a component by its route's name, and gets a session.
onnxruntime selects among the variants of a component by execution provider only; accuracy and latency
stand in `additional_metadata`, for the application to choose its route by.

The asset's digest is the SHA-256 of a text with a line for each file, sorted, as sha256sum writes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from klas_zoo.exporters.contract import Artifact, Verdict, judge, of_references
from klas_zoo.exporters.manifest import MANIFEST, PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.precision import limits_for
from klas_zoo.exporters.verify import open_artifact
from klas_zoo.files import replacing
from klas_zoo.profiles.devices import CPU_PROVIDER, CUDA_PROVIDER

_VARIANTS = {"cpu": CPU_PROVIDER, "cuda": CUDA_PROVIDER}


def derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]:
    """Fills an empty folder with a model package of all routes, and runs each where it now lies.

    Raises:
        ExportError: an engine does not run.
        OSError: a file cannot be written.
    """
    manifest = package.manifest
    assert manifest.weights is not None  # what it is made of is a package of graphs, which share one file
    names = [manifest.weights, *(package.engine(one).name for one in package.routes)]
    uri = asset_uri({name: manifest.files[name].sha256 for name in names})
    asset = folder / "shared_assets" / uri.replace(":", "-")
    asset.mkdir(parents=True)
    for name in names:
        shutil.copyfile(package.folder / name, asset / name)
    shutil.copyfile(package.folder / manifest.references, folder / manifest.references)
    text = json.dumps(_manifest(package, uri), indent=1, sort_keys=True) + "\n"
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [_judged(package, one, asset) for one in package.routes]


def asset_uri(hashes: Mapping[str, str]) -> str:
    """onnxruntime's name of a shared asset, from the SHA-256 of each of its files."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _manifest(package: Package, uri: str) -> dict[str, Any]:
    family = package.manifest.family
    return {
        "schema_version": "1.0",
        "package_name": family.name,
        "package_version": "1",
        "description": f"Routes of {family.name} in {package.manifest.precision}, one component each, from klas-zoo",
        "layout": "portable",
        "components": {one.name: _component(package, one, uri) for one in package.routes},
        "additional_metadata": {
            "family": asdict(family),
            "precision": package.manifest.precision,
            "provenance": dict(package.manifest.provenance),
        },
    }


def _component(package: Package, route: PackagedRoute, uri: str) -> dict[str, Any]:
    def of_device(device: str, provider: str) -> dict[str, Any]:
        latencies = [asdict(one) for one in route.latencies if one.provider == provider]
        return {
            "ep": provider,
            "additional_metadata": {"device": device, "latencies": latencies},
            "executor_info": {"ort": {"model_file": f"{uri}/{package.engine(route).name}"}},
        }

    return {
        "variants": {device: of_device(device, provider) for device, provider in _VARIANTS.items()},
        "additional_metadata": {
            "macs": route.macs,
            "parameters": route.parameters,
            "segments": route.route.to_json(),
            "status": route.status,
            "top1": route.top1,
            "test_images": route.images,
            "verification": None if route.verification is None else vars(route.verification),
        },
    }


def _judged(package: Package, route: PackagedRoute, asset: Path) -> Verdict:
    precision = package.manifest.precision
    artifact = Artifact(
        route=route.name, format="model-package", precision=precision, path=asset / package.engine(route).name
    )
    return judge(
        artifact,
        lambda one: open_artifact(one, provider=CPU_PROVIDER, threads=None),
        of_references(package.references(), route.name),
        limits_for(precision, package.manifest.family.weights),
    )

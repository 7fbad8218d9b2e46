"""A small family as a package, for the tests of everything that reads one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.fitting import exits_of, outcome_of
from klas_zoo.cascades.records import CascadeFacts
from klas_zoo.chains import Chain as Chain
from klas_zoo.exporters.cascade_fitting import time_paths, verify_cascade
from klas_zoo.exporters.family import PackageSource, VerificationImages, export_family
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.packaged_cascades import PackagedCascade, PackagedCascades, write_cascades
from klas_zoo.files import json_text, locked, seal_of, sha256_of
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.records import CascadeLatency, LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

SHAPE, CLASSES, DEPTH = (3, 16, 16), 5, 3
SLIM, WIDE = Route.anchor("slim", DEPTH), Route.anchor("wide", DEPTH)
STITCH = Route.stitch("slim", 2, "wide", 1, DEPTH)
ROUTES = (SLIM, STITCH, WIDE)
WIDTHS = {"slim": 24, "wide": 48}


def supernet(seed: int = 0) -> Supernet:
    """Two Vision Transformers and one stitch, without a weight that could be missed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        chains = {
            name: Chain.of(
                VisionTransformer(img_size=16, patch_size=8, embed_dim=width, depth=DEPTH, num_heads=2, num_classes=5),
                SHAPE,
            )
            for name, width in WIDTHS.items()
        }
        made = Supernet(chains, ROUTES)
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made.eval()


def batches(count: int = 24, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """In batches of 8; images are noise, and labels what the wide anchor says of them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *SHAPE, generator=generator)
    with torch.no_grad():
        labels = supernet()(images, WIDE).argmax(1)
    yield from zip(images.split(8), labels.split(8), strict=True)


def latency(p50_ms: float, **changes: Any) -> LatencyRecord:
    facts = {
        "device": "cpu", "hardware": "made up", "runtime": "onnxruntime", "runtime_version": "1", "threads": 1,
        "provider": "CPUExecutionProvider", "precision": "fp32", "batch": 1, "shape": (1, *SHAPE), "runs": 50,
        "min_ms": p50_ms * 0.9, "p50_ms": p50_ms, "p90_ms": p50_ms * 1.2, "p99_ms": p50_ms * 1.5,
        "coefficient_of_variation": 0.1, "origin": "measured", "measured_at": "2026-11-24T00:00:00+00:00",
    }  # fmt: skip
    return LatencyRecord(**{**facts, **changes})


def source(**changes: Any) -> PackageSource:
    routes = tuple(
        PackagedRoute(
            route=route, file=None, macs=1000 * (index + 1), parameters=10, top1=60.0 + 10 * index, images=24,
            on_frontier=True, verification=None, latencies=(latency(1.0 + index),),
        )
        for index, route in enumerate(ROUTES)
    )  # fmt: skip
    facts = FamilyFacts(
        name="made-up", input_shape=SHAPE, num_classes=CLASSES, weights="pretrained",
        data_config={"mean": [0.5] * 3, "std": [0.2] * 3}, anchors=tuple({"name": n, "depth": DEPTH} for n in WIDTHS),
    )  # fmt: skip
    made = PackageSource(facts=facts, routes=routes, load=lambda routes: supernet(), provenance={"build_id": 7})
    return replace(made, **changes)


SHARED: Path | None = None
"""A folder of all processes of a test run, set by conftest.py."""


def write_package(out: Path, *, precision: str = "fp32", fresh: bool = False, **changes: Any) -> Package:
    """A package of its own at `out`. Those without changes are made once a test run, and copied unless `fresh`."""
    if SHARED is None or fresh or changes:
        return _made(out, precision, **changes)
    kept = SHARED / f"package-{precision}"
    with locked(SHARED / f"{kept.name}.lock"):
        if not kept.is_dir():
            _made(kept, precision)
    shutil.copytree(kept, out)
    return Package.open(out)


def _made(out: Path, precision: str, **changes: Any) -> Package:
    images = VerificationImages(test=batches, calibration=lambda: batches(16, seed=2))
    return export_family(source(**changes), out, precision=precision, images=images, threads=1).package


def carry_cascade(
    package: Package, *, fingerprint: str = "", latencies: tuple[CascadeLatency, ...] = (),
    routes: Sequence[str] = ("slim", "slim.1-2+wide.2-3"),
) -> tuple[Package, PackagedCascade]:  # fmt: skip
    """Adds a cascade to a package, timed here unless latencies are given; half of its references go on, 75 % top-1."""
    stored = package.references()
    sure = np.sort(confidence(stored.logits[routes[0]], "probability"))
    form = f"{routes[0]} ?p<{(sure[7] + sure[8]) / 2:.6f} -> {routes[1]}"
    cascade = Cascade.parse(form, lambda name: package.route(name).route)
    logits = {route: stored.logits[str(route)] for route in cascade.routes}
    seen = outcome_of(exits_of(cascade, logits), len(stored.images) * 3 // 4, 2)
    how: dict[str, Any] = {"provider": "CPUExecutionProvider", "threads": 1}
    if not latencies:
        times = time_paths(package, [cascade], device=resolve_device("cpu"), **how)
        latencies = (times.latency(cascade, seen.shares, "cpu"),)
    one = PackagedCascade(
        cascade=cascade, facts=CascadeFacts(heldout=seen, test=seen), macs=10, worst_macs=20, parameters=5,
        size_bytes=1000, verification=verify_cascade(package, cascade, **how), latencies=latencies,
    )  # fmt: skip
    found = PackagedCascades(cascades=(one,), data={"description": "noise", "fingerprint": fingerprint})
    write_manifest(package.folder, write_cascades(package.folder, package.manifest, found))
    return Package.open(package.folder), one


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest, of whichever format, as somebody would who wants it to be believed."""
    table = json.loads((folder / "manifest.json").read_text())
    change(table)
    holder = table.get("additional_metadata", {}) if "components" in table else table
    if isinstance(holder, dict) and holder.pop("sha256", None):
        holder["sha256"] = seal_of(table)
    (folder / "manifest.json").write_text(json_text(table))


def rehash(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file that was altered."""
    path = folder / name
    entry = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    edit(folder, lambda manifest: manifest["files"].update({name: entry}))

"""A small family as a package, for the tests of everything that reads one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from klas_zoo.architectures import to_chain
from klas_zoo.chains import Chain as Chain
from klas_zoo.exporters.family import Images, Source, export_family
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.profiles.records import LatencyRecord
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
            name: to_chain(
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


def source(**changes: Any) -> Source:
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
    made = Source(facts=facts, routes=routes, load=lambda routes: supernet(), provenance={"build_id": 7})
    return replace(made, **changes)


def write_package(out: Path, *, precision: str = "fp32", **changes: Any) -> Package:
    images = Images(test=batches, calibration=lambda: batches(16, seed=2))
    package, _ = export_family(source(**changes), out, precision=precision, images=images, threads=1)
    return package

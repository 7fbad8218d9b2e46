"""Cascades of packages as engines of the registry. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from klas_zoo.exporters.manifest import Manifest
from klas_zoo.exporters.packaged_cascades import CASCADES, PackagedCascade
from klas_zoo.registry.records import NewEngine


def new_cascade(
    one: PackagedCascade, manifest: Manifest, folder: Path, *, device: str, **accuracy: Any
) -> NewEngine:
    """A cascade of a package to register.

    Args:
        manifest, folder: of the package, which has it in its file of cascades.
        accuracy: fields of `NewEngine` that say where its top-1 is from.
    """
    family = manifest.family
    return NewEngine(
        family=family.name, route=one.cascade, cascade=one.facts, device=device, format="onnx", runtime="onnxruntime",
        precision=manifest.precision, macs=one.macs, parameters=one.parameters, input_shape=family.input_shape,
        num_classes=family.num_classes, preprocessing=dict(family.data_config), verification=one.verification,
        latencies=one.latencies, weights=family.weights, file=folder / CASCADES, size_bytes=one.size_bytes,
        **{"top1": one.facts.test.top1, "images": one.facts.test.images, **accuracy},
    )  # fmt: skip

"""A package whose route was refused: it holds nothing of it, and what is left still computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import onnx
import packages
import torch

from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.family import Images, export_family
from klas_zoo.exporters.graphs import ALIGNMENT, tensors_of
from klas_zoo.exporters.package import Package
from klas_zoo.supernet import Supernet


def too_large_for_fp16() -> Supernet:
    """Only the wide anchor runs its own first block, whose weights become infinite in fp16."""
    supernet = packages.supernet()
    with torch.no_grad():
        supernet.chain("wide").blocks[0].mlp.fc1.weight *= 1e6
    return supernet


def places(package: Package) -> dict[int, int]:
    """Offset and length of everything that graphs read from the weights file."""
    return {
        int(place["offset"]): int(place["length"])
        for one in package.routes
        for tensor in tensors_of(onnx.load(package.engine(one), load_external_data=False))
        if (place := {entry.key: entry.value for entry in tensor.external_data})
    }


def test_weights_of_refused_routes_are_left_out(tmp_path: Path) -> None:
    images = Images(test=packages.batches, calibration=packages.batches)
    source = packages.source(load=lambda routes: too_large_for_fp16())
    package, verdicts = export_family(source, tmp_path / "p", precision="fp16", images=images, threads=1)
    assert [one.status for one in verdicts] == ["verified", "verified", "refused"]
    assert [one.route for one in package.routes] == [packages.SLIM, packages.STITCH]
    whole = packages.write_package(tmp_path / "whole", precision="fp16")
    found, size = places(package), package.weights.stat().st_size
    assert size == max(offset + length for offset, length in found.items())
    assert size <= sum(-(-length // ALIGNMENT) * ALIGNMENT for length in found.values())
    assert size < whole.weights.stat().st_size - packages.WIDTHS["wide"] ** 2 * 12 * 2  # a block of the wide anchor
    assert {path.name for path in package.folder.iterdir()} == {"manifest.json", *package.manifest.files}
    assert package.weights.stat().st_mode == package.engine(package.routes[0]).stat().st_mode
    assert [one.status for one in verify_package(package.folder, threads=1)] == ["verified"] * 2

"""What export verifies and how often it decodes; what a package holds of refused routes; what `verify` finds in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packages
import pytest
import torch
from safetensors.numpy import load_file, save

from klas_zoo.errors import KlasZooError
from klas_zoo.exporters import onnx_session
from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.contract import Artifact, OpenedEngine
from klas_zoo.exporters.family import VerificationImages, export_family
from klas_zoo.exporters.graphs import ALIGNMENT, tensors_of
from klas_zoo.exporters.onnx_session import allowed_sizes, open_onnx, verify_onnx
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.reference_logits import ReferenceLogits
from klas_zoo.exporters.weights import deployed_bytes
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.supernet import Supernet


def uneven() -> Supernet:
    """Only the wide anchor runs its own first block, one of whose numbers takes all 256 steps that int8 has."""
    supernet = packages.supernet()
    with torch.no_grad():
        block = supernet.chain("wide").blocks[0]
        block.mlp.fc1.weight[0] *= 1e6
        block.mlp.fc1.bias[0] *= 1e6
        block.mlp.fc2.weight[:, 0] *= 1e-6
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
    images = VerificationImages(test=packages.batches, calibration=packages.batches)
    source = packages.source(load=lambda routes: uneven())
    made = export_family(source, tmp_path / "p", precision="int8", images=images, threads=1)
    package = made.package
    assert [one.status for one in made.verdicts] == ["verified", "verified", "refused"]
    assert [one.route for one in package.routes] == [packages.SLIM, packages.STITCH]
    whole = packages.write_package(tmp_path / "whole", precision="int8", fresh=True)
    found, size = places(package), package.weights.stat().st_size
    assert size == max(offset + length for offset, length in found.items())
    assert size <= sum(-(-length // ALIGNMENT) * ALIGNMENT for length in found.values())
    assert size < whole.weights.stat().st_size - packages.WIDTHS["wide"] ** 2 * 12  # a block of the wide anchor
    assert {path.name for path in package.folder.iterdir()} == {"manifest.json", *package.manifest.files}
    assert package.weights.stat().st_mode == package.engine(package.routes[0]).stat().st_mode
    assert [one.status for one in verify_package(package.folder, threads=1)] == ["verified"] * 2


def test_test_images_are_decoded_once_for_all_routes_references_and_precisions(tmp_path: Path) -> None:
    decoded: list[int] = []

    def test_images() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in packages.batches():
            decoded.append(len(images))
            yield images, labels

    images = VerificationImages(test=test_images, calibration=lambda: packages.batches(16, seed=2))
    first = export_family(packages.source(), tmp_path / "fp32", precision="fp32", images=images, threads=1)
    second = export_family(
        packages.source(), tmp_path / "fp16", precision="fp16", images=images, threads=2, reference=first.reference
    )
    assert decoded == [8, 8, 8]
    for made in (first, second):
        assert [one.status for one in made.verdicts] == ["verified"] * 3
        assert {one.verification.images for one in made.verdicts if one.verification} == {24}
    stored = second.package.references()
    expected = torch.cat([batch for batch, _ in packages.batches()])[:16]
    assert np.array_equal(stored.images, expected.numpy())


def edited_references(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Replaces the stored images and logits, with the hash that belongs to them."""
    path = folder / "references.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    change(tensors)
    path.write_bytes(save(tensors))
    packages.rehash(folder, path.name)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_changed_reference_logit_is_found(precision: str, tmp_path: Path) -> None:
    folder = packages.write_package(tmp_path / "p", precision=precision, fresh=True).folder
    name = str(packages.STITCH)

    def change(tensors: dict[str, np.ndarray]) -> None:
        logits = tensors[f"logits/{name}"]
        logits[3, 2] += (1e-3 if precision == "fp32" else 3.0) * logits.std()

    edited_references(folder, change)
    verdicts = {one.artifact.route: one for one in verify_package(folder, threads=1)}
    assert verdicts.pop(name).status == "refused"
    assert {one.status for one in verdicts.values()} == {"verified"}


def test_an_unknown_precision_in_a_manifest_is_one_sentence(tmp_path: Path) -> None:
    folder = packages.write_package(tmp_path / "p", fresh=True).folder
    packages.edit(folder, lambda manifest: manifest.update(precision="fp12"))
    with pytest.raises(KlasZooError, match="fp12"):
        verify_package(folder, threads=1)


@pytest.mark.parametrize(
    ("smallest", "largest", "sizes"),
    [(1, None, ()), (1, 4, (4,)), (1, 64, (8,)), (16, 32, (16,)), (1, 1, (1,)), (16, None, (16,))],
)
def test_an_engine_is_verified_with_a_batch_that_it_takes(
    smallest: int, largest: int | None, sizes: tuple[int, ...]
) -> None:
    assert allowed_sizes(smallest, largest) == sizes


@pytest.mark.parametrize("size", [1, 5, 32])
def test_an_engine_of_one_batch_size_is_verified_in_it_on_all_images(size: int, tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "p")
    stored = package.references()
    path = package.engine(package.routes[0])
    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    path.write_bytes(model.SerializeToString())
    artifact = Artifact(route=package.routes[0].name, format="onnx", precision="fp32", path=path)
    reference = ReferenceLogits.of_arrays(stored.images, stored.logits)
    (found,) = verify_onnx([artifact], reference, "pretrained", provider=CPU_PROVIDER, threads=1)
    assert found.status == "verified", found.reason
    assert found.verification is not None and found.verification.images == len(stored.images)


def test_engines_share_the_threads_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = packages.write_package(tmp_path / "p", fresh=True)
    stored = package.references()
    reference = ReferenceLogits.of_arrays(stored.images, stored.logits)
    artifacts = [
        Artifact(route=one.name, format="onnx", precision="fp32", path=package.engine(one)) for one in package.routes
    ]
    opened: list[int | None] = []

    def watched(artifact: Artifact, **options: Any) -> OpenedEngine:
        opened.append(options["threads"])
        return open_onnx(artifact, **options)

    monkeypatch.setattr(onnx_session, "open_onnx", watched)
    for threads, each in ((1, 1), (2, 1), (7, 2)):
        opened.clear()
        verdicts = verify_onnx(artifacts, reference, "pretrained", provider=CPU_PROVIDER, threads=threads)
        assert [one.artifact for one in verdicts] == artifacts
        assert {one.status for one in verdicts} == {"verified"}
        assert opened == [each] * 3
    largest = deployed_bytes(package.engine(package.routes[-1]))
    monkeypatch.setattr(onnx_session, "_MOST_BYTES", 2 * largest - 1)
    opened.clear()
    verdicts = verify_onnx(artifacts, reference, "pretrained", provider=CPU_PROVIDER, threads=2)
    assert [one.artifact for one in verdicts] == artifacts
    assert opened == [1, 1, 2]  # the largest runs alone, with all threads

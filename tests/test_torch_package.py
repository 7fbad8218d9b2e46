"""Packages for torch: the supernet's numbers, read back without running anything."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import packages
import pytest
import torch
from safetensors import safe_open

from klas_zoo.errors import DamagedPackage, UsageError
from klas_zoo.exporters.family import VerificationImages
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.torch_package import export_torch, load_supernet

IMAGES = VerificationImages(test=packages.batches, calibration=packages.batches)


def chains(seed: int = 9) -> dict[str, packages.Chain]:
    supernet = packages.supernet(seed)
    return {name: supernet.chain(name) for name in packages.WIDTHS}


@pytest.mark.parametrize(("precision", "apart"), [("fp32", 0.0), ("fp16", 0.01), ("bf16", 0.1)])
def test_what_is_loaded_computes_what_was_exported(precision: str, apart: float, tmp_path: Path) -> None:
    package, verdicts = export_torch(packages.source(), tmp_path / "p", precision=precision, images=IMAGES)
    assert [one.status for one in verdicts] == ["verified"] * 3
    loaded, original = load_supernet(Package.open(tmp_path / "p"), chains()), packages.supernet()
    images = next(packages.batches())[0]
    with torch.no_grad():
        for route in packages.ROUTES:
            wanted = original(images, route)
            difference = (loaded(images, route) - wanted).abs().max() / wanted.std()
            assert difference <= apart
            assert (difference == 0) == (precision == "fp32")
    assert {path.name for path in package.folder.iterdir()} == {
        "manifest.json", "bom.cdx.json", "weights.safetensors", "references.safetensors"
    }  # fmt: skip


def test_narrow_weights_take_half_the_place(tmp_path: Path) -> None:
    sizes = [
        export_torch(packages.source(), tmp_path / name, precision=name, images=IMAGES)[0].weights.stat().st_size
        for name in ("fp32", "fp16")
    ]
    assert 0.49 < sizes[1] / sizes[0] < 0.55


def test_fewer_routes_bring_only_what_they_need(tmp_path: Path) -> None:
    """Layers are numbered by the seams that are there: another number would be another layer."""
    whole = packages.source()
    fewer = replace(whole, routes=whole.routes[:1])
    package, _ = export_torch(fewer, tmp_path / "p", precision="fp32", images=IMAGES)
    with safe_open(package.weights, "pt") as file:
        assert {name.split(".")[1] for name in file.keys()} == {"anchor_slim"}  # noqa: SIM118  it is no dict
    images = next(packages.batches())[0]
    with torch.no_grad():
        found, wanted = (net(images, packages.SLIM) for net in (load_supernet(package, chains()), packages.supernet()))
    assert torch.equal(found, wanted)


def test_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes --precision fp32, fp16, bf16, not int8"):
        export_torch(packages.source(), tmp_path / "p", precision="int8", images=IMAGES)
    assert not (tmp_path / "p").exists()


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", [pickle.dumps(_Evil()), b""], ids=["a pickle", "nothing"])
def test_weights_that_are_no_numbers_are_refused_and_not_run(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package, _ = export_torch(packages.source(), tmp_path / "p", precision="fp32", images=IMAGES)
    package.weights.write_bytes(content)
    with pytest.raises(DamagedPackage, match=r"weights\.safetensors does not hold the weights"):
        load_supernet(package, chains())
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_family_and_other_formats_are_refused(tmp_path: Path) -> None:
    package, _ = export_torch(packages.source(), tmp_path / "p", precision="fp32", images=IMAGES)
    swapped = dict(zip(packages.WIDTHS, reversed(chains().values()), strict=True))
    with pytest.raises(DamagedPackage, match="does not hold the weights of this family"):
        load_supernet(package, swapped)
    with pytest.raises(UsageError, match="is of format onnx, not torch"):
        load_supernet(packages.write_package(tmp_path / "onnx"), chains())

"""`klas-zoo verify` reads every format that `export` writes, and names what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packages import edit
from test_cli import run
from test_exporting import FLOAT, HALF, STITCH, export
from test_exporting import place as place  # a fixture

from klas_zoo.errors import PackageError
from klas_zoo.exporters.checking import open_package
from klas_zoo.runtimes import NOT_RUN

FORMATS = ("torch", "model-package")


@pytest.fixture(scope="module")
def written(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package in each format."""
    folder = tmp_path_factory.mktemp("formats")
    for form in FORMATS:
        code, _, error = export(place, folder / form, "--format", form)
        assert code == 0, error
    return {form: folder / form for form in FORMATS}


@pytest.fixture
def torch_package(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["torch"], tmp_path / "package"))


@pytest.fixture
def model_package(written: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(written["model-package"], tmp_path / "package"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_whole_package_is_run_against_its_stored_answers(form: str, written: dict[str, Path]) -> None:
    code, out, error = run("verify", written[form], "--threads", 1, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert [(one["route"], one["status"]) for one in found] == [
        (str(route), "verified") for route in (HALF, STITCH, FLOAT)
    ]
    assert all(one["verification"]["images"] == 16 for one in found)


@pytest.mark.parametrize("form", ["onnx", *FORMATS])
def test_a_package_whose_files_have_several_names_is_verified(
    form: str, place: Path, written: dict[str, Path], tmp_path: Path
) -> None:
    """Hard links are what backups, image stores and deduplication leave."""
    if form == "onnx":
        assert export(place, tmp_path / "first", "--routes", HALF)[0] == 0
    else:
        shutil.copytree(written[form], tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second", copy_function=os.link)
    for name in ("first", "second"):
        code, _, error = run("verify", tmp_path / name, "--threads", 1)
        assert code == 0, error


def test_narrow_torch_weights_are_measured_by_their_own_limits(place: Path, tmp_path: Path) -> None:
    assert export(place, tmp_path / "p", "--format", "torch", "--precision", "fp16", "--routes", STITCH)[0] == 0
    code, out, error = run("verify", tmp_path / "p", "--json")
    assert code == 0, error
    assert 0 < json.loads(out)[0]["verification"]["max_abs_difference"] < 0.1


def anchor(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["family"]["anchors"][0].update(changes)

    return change


def test_routes_that_are_recorded_as_verified_and_cannot_be_run_here_fail(torch_package: Path) -> None:
    def without_model(manifest: dict[str, Any]) -> None:
        for one in manifest["family"]["anchors"]:
            del one["model"]

    for change, says in ((anchor(model="of_a_newer_timm"), "of_a_newer_timm"), (without_model, "no models of timm")):
        edit(torch_package, change)
        code, out, error = run("verify", torch_package, "--json")
        found = json.loads(out)
        assert code == 1 and {one["status"] for one in found} == {NOT_RUN}
        assert says in found[0]["reason"] and says in error
        assert "0 verified, 3 not runnable here, 0 failed." in error
        assert "cannot be verified on this machine, although the package records them as verified" in error

    def unverified(manifest: dict[str, Any]) -> None:
        for one in manifest["routes"]:
            one["verification"] = None

    edit(torch_package, unverified)
    code, _, error = run("verify", torch_package)
    assert code == 0 and error.strip() == "0 verified, 3 not runnable here, 0 failed."


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_verified_is_counted_and_other_files_are_named(
    form: str, written: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written[form], tmp_path / "package"))
    _, _, error = run("verify", folder)
    assert error.strip() == "3 verified, 0 not runnable here, 0 failed."
    place = asset(folder) if form == "model-package" else folder
    (place / "evil.py").touch()
    (folder / "notes").touch()
    code, _, error = run("verify", folder)
    names = ", ".join(sorted(str(path.relative_to(folder)) for path in (place / "evil.py", folder / "notes")))
    assert code == 0 and f"Not part of the package, and not looked at: {names}." in error


def asset(folder: Path) -> Path:
    (found,) = (folder / "shared_assets").iterdir()
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def linked(place: Path) -> None:
    outside = place.parent.parent / "outside"
    shutil.move(place, outside)
    place.symlink_to(outside)


@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_bit_of_any_file_is_found(form: str, written: dict[str, Path], tmp_path: Path) -> None:
    """A few of each file; benchmarks/fault_injection.py flips 2,000 at random."""
    folder = Path(shutil.copytree(written[form], tmp_path / "package"))
    for path in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 1 + 8 * len(content) // 23):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(PackageError):
                open_package(folder)
        path.write_bytes(content)
    open_package(folder)


TORCH: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda f: flip(f / "weights.safetensors"), "weights.safetensors is not the file"),
    "cut short": (lambda f: os.truncate(f / "weights.safetensors", 99), "weights.safetensors is cut short"),
    "missing": (lambda f: (f / "references.safetensors").unlink(), "references.safetensors is missing"),
    "a link": (lambda f: linked(f / "weights.safetensors"), "weights.safetensors is a link"),
    "a path outside": (
        lambda f: edit(f, lambda m: m.update(weights="../weights.safetensors")), "names '../weights.safetensors' for"
    ),
    "other anchors": (
        lambda f: edit(f, anchor(arguments={"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3})),
        "does not hold the weights of this family",
    ),
    "anchors nobody can build": (
        lambda f: edit(f, anchor(arguments={"embed_dim": "wide"})), "describes anchors that cannot be built"
    ),
    "a file as an argument": (
        lambda f: edit(f, anchor(arguments={"checkpoint_path": "evil.pth"})), "(deit_tiny_patch16_224) checkpoint"
    ),
    "weights from a hub": (
        lambda f: edit(f, anchor(arguments={"pretrained": True})), "(deit_tiny_patch16_224) pretrained, which no"
    ),
    "an argument that is no number": (
        lambda f: edit(f, anchor(arguments={"norm_layer": {"a": 1}})), "what is no number or text"
    ),
    "no arguments": (lambda f: edit(f, anchor(arguments=None)), "an anchor that cannot be understood"),
    "a newer schema": (lambda f: edit(f, lambda m: m.update(schema_version=99)), "written by a newer klas-zoo"),
    "an unknown format": (lambda f: edit(f, lambda m: m.update(format="gguf")), "format gguf, which this klas-zoo"),
}  # fmt: skip


def component(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda manifest: change(manifest["components"]["half"]))


def model_file(value: str) -> Callable[[Path], object]:
    def change(one: dict[str, Any]) -> None:
        one["variants"]["cpu"]["executor_info"]["ort"]["model_file"] = value

    return component(change)


MODEL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in the weights": (lambda f: flip(asset(f) / "weights.bin"), "weights.bin is not the file"),
    "a flipped bit in a graph": (lambda f: flip(asset(f) / "half.onnx"), "half.onnx is not the file"),
    "a flipped bit in the references": (
        lambda f: flip(asset(f) / "references.safetensors"), "references.safetensors is not the file"
    ),
    "cut short": (lambda f: os.truncate(asset(f) / "weights.bin", 99), "weights.bin is cut short"),
    "missing": (lambda f: (asset(f) / "float.onnx").unlink(), "float.onnx is missing"),
    "no asset": (lambda f: shutil.rmtree(asset(f)), "is missing, or no folder of the package's own"),
    "an asset elsewhere": (lambda f: linked(asset(f)), "is missing, or no folder of the package's own"),
    "a link": (lambda f: linked(asset(f) / "weights.bin"), "weights.bin is a link"),
    "a graph outside": (model_file("../../evil.onnx"), "the component half does not name what was written"),
    "another asset's graph": (model_file(f"sha256:{'0' * 64}/half.onnx"), "the component half does not name"),
    "a variant more": (
        component(lambda one: one["variants"].update(evil={"ep": "CPUExecutionProvider"})), "the component half does"
    ),
    "no metadata": (component(lambda one: one.pop("additional_metadata")), "manifest.json: routes[1] is not valid"),
    "of somebody else": (lambda f: edit(f, lambda m: m.pop("additional_metadata")), "no model package that klas-zoo"),
    "components that are none": (lambda f: edit(f, lambda m: m.update(components=[])), "no model package that klas"),
    "a newer schema": (
        lambda f: edit(f, lambda m: m["additional_metadata"].update(schema_version=99)), "written by a newer klas-zoo"
    ),
}  # fmt: skip


def refused(folder: Path, says: str) -> None:
    code, out, error = run("verify", folder)
    assert (code, out) == (1, "")
    assert says in error, error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("damage", "says"), TORCH.values(), ids=TORCH)
def test_a_damaged_torch_package_is_refused_by_one_sentence(
    damage: Callable[[Path], object], says: str, torch_package: Path
) -> None:
    damage(torch_package)
    refused(torch_package, says)


@pytest.mark.parametrize(("damage", "says"), MODEL.values(), ids=MODEL)
def test_a_damaged_model_package_is_refused_by_one_sentence(
    damage: Callable[[Path], object], says: str, model_package: Path
) -> None:
    damage(model_package)
    refused(model_package, says)

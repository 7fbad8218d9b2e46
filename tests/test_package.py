"""Reading a package: what is whole is read, whatever was altered is refused by one sentence that names the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packages
import pytest
from packages import edit, rehash
from safetensors.numpy import load_file, save_file

from klas_zoo.errors import DamagedPackage, NewerPackage, PackageError, UnknownName
from klas_zoo.exporters.package import Package
from klas_zoo.files import sha256_of


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "package"))


def test_a_package_tells_its_routes_smallest_first_with_all_that_is_known_of_them(whole: Path) -> None:
    package = Package.open(whole)
    assert [one.route for one in package.routes] == list(packages.ROUTES)
    assert package.manifest.provenance == {"build_id": 7}
    for one in package.routes:
        assert one.status == "verified" and one.verification is not None and one.verification.images == 24
        assert one.latencies[0].shape == (1, *packages.SHAPE)
        assert package.engine(one).is_file()
    with pytest.raises(UnknownName, match="did you mean wide"):
        package.route("wid")


def test_the_folder_holds_one_weights_file_and_plain_files_only(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    graphs = {f"{route}.onnx" for route in packages.ROUTES}
    assert names == {"manifest.json", "bom.cdx.json", "weights.bin", "references.safetensors", *graphs}
    assert all(path.is_file() and not path.is_symlink() for path in whole.iterdir())
    modes = {path.stat().st_mode for path in whole.iterdir()}
    assert len(modes) == 1


def test_reading_a_package_needs_neither_torch_nor_onnxruntime(whole: Path) -> None:
    code = (
        "import sys; from klas_zoo.exporters.package import Package\n"
        f"package = Package.open({str(whole)!r}); package.references()\n"
        "assert not {'torch', 'onnxruntime', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_references_are_images_and_what_torch_answers(whole: Path) -> None:
    references = Package.open(whole).references()
    assert references.images.shape == (16, *packages.SHAPE)
    assert set(references.logits) == set(map(str, packages.ROUTES))


def _link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.bin"
    shutil.move(folder / "weights.bin", outside)
    (folder / "weights.bin").symlink_to(outside)


def _fifo(folder: Path) -> None:
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")


def _flip(name: str) -> Callable[[Path], None]:
    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return flip


def _cut(folder: Path) -> None:
    os.truncate(folder / "weights.bin", (folder / "weights.bin").stat().st_size - 1)


def _graph(change: Callable[[onnx.TensorProto], object]) -> Callable[[Path], None]:
    """Alters the place of a weight in a graph, and the graph's hash."""

    def alter(folder: Path) -> None:
        model = onnx.load(str(folder / "slim.onnx"), load_external_data=False)
        change(next(one for one in model.graph.initializer if one.external_data))
        (folder / "slim.onnx").write_bytes(model.SerializeToString())
        rehash(folder, "slim.onnx")

    return alter


def _place(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def _pickled(name: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(_Evil()))
        rehash(folder, name)

    return put


def _torch_pickle(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(format="torch"))
    _pickled("weights.bin")(folder)


def _renamed(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        def change(manifest: dict[str, Any]) -> None:
            manifest["files"][name] = manifest["files"].pop("weights.bin")
            manifest["weights"] = name

        edit(folder, change)

    return rename


def _short_references(folder: Path) -> None:
    tensors = load_file(folder / "references.safetensors")
    tensors["logits/slim"] = np.zeros((3, packages.CLASSES), np.float32)
    save_file(tensors, folder / "references.safetensors")
    rehash(folder, "references.safetensors")


def _without_graph(manifest: dict[str, Any]) -> None:
    del manifest["files"]["slim.onnx"]


def _not_passed(manifest: dict[str, Any]) -> None:
    manifest["routes"][0]["verification"]["max_abs_difference"] = 1e9


DAMAGE: dict[str, tuple[Callable[[Path], object], type[PackageError], str]] = {
    "a flipped bit in the weights": (_flip("weights.bin"), DamagedPackage, r"weights\.bin is not the file"),
    "a flipped bit in a graph": (_flip("slim.onnx"), DamagedPackage, r"slim\.onnx is not the file"),
    "a flipped bit in the references": (_flip("references.safetensors"), DamagedPackage, r"references\.safetensors is"),
    "a file cut short": (_cut, DamagedPackage, r"weights\.bin is cut short"),
    "a file that is gone": (lambda f: (f / "slim.onnx").unlink(), DamagedPackage, r"slim\.onnx is missing"),
    "a link to outside": (_link_outside, DamagedPackage, r"weights\.bin is a link"),
    "a pipe that would never end": (_fifo, DamagedPackage, r"weights\.bin is no regular file"),
    "a path that leaves the folder": (_renamed("../outside.bin"), DamagedPackage, r"'\.\./outside\.bin', which is no"),
    "an absolute path": (_renamed("/etc/passwd"), DamagedPackage, r"manifest\.json names a file '/etc/passwd'"),
    "a hidden name": (_renamed(".."), DamagedPackage, r"manifest\.json names a file '\.\.'"),
    "the manifest as its own file": (_renamed("manifest.json"), DamagedPackage, r"manifest\.json names a file"),
    "a graph that no file is": (
        lambda f: edit(f, _without_graph), DamagedPackage, r"manifest\.json names 'slim\.onnx' for its route slim"
    ),
    "a weight beyond the end": (
        _graph(_place("offset", str(2**40))), DamagedPackage, r"slim\.onnx reads '.+' beyond the end of weights\.bin"
    ),
    "a weight before the start": (_graph(_place("offset", "-4096")), DamagedPackage, r"slim\.onnx reads '.+' beyond"),
    "a weight off its page": (_graph(_place("offset", "8")), DamagedPackage, r"slim\.onnx reads '.+' from a place"),
    "a weight of another length": (_graph(_place("length", "4")), DamagedPackage, r"slim\.onnx reads '.+' from a pl"),
    "a weight without a place": (_graph(_place("offset", "x")), DamagedPackage, r"slim\.onnx does not say where"),
    "a weight in another file": (
        _graph(_place("location", "../../secret")), DamagedPackage, r"slim\.onnx reads '.+' from '\.\./\.\./secret'"
    ),
    "a graph that is a pickle": (_pickled("slim.onnx"), DamagedPackage, r"slim\.onnx is no ONNX graph"),
    "references that are a pickle": (
        _pickled("references.safetensors"), DamagedPackage, r"references\.safetensors is no safetensors file"
    ),
    "weights that are a pickle": (_torch_pickle, DamagedPackage, r"weights\.bin is no safetensors file"),
    "references of other images": (_short_references, DamagedPackage, r"references\.safetensors holds no answers of"),
    "a newer schema": (
        lambda f: edit(f, lambda m: m.update(schema_version=3)), NewerPackage, r"manifest\.json .* its schema is 3"
    ),
    "no schema": (lambda f: edit(f, lambda m: m.pop("schema_version")), DamagedPackage, "has no schema_version"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), DamagedPackage, r"manifest\.json is not JSON"),
    "deep JSON": (lambda f: (f / "manifest.json").write_text("[" * 10**6), DamagedPackage, r"manifest\.json is not"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), DamagedPackage, "is no manifest"),
    "no routes": (lambda f: edit(f, lambda m: m.update(routes=[])), DamagedPackage, r"json: routes is not valid"),
    "a route that did not pass": (
        lambda f: edit(f, _not_passed), DamagedPackage, r"routes\[0\] is not valid: its verification did not pass"
    ),
    "a manifest without its sum": (
        lambda f: edit(f, lambda m: m.pop("sha256")), DamagedPackage, r"manifest\.json is not the manifest that was wri"
    ),
    "a space more": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text() + " "), DamagedPackage, "is not"
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), PackageError, "it has no manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_package_is_refused_by_a_sentence_that_names_the_file(
    damage: Callable[[Path], object],
    error: type[PackageError],
    says: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    damage(folder)
    with pytest.raises(error, match=says) as caught:
        Package.open(folder).references()
    assert type(caught.value) is error
    assert len(str(caught.value).splitlines()) == 1
    assert not (folder.parent / "executed").exists()


def test_a_folder_may_be_named_by_a_link(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(whole)
    assert Package.open(tmp_path / "link").routes == Package.open(whole).routes


def test_every_manifest_field_taken_away_is_refused(folder: Path) -> None:
    whole = (folder / "manifest.json").read_text()
    since = {"data", "supernet"}  # packages of earlier versions have none
    wanted = [[key] for key in json.loads(whole) if key not in since]
    for path in wanted + [["routes", 0, key] for key in ("segments", "file", "macs", "latencies")]:

        def change(table: dict[str, Any], path: list[Any] = path) -> None:
            holder: Any = table
            for key in path[:-1]:
                holder = holder[key]
            del holder[path[-1]]

        (folder / "manifest.json").write_text(whole)
        edit(folder, change)
        with pytest.raises(DamagedPackage, match=r"manifest\.json"):
            Package.open(folder)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Puts the last of a path at the place that the others name."""

    def change(table: dict[str, Any]) -> None:
        holder: Any = table
        for key in path[:-2]:
            holder = holder[key]
        holder[path[-2]] = path[-1]

    return change


LATENCY = ("routes", 0, "latencies", 0)
IMPOSSIBLE = {
    "an unknown precision": ("precision", "fp33"),
    "no precision": ("precision", None),
    "an edge of no pixels": ("family", "input_shape", [3, 0, 16]),
    "an image that no memory holds": ("family", "input_shape", [3, 2**15, 2**15]),
    "an edge that is a text": ("family", "input_shape", [3, "16", 16]),
    "no classes": ("family", "num_classes", 0),
    "a mean of infinity": ("family", "data_config", {"mean": [float("inf")] * 3}),
    "a mean of 401 digits": ("family", "data_config", {"mean": [10**400, 0.5, 0.5]}),
    "a std of zero": ("family", "data_config", {"std": [0.0] * 3}),
    "an anchor without a name": ("family", "anchors", [{"depth": 3}]),
    "an anchor whose name clears the screen": ("family", "anchors", [{"name": "\x1b[2J", "depth": 3}]),
    "an anchor of half a character": ("family", "anchors", [{"name": "\ud800", "depth": 3}]),
    "a family that rings": ("family", "name", "deit\a"),
    "multiply-adds that no float holds": ("routes", 0, "macs", 10**400),
    "multiply-adds below zero": ("routes", 0, "macs", -1),
    "an accuracy above 100 %": ("routes", 0, "top1", 250.0),
    "an accuracy that is a truth": ("routes", 0, "top1", True),
    "an accuracy that is no number": ("routes", 0, "top1", float("nan")),
    "a frontier that is a number": ("routes", 0, "on_frontier", 1),
    "a tolerance of infinity": ("routes", 0, "verification", "tolerance", float("inf")),
    "an agreement above 1": ("routes", 0, "verification", "top1_agreement", 1.5),
    "a difference that is a text": ("routes", 0, "verification", "max_abs_difference", "0"),
    "no images": ("routes", 0, "verification", "images", 0),
    "a latency that is a text": (*LATENCY, "p50_ms", "1"),
    "a latency below zero": (*LATENCY, "p50_ms", -1.0),
    "a latency of infinity": (*LATENCY, "p90_ms", float("inf")),
    "a latency that is not known": (*LATENCY, "p50_ms", None),
    "a latency that no float holds": (*LATENCY, "p99_ms", 10**400),
    "a batch that is a list": (*LATENCY, "batch", [1]),
    "another origin": (*LATENCY, "origin", "guessed"),
    "another clock": (*LATENCY, "clock", "wall"),
    "a size that is a text": ("files", "slim.onnx", "size_bytes", "12"),
    "data that are a list": ("data", ["x"]),
}


@pytest.mark.parametrize("place", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_manifest_that_was_signed_with_an_impossible_value_is_refused_by_a_sentence(
    place: tuple[Any, ...], folder: Path
) -> None:
    edit(folder, _set(*place))
    with pytest.raises(DamagedPackage, match=r"manifest\.json") as caught:
        Package.open(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.isprintable()


def test_every_flipped_bit_of_a_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 61):  # every bit of a byte comes by
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(PackageError):
            Package.open(folder, content=False)


def test_a_package_of_an_earlier_version_has_no_sum_and_is_read(folder: Path) -> None:
    edit(folder, lambda table: (table.pop("sha256"), table.update(schema_version=1)))
    assert Package.open(folder).routes


def test_what_lies_beside_the_files_of_a_package_is_named(folder: Path) -> None:
    package = Package.open(folder)
    assert package.extra_files() == []
    (folder / "evil.py").touch()
    (folder / ".hidden").mkdir()
    assert Package.open(folder).extra_files() == [".hidden", "evil.py"]
    assert package.digest == sha256_of(folder / "manifest.json")

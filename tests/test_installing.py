"""Packages on a target machine: what is installed, what stays, and what is refused with the registry unchanged."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import light
import made_up
import numpy as np
import onnx
import onnx_networks
import packages
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from test_adding import ANIMALS, PREPARED, QUICK
from toys import write_images

from klas_zoo.catalogue.adding import add
from klas_zoo.catalogue.installing import Installed, install
from klas_zoo.cli import main
from klas_zoo.errors import (
    DamagedPackage,
    KlasZooError,
    NewerPackage,
    NewerRegistry,
    UsageError,
    VerificationError,
)
from klas_zoo.exporters.manifest import Manifest
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_writing import entries
from klas_zoo.hardware import describe_cpu
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.overview import overview
from klas_zoo.registry.picking import pick
from klas_zoo.sharing.push import push


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "val"
    return write_images(folder, ANIMALS, 10, size=(8, 8), seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Path]:
    """Packages of one network on the machine that made them, by precision."""
    folder = tmp_path_factory.mktemp("made")
    file = onnx_networks.write(folder / "ours.onnx")
    added = add(file, data=images, data_config=PREPARED, registry=folder / "registry", method=QUICK,
                precisions=("fp32", "fp16"))  # fmt: skip
    assert {one.precision for one in added.engines} == {"fp32", "fp16"}
    engines = Registry.open(folder / "registry", create=False).engines()
    return {one.precision: one.path.parent for one in engines}


@pytest.fixture
def package(tmp_path: Path, made: dict[str, Path]) -> Path:
    shutil.copytree(made["fp32"], tmp_path / "package")
    return tmp_path / "package"


def installed(source: Path | str, root: Path, **changes: Any) -> Installed:
    return install(source, registry=root, method=QUICK, **changes)


def rewritten(package: Path, **changes: Any) -> Path:
    """A package whose manifest says something else, and has the hashes of the files there are."""
    manifest = manifest_of(package)
    (package / "manifest.json").unlink()
    write_manifest(package, replace(manifest, files=entries(package), **changes))
    return package


def manifest_of(package: Path) -> Manifest:
    return read_manifest(json.loads((package / "manifest.json").read_text()), "here")


def test_a_package_is_verified_timed_and_registered_here(tmp_path: Path, package: Path) -> None:
    done = installed(package, tmp_path / "registry", batches=(1, 4))
    registry = Registry.open(tmp_path / "registry", create=False)
    (engine,) = registry.engines()
    assert (done.already, done.build_id, done.refused) == (False, engine.build_id, ())
    assert registry.build(engine.build_id).kind == "install"
    assert (engine.package, engine.status) == (done.digest, "verified")
    assert {(one.batch, one.hardware) for one in engine.latencies} == {(1, describe_cpu()), (4, describe_cpu())}
    stated = Package.open(package).routes[0]
    assert (engine.top1, engine.images) == (stated.top1, stated.images)
    assert engine.data_fingerprint == Package.open(package).manifest.data["fingerprint"]
    assert check(registry) == []
    sample = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    with pick("10s", registry=registry).load() as session:
        expected = onnx_networks.logits(onnx_networks.classifier(), sample)
        assert session.run(sample) == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(package)  # the registry has a copy of its own
    assert check(registry) == []


def test_installing_again_changes_nothing(tmp_path: Path, package: Path) -> None:
    root = tmp_path / "registry"
    first = installed(package, root)
    before = (root / "registry.sqlite").read_bytes()
    again = installed(package, root)
    assert again == replace(first, already=True)
    assert (root / "registry.sqlite").read_bytes() == before
    further = installed(package, root, batches=(1, 4))
    assert not further.already
    (engine,) = Registry(root).engines()
    assert {one.batch for one in engine.latencies} == {1, 4}


def test_a_later_batch_size_leaves_what_was_measured_before(tmp_path: Path, package: Path) -> None:
    root = tmp_path / "registry"
    installed(package, root, batches=(1,))
    (before,) = Registry(root).engines()
    installed(package, root, batches=(4,))
    (after,) = Registry(root).engines()
    assert set(before.latencies) < set(after.latencies)


def test_packages_of_several_precisions_stand_side_by_side_and_a_newer_one_takes_the_place_of_its_own(
    tmp_path: Path, made: dict[str, Path], package: Path
) -> None:
    root = tmp_path / "registry"
    for precision in ("fp32", "fp16"):
        installed(made[precision], root)
    assert {one.precision for one in Registry(root).engines()} == {"fp32", "fp16"}
    newer = installed(rewritten(package, provenance={"made": "later"}), root)
    engines = {one.precision: one for one in Registry(root).engines()}
    assert set(engines) == {"fp32", "fp16"}
    assert engines["fp32"].package == newer.digest != engines["fp16"].package
    assert {one.build_id for one in engines.values()} == {newer.build_id}
    assert check(Registry(root)) == []


def test_another_runtime_joins_the_engines_that_are_there(tmp_path: Path, package: Path) -> None:
    pytest.importorskip("openvino")
    root = tmp_path / "registry"
    installed(package, root)
    installed(package, root, runtimes=("openvino",))
    assert {one.runtime for one in Registry(root).engines()} == {"onnxruntime", "openvino"}
    assert pick("10s", registry=root).candidates == 2


def test_accuracies_can_be_measured_here(tmp_path: Path, package: Path, images: Path) -> None:
    few = tmp_path / "few"
    for animal in ANIMALS:
        (few / animal).mkdir(parents=True)
        shutil.copy(images / animal / "0.png", few / animal)
    installed(package, tmp_path / "registry", data=few)
    (engine,) = Registry(tmp_path / "registry").engines()
    assert engine.images == 3 and engine.accuracy_source == ""
    assert engine.data_fingerprint != Package.open(package).manifest.data["fingerprint"]


def test_a_package_without_a_fingerprint_has_a_claimed_accuracy(tmp_path: Path, package: Path) -> None:
    installed(rewritten(package, data={}), tmp_path / "registry")
    (engine,) = Registry(tmp_path / "registry").engines()
    assert engine.accuracy_source == "its package"


def test_a_package_is_pulled_from_a_url(tmp_path: Path, package: Path) -> None:
    pytest.importorskip("fsspec")
    push(package, (tmp_path / "remote").as_uri())
    done = installed((tmp_path / "remote").as_uri(), tmp_path / "registry")
    assert Registry(tmp_path / "registry").engines()[0].package == done.digest


def test_a_dry_run_changes_nothing_and_makes_no_registry(tmp_path: Path, package: Path) -> None:
    done = installed(package, tmp_path / "registry", dry_run=True)
    assert (done.build_id, done.already, done.engines) == (None, False, ("ours (onnxruntime, fp32)",))
    assert not (tmp_path / "registry").exists()
    installed(package, tmp_path / "registry")
    assert installed(package, tmp_path / "registry", dry_run=True).already


def test_nothing_of_installing_an_onnx_package_needs_torch(tmp_path: Path, package: Path) -> None:
    code = (
        "import sys, klas_zoo\n"
        "print(klas_zoo.install(sys.argv[1], registry=sys.argv[2]).build_id)\n"
        "print(klas_zoo.pick('10s', registry=sys.argv[2]).engine.route)\n"
    )
    done = light.run(package, tmp_path / "registry", code=code)
    assert (done.stderr, done.stdout) == ("", "1\nours\n")


def test_every_route_of_a_family_is_installed_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import packages

    family = packages.write_package(tmp_path / "family")
    done = installed(tmp_path / "family", tmp_path / "registry")
    assert len(done.engines) == len(family.routes) == 3
    engines = Registry(tmp_path / "registry").engines()
    assert [str(one.route) for one in engines] == [one.name for one in family.routes]
    assert len({one.package for one in engines}) == 1
    shared = (tmp_path / "family" / "weights.bin").stat().st_size
    assert sum(one.size_bytes for one in engines) > shared  # each would need its own share of them alone
    found = overview(tmp_path / "registry", claimed=True)  # its images have no fingerprint
    assert len(found.points) == 3 and any(one.on_frontier for one in found.points)


# what is refused


def test_a_package_without_engines_in_its_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import packages

    from klas_zoo.exporters.formats import DERIVED

    family, made = packages.write_package(tmp_path / "family"), tmp_path / "model-package"
    made.mkdir()
    DERIVED["model-package"].derive()(family, made, {"format": "model-package"})
    refused(tmp_path, made, UsageError, "is a package of format model-package: export it with --format onnx")


def refused(tmp_path: Path, source: Path | str, kind: type[KlasZooError], says: str, **changes: Any) -> None:
    root = tmp_path / "kept"
    Registry.open(root, create=True)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=says) as raised:
        installed(source, root, **changes)
    assert raised.value.exit_code in (1, 2)
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path in before}
    assert after == before
    assert Registry(root).engines() == []
    assert not list(root.glob("packages/*"))


def test_a_damaged_package_is_refused(tmp_path: Path, package: Path) -> None:
    weights = package / "weights.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    refused(tmp_path, package, DamagedPackage, "SHA-256 is another")


def test_a_package_of_a_newer_version_is_refused(tmp_path: Path, package: Path) -> None:
    manifest = package / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    refused(tmp_path, package, NewerPackage, "99")


def test_a_package_whose_references_are_another_networks_is_refused(tmp_path: Path, package: Path) -> None:
    references = load_file(package / "references.safetensors")
    references["logits/ours"] = -references["logits/ours"]
    save_file(references, package / "references.safetensors")
    refused(tmp_path, rewritten(package), VerificationError, "No engine of .* was installed; the first, ours")


def test_an_engine_for_another_gpu_is_refused(tmp_path: Path, package: Path) -> None:
    engine = package / "ours.sm80.engine"
    (package / "ours.onnx").rename(engine)
    engine.write_bytes(b"an engine that TensorRT compiled for another GPU")
    (package / "weights.bin").unlink()
    route = replace(manifest_of(package).routes[0], file=engine.name)
    compiled = rewritten(package, format="tensorrt", weights=None, routes=(route,))
    refused(tmp_path, compiled, KlasZooError, "tensorrt runs on cuda, not on cpu")


def test_a_package_of_onnx_graphs_made_on_another_architecture_is_portable_and_timed_here(
    tmp_path: Path, package: Path
) -> None:
    manifest = manifest_of(package)
    there = "Apple M2, 8 cores, neon asimddp"
    route = replace(manifest.routes[0], latencies=(made_up.latency(0.001, hardware=there),))
    rewritten(package, routes=(route,), provenance={**manifest.provenance, "hardware": there})
    installed(package, tmp_path / "registry")
    (engine,) = Registry(tmp_path / "registry").engines()
    assert engine.status == "verified"
    assert {one.hardware for one in engine.latencies} == {describe_cpu()}
    assert {one.p50_ms for one in engine.latencies} != {0.001}


FULL = """
import sys, tempfile
from pathlib import Path
from klas_zoo.cli import main
if sys.argv[2] != "registry":
    tempfile.tempdir = sys.argv[2]
main(["install", sys.argv[1], "--registry", sys.argv[3], "--threads", "1"])
"""


@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
@pytest.mark.parametrize("full", ["registry", "temporary files"])
def test_a_disk_that_fills_up_in_the_middle_of_an_install_is_one_sentence_and_the_former_state_stays(
    full: str, tmp_path: Path, made: dict[str, Path], small_disk: Path
) -> None:
    """What is left of the disk is less than the package has."""
    import packages

    root = small_disk / "registry" if full == "registry" else tmp_path / "registry"
    installed(made["fp32"], root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    packages.write_package(tmp_path / "family")
    filler = small_disk / "filler"
    left = os.statvfs(small_disk)
    filler.write_bytes(bytes(max(0, left.f_bavail * left.f_bsize - 48_000)))
    command = [sys.executable, "-c", FULL, tmp_path / "family", "registry" if full == "registry" else small_disk, root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and re.search(f"{os.strerror(errno.ENOSPC)}|are free there", last)
    assert {path: path.read_bytes() for path in before} == before
    assert check(Registry(root)) == [] and [str(one.route) for one in Registry(root).engines()] == ["ours"]
    filler.unlink()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert len(Registry(root).engines()) == 4 and check(Registry(root)) == []


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", KlasZooError, "is no folder of a package, and no URL")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, tmp_path / "empty", KlasZooError, "manifest")


def test_a_runtime_that_does_not_fit_is_refused(tmp_path: Path, package: Path) -> None:
    refused(tmp_path, package, UsageError, "did you mean onnxruntime", runtimes=("onnxruntim",))
    refused(tmp_path, package, UsageError, "tensorrt runs on cuda, not on cpu", runtimes=("tensorrt",))


def test_a_package_of_unknown_accuracy_is_refused_before_anything_is_timed(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klas_zoo.catalogue.installing.verify_routes", lambda *_: pytest.fail("it was run"))
    route = replace(Package.open(package).routes[0], top1=None)
    refused(tmp_path, rewritten(package, routes=(route,)), VerificationError, "its accuracy is not known: pass --data")


def test_nothing_is_installed_into_a_registry_of_a_newer_version(tmp_path: Path, package: Path) -> None:
    root = tmp_path / "registry"
    Registry.open(root, create=True)
    connection = sqlite3.connect(root / "registry.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (root / "registry.sqlite").read_bytes()
    with pytest.raises(NewerRegistry):
        installed(package, root)
    assert (root / "registry.sqlite").read_bytes() == before


def test_the_command_says_what_it_did(tmp_path: Path, package: Path) -> None:
    words = ["install", str(package), "--registry", str(tmp_path / "registry")]
    run = CliRunner().invoke
    assert "would be installed" in run(main, [*words, "--dry-run"], catch_exceptions=False).stdout
    assert run(main, words, catch_exceptions=False).stdout == "ours: ours (onnxruntime, fp32)\nRegistered as build 1.\n"
    assert run(main, words, catch_exceptions=False).stdout.endswith("Registered already, as build 1.\n")
    found = json.loads(run(main, [*words, "--json"], catch_exceptions=False).stdout)
    assert (found["already"], found["build_id"], found["family"]) == (True, 1, "ours")



def test_an_interrupted_install_measures_what_is_left_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import packages

    from klas_zoo.catalogue import installing

    packages.write_package(tmp_path / "family")
    root, timed = tmp_path / "registry", []
    original = installing.latencies_of

    def interrupted(path: Path, **facts: Any) -> Any:
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(path.name)
        return original(path, **facts)

    monkeypatch.setattr(installing, "latencies_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        installed(tmp_path / "family", root)
    assert Registry(root).engines() == []
    said: list[tuple[int, str]] = []

    @contextmanager
    def stage(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        assert (name, total, unit) == ("onnxruntime", 3, "engines")
        yield lambda work, remark: said.append((work, remark))

    monkeypatch.setattr(
        installing, "latencies_of", lambda path, **facts: timed.append(path.name) or original(path, **facts)
    )
    done = installed(tmp_path / "family", root, stage=stage)
    assert len(done.engines) == 3 and len(timed) == len(set(timed)) == 3
    assert said.count((1, "measured before")) == 2 and (0, "verifying 1") in said
    assert sum(work for work, _ in said) == 3
    assert all(one.status == "verified" and one.verification and one.latencies for one in Registry(root).engines())
    assert not list((root / "installing").iterdir()) and check(Registry(root)) == []


def test_what_was_measured_under_other_conditions_or_is_cut_short_is_measured_again(tmp_path: Path) -> None:
    from klas_zoo.catalogue.unfinished import Measured, Unfinished

    one, other = (Unfinished(tmp_path, "0" * 64, {"threads": threads}) for threads in (1, 2))
    one.keep("ours", Measured(verification=None, latencies=(), accuracy={"top1": 50.0}))
    assert one.find("ours") == Measured(verification=None, latencies=(), accuracy={"top1": 50.0})
    assert other.find("ours") is None and one.find("theirs") is None
    (file,) = one.folder.iterdir()
    file.write_text(file.read_text()[:-9])
    assert one.find("ours") is None
    one.forget()
    assert not one.folder.exists()


def test_an_fp16_engine_is_run_as_a_gpu_rounds_before_it_is_called_verified(
    tmp_path: Path, made: dict[str, Path]
) -> None:
    shutil.copytree(made["fp16"], tmp_path / "package")
    installed(tmp_path / "package", tmp_path / "registry")
    (engine,) = Registry.open(tmp_path / "registry", create=False).engines()
    assert (engine.precision, engine.status) == ("fp16", "verified")
    assert engine.verification is not None and engine.verification.rounded_images == engine.verification.images
    assert engine.verification.rounded_difference and engine.verification.largest_fp16


@pytest.mark.slow
def test_an_fp16_engine_that_a_gpu_would_spoil_is_not_installed_from_a_cpu(tmp_path: Path) -> None:
    folder = packages.write_package(tmp_path / "package", precision="fp16").folder
    graph = folder / f"{packages.SLIM}.onnx"
    spoil(graph)
    packages.rehash(folder, graph.name)
    installed(folder, tmp_path / "registry")
    found = {str(one.route): one for one in Registry.open(tmp_path / "registry", create=False).engines()}
    assert {name: one.status for name, one in found.items()} == {
        str(packages.SLIM): "built, not run", str(packages.STITCH): "verified", str(packages.WIDE): "verified"
    }  # fmt: skip
    spoiled = found[str(packages.SLIM)]
    assert spoiled.reason.endswith("at most 15,000 may be, a 4th of where fp16 ends: use bf16 or fp32.")
    assert spoiled.latencies == ()


def spoil(graph: Path) -> None:
    """Multiplies an fp16 tensor by 65,536 and divides it again: a CPU computes that in fp32, and fp16 overflows."""
    model = onnx.load(str(graph), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {one.name: one.type.tensor_type.elem_type for one in inferred}
    node = next(one for one in model.graph.node if types.get(one.output[0]) == onnx.TensorProto.FLOAT16)
    name = node.output[0]
    node.output[0] = "before"
    half = [onnx.numpy_helper.from_array(np.array(2.0**8, np.float16), "factor")]
    model.graph.initializer.extend(half)
    position = list(model.graph.node).index(node) + 1
    values = ["before", "larger", "largest", "smaller", name]
    for step, kind in enumerate(("Mul", "Mul", "Div", "Div")):
        source, target = values[step : step + 2]
        model.graph.node.insert(position + step, onnx.helper.make_node(kind, [source, "factor"], [target]))
    graph.write_bytes(model.SerializeToString())

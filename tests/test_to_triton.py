"""A model repository as files: what Triton's own parser reads in it, and where its links lead."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import packages
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from klas_zoo.errors import DamagedPackage, ExportError, PackageError, UsageError
from klas_zoo.exporters.checking import report
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import read_cascades
from klas_zoo.exporters.pbtxt import Word, to_text
from klas_zoo.exporters.to_triton import TritonSettings, derive, write_repository
from klas_zoo.files import sha256_of
from klas_zoo.runtimes.plans import BatchRange, PlanRecord, write_record

NAMES = ["made-up", "made-up_slim", "made-up_slim.1-2_wide.2-3", "made-up_wide"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("packages") / "package")


@pytest.fixture(scope="module")
def repository(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    verdicts = derive(package, folder, {"largest_batch": 16})
    assert [one.status for one in verdicts] == ["verified"] * 3
    return folder


def _config(repository: Path, model: str) -> model_config_pb2.ModelConfig:
    text = (repository / "models" / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_there_is_a_model_for_every_route_and_one_for_all(repository: Path) -> None:
    assert sorted(path.name for path in (repository / "models").iterdir()) == NAMES
    assert [_config(repository, name).name for name in NAMES] == NAMES


def test_a_repository_has_the_cascades_of_its_package_and_no_models_for_them(tmp_path: Path) -> None:
    package, one = packages.carry_cascade(packages.write_package(tmp_path / "package"))
    derive(package, tmp_path / "repository", {"largest_batch": 16})
    assert sorted(path.name for path in (tmp_path / "repository" / "models").iterdir()) == NAMES
    for family in ("family", "models/made-up/1/family"):
        (found,) = read_cascades(Package.open((tmp_path / "repository" / family).resolve())).cascades
        assert found == one
    assert len(report(tmp_path / "repository").verdicts) == 3


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_routes_configuration_is_what_triton_reads_in_it(name: str, repository: Path, package: Package) -> None:
    config = _config(repository, name)
    assert config.backend == "onnxruntime"
    assert config.max_batch_size == 16
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("images", model_config_pb2.TYPE_FP32, list(packages.SHAPE))
    ]
    assert [(one.name, list(one.dims)) for one in config.output] == [("logits", [packages.CLASSES])]
    assert config.HasField("dynamic_batching")
    assert [(group.kind, group.count) for group in config.instance_group] == [(config.instance_group[0].KIND_CPU, 1)]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 16]
    route = package.route(config.parameters["route"].string_value)
    assert config.default_model_filename == route.file
    assert config.parameters["top1"].string_value == f"{route.top1:.2f}"


def test_the_model_of_all_routes_runs_in_the_python_backend(repository: Path) -> None:
    config = _config(repository, "made-up")
    assert config.backend == "python"
    assert [one.name for one in config.output] == ["logits", "route"]
    compile((repository / "models/made-up/1/model.py").read_text(), "model.py", "exec")


def test_models_link_to_the_one_family_folder_and_the_repository_can_be_moved(
    repository: Path, package: Package, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    os.rename(repository, moved)
    try:
        for name in NAMES[1:]:
            version = moved / "models" / name / "1"
            assert version.is_symlink() and version.resolve() == moved / "family"
            assert (version / _config(moved, name).default_model_filename).is_file()
        assert (moved / "models/made-up/1/family").resolve() == moved / "family"
        weights = list(moved.rglob(package.weights.name))  # links to folders are not followed
        assert len([one for one in weights if not one.is_symlink()]) == 1
    finally:
        os.rename(moved, repository)


def test_copies_are_whole_packages_without_a_link(package: Package, tmp_path: Path) -> None:
    write_repository(package, tmp_path, TritonSettings(copy=True))
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    for name in NAMES[1:]:
        Package.open(tmp_path / "models" / name / "1")
    Package.open(tmp_path / "models/made-up/1/family")


def test_only_what_the_manifest_names_gets_into_a_repository(package: Package, tmp_path: Path) -> None:
    copied = Package.open(shutil.copytree(package.folder, tmp_path / "package"))
    (tmp_path / "secret").write_text("outside")
    (copied.folder / "link").symlink_to(tmp_path / "secret")
    (copied.folder / "model.py").write_text("raise SystemExit")
    write_repository(copied, tmp_path / "out", TritonSettings(copy=True))
    names = {path.name for path in (tmp_path / "out" / "family").iterdir()}
    assert names == {*package.manifest.files, "manifest.json"}


def _plan(folder: Path, route: str, capability: str, *, runtime: str = "tensorrt") -> Path:
    """A file like an engine; only its record is read here."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{route}.sm{capability.replace('.', '')}.engine"
    file.write_bytes(b"ftrt" + capability.encode())
    write_record(
        file,
        PlanRecord(
            runtime=runtime, runtime_version="10.9", capabilities=(capability,), precision="fp32",
            profiles=(BatchRange(smallest=1, usual=8, largest=32),), input_shape=packages.SHAPE,
            classes=packages.CLASSES, weights="inside", graph_sha256="0" * 64, sha256=sha256_of(file),
            size_bytes=file.stat().st_size,
        ),
    )  # fmt: skip
    return file


def test_plans_of_several_capabilities_are_chosen_among_by_the_server(package: Package, tmp_path: Path) -> None:
    for one in package.routes:
        _plan(tmp_path / "ampere", one.name, "8.0")
        _plan(tmp_path / "hopper", one.name, "9.0")
    plans = (tmp_path / "ampere", tmp_path / "hopper")
    verdicts = derive(package, tmp_path / "out", {"plans": plans})  # as klas-zoo export --plans does
    assert {one.status for one in verdicts} == {"built, not run"}
    config = _config(tmp_path / "out", "made-up_slim")
    assert config.backend == "tensorrt"
    # Triton's tensorrt backend loads nothing else; the model that picks routes computes on the CPU
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    elastic = _config(tmp_path / "out", "made-up").instance_group[0]
    assert elastic.kind == elastic.KIND_CPU
    assert config.cc_model_filenames == {"8.0": "slim.sm80.engine", "9.0": "slim.sm90.engine"}
    for name in [*config.cc_model_filenames.values(), config.default_model_filename]:
        assert (tmp_path / "out/models/made-up_slim/1" / name).is_file()


def test_plans_that_triton_cannot_load_are_refused(package: Package, tmp_path: Path) -> None:
    first = package.routes[0].name
    with pytest.raises(UsageError, match=f"has no engine of the route {first}"):
        write_repository(package, tmp_path / "1", TritonSettings(plans=(tmp_path / "nothing",)))
    _plan(tmp_path / "rtx", first, "8.0", runtime="tensorrt-rtx")
    with pytest.raises(UsageError, match="engine of tensorrt-rtx; Triton loads those of tensorrt only"):
        write_repository(package, tmp_path / "2", TritonSettings(plans=(tmp_path / "rtx",)))
    _plan(tmp_path / "a", first, "8.0")
    _plan(tmp_path / "b", first, "8.0")
    with pytest.raises(UsageError, match=r"are both for compute capability 8\.0"):
        write_repository(package, tmp_path / "3", TritonSettings(plans=(tmp_path / "a", tmp_path / "b")))
    _plan(tmp_path / "bad", first, "8.0").write_bytes(b"ftrt8.1")
    with pytest.raises(ExportError, match=r"slim\.sm80\.engine is damaged"):
        write_repository(package, tmp_path / "4", TritonSettings(plans=(tmp_path / "bad",)))


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_without_an_image_is_refused(batch: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        TritonSettings(largest_batch=batch)


def test_text_of_every_kind_of_value_is_read_back_by_triton(tmp_path: Path) -> None:
    awkward = 'quote " backslash \\ line\n and ü'
    text = to_text(
        {
            "name": awkward,
            "max_batch_size": 3,
            "platform": None,
            "instance_group": [{"kind": Word("KIND_CPU"), "gpus": [0, 1], "passive": True}, {}],
        }
    )
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.max_batch_size, config.platform) == (awkward, 3, "")
    assert len(config.instance_group) == 2
    assert list(config.instance_group[0].gpus) == [0, 1] and config.instance_group[0].passive


@pytest.fixture(params=[False, True], ids=["links", "copies"])
def served(request: pytest.FixtureRequest, package: Package, tmp_path: Path) -> Path:
    write_repository(package, tmp_path / "served", TritonSettings(copy=request.param))
    return tmp_path / "served"


def _served_files(served: Path) -> list[Path]:
    return sorted(path for path in served.rglob("*") if path.is_file() and not path.is_symlink())


def test_a_repository_is_verified_with_everything_that_is_served(served: Path) -> None:
    found = report(served)
    assert {one.status for one in found.verdicts} == {"verified"} and found.extra_files == ()
    moved = served.rename(served.parent / "moved")
    report(moved).check(moved)


def test_every_flipped_byte_of_every_file_of_a_repository_is_found(served: Path) -> None:
    draw = random.Random(0)
    for file in _served_files(served):
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        while file.name == "repository.json" and whole[at : at + 1].isspace():  # space between JSON's tokens
            at = draw.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(PackageError):
            report(served)
        file.write_bytes(whole)
    report(served)


def test_what_is_removed_added_or_linked_elsewhere_is_found(served: Path) -> None:
    config = served / "models" / "made-up_slim" / "config.pbtxt"
    text = config.read_text()
    config.unlink()
    with pytest.raises(DamagedPackage, match=r"config\.pbtxt is missing\. Export the repository again"):
        report(served)
    config.symlink_to(served / "models" / "made-up_wide" / "config.pbtxt")
    with pytest.raises(DamagedPackage, match=r"config\.pbtxt is not what was exported"):
        report(served)
    config.unlink()
    config.write_text(text)
    extra = served / "models" / "made-up" / "2" / "model.py"
    extra.parent.mkdir()
    extra.write_text("")
    with pytest.raises(DamagedPackage, match=r"2/model\.py was not exported, and would be served: remove it"):
        report(served)


def test_an_edited_configuration_is_accepted_when_that_is_said(served: Path) -> None:
    config = served / "models" / "made-up" / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 2"))
    with pytest.raises(DamagedPackage, match="Pass --allow-edited-config if that is meant"):
        report(served)
    report(served, allow_edited_config=True).check(served)
    model = served / "models" / "made-up" / "1" / "model.py"
    model.write_text("raise SystemExit")
    with pytest.raises(DamagedPackage, match=r"model\.py is not what was exported"):
        report(served, allow_edited_config=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "entries": []}'])
def test_a_record_that_is_none_is_refused(served: Path, text: str) -> None:
    (served / "repository.json").write_text(text)
    with pytest.raises(DamagedPackage, match=r"repository\.json is (not JSON|no record)"):
        report(served)

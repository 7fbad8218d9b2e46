"""From what a build kept to a verified package, by the command line; and what it answers to bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import packages
import pytest
import torch
from conftest import TINY_FAMILY
from test_cli import run
from toys import write_images

from klas_zoo.building import tuned
from klas_zoo.building.engines import RouteResult
from klas_zoo.building.exporting import choose, tuned_source
from klas_zoo.errors import UsageError, WeightsError
from klas_zoo.exporters.package import Package
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec, read_family
from klas_zoo.profiles.macs import Cost
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

HALF, FLOAT = Route.anchor("half", 3), Route.anchor("float", 4)
STITCH = Route.stitch("half", 2, "float", 3, 4)
ROUTES = (HALF, STITCH, FLOAT)


def results() -> list[RouteResult]:
    return [
        RouteResult(
            route=route, cost=Cost(macs=1000 * (index + 1), parameters=10), top1_before=20.0, top1=50.0 + index,
            on_frontier=route != STITCH, latencies=(packages.latency(1.0 + index),),
        )
        for index, route in enumerate(ROUTES)
    ]  # fmt: skip


def keep(root: Path, family: Family, device: str = "cpu") -> Supernet:
    """What a build would leave."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        supernet = Supernet(family.chains, ROUTES).eval()
        for parameter in supernet.parameters():
            parameter.normal_(0, 0.3)
    record = made_up.build(family=family.name, device=device)
    config = {**family.data_config, "mean": (0.5, 0.5, 0.5)}
    tuned.keep(root, supernet, record, 3, results(), 12, config)
    return supernet


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family file, images, and a registry with a kept supernet; `family.toml`, `images` and `registry`."""
    place = tmp_path_factory.mktemp("place")
    (place / "family.toml").write_text(TINY_FAMILY)
    write_images(place / "images" / "train", ("ant", "bee", "cat", "dog"), 16, seed=1)
    write_images(place / "images" / "val", ("ant", "bee", "cat", "dog"), 4, seed=2)
    keep(place / "registry", load_family(read_family(place / "family.toml"), random_weights=True, seed=5))
    return place


def export(place: Path, out: Path, *more: object) -> tuple[int, str, str]:
    return run(
        "export", "--family", place / "family.toml", "--registry", place / "registry", "--data", place / "images",
        "--threads", 1, "--out", out, *more,
    )  # fmt: skip


def test_a_kept_supernet_is_found_and_computes_what_it_did(
    tmp_path: Path, tiny_family: Family, tiny_spec: FamilySpec
) -> None:
    kept = keep(tmp_path, tiny_family)
    found = tuned.find(tmp_path, "tiny-vits")
    assert (found.build_id, found.build["family"]) == (3, "tiny-vits")
    assert [one.route for one in found.routes] == list(ROUTES)
    loaded = found.load(load_family(tiny_spec, random_weights=True, seed=77).chains)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for route in ROUTES:
            assert torch.equal(loaded(images, route), kept(images, route))


def test_without_a_build_the_command_that_makes_one_is_named(tmp_path: Path, tiny_family: Family) -> None:
    with pytest.raises(WeightsError, match="run klas-zoo build --family tiny-vits first, or say --random-weights"):
        tuned.find(tmp_path, "tiny-vits")
    keep(tmp_path, replace(tiny_family, name="tiny-vits-two"))
    with pytest.raises(WeightsError, match="No build has left"):
        tuned.find(tmp_path, "tiny-vits")


def test_of_several_devices_one_has_to_be_named(tmp_path: Path, tiny_family: Family) -> None:
    keep(tmp_path, tiny_family)
    keep(tmp_path, tiny_family, "cuda")
    with pytest.raises(UsageError, match="for several devices, cpu, cuda: say --device"):
        tuned.find(tmp_path, "tiny-vits")
    assert tuned.find(tmp_path, "tiny-vits", "cuda").build["device"] == "cuda"


def test_a_kept_file_that_is_damaged_or_of_other_anchors_is_refused(tmp_path: Path, tiny_family: Family) -> None:
    keep(tmp_path, tiny_family)
    found = tuned.find(tmp_path, "tiny-vits")
    with pytest.raises(WeightsError, match="not those of this family"):
        found.load({"half": tiny_family.chains["half"]})
    found.path.write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match="is no tuned supernet"):
        tuned.find(tmp_path, "tiny-vits")


def test_a_package_is_exported_and_verified_and_tells_where_it_comes_from(place: Path, tmp_path: Path) -> None:
    code, out, error = export(place, tmp_path / "package", "--json")
    assert code == 0, error
    assert [one["status"] for one in json.loads(out)["routes"]] == ["verified"] * 3
    package = Package.open(tmp_path / "package")
    assert package.manifest.provenance["build_id"] == 3
    assert package.manifest.provenance["build"]["dataset"] == made_up.OF_A_BUILD["dataset"]
    assert package.manifest.family.data_config["mean"] == [0.5] * 3
    assert [one.top1 for one in package.routes] == [50.0, 51.0, 52.0]
    assert [one.verification.images for one in package.routes if one.verification] == [16] * 3
    assert all(one.verification is not None and one.verification.top1 is not None for one in package.routes)
    code, out, error = run("verify", tmp_path / "package", "--threads", 1)
    assert code == 0, error
    assert out.count("verified") == 3
    (tmp_path / "package" / "half.onnx").write_bytes(b"")
    code, out, error = run("verify", tmp_path / "package")
    assert (code, out) == (1, "")
    assert "half.onnx is cut short" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["half", str(STITCH), "float"]),
        ({"frontier": True}, ["half", "float"]),
        ({"budget_ms": 2.5}, ["half", str(STITCH)]),
        ({"names": ["float", str(STITCH)]}, [str(STITCH), "float"]),
    ],
    ids=str,
)
def test_routes_are_chosen_by_name_frontier_or_latency(
    options: dict[str, Any], kept: list[str], place: Path
) -> None:
    source = tuned_source(read_family(place / "family.toml"), place / "registry", None)
    assert [one.name for one in choose(source, **options).routes] == kept


def test_engines_of_another_precision_are_timed_anew(place: Path, tmp_path: Path) -> None:
    code, _, error = export(place, tmp_path / "package", "--precision", "int8", "--profile", "--routes", STITCH)
    assert code == 0, error
    package = Package.open(tmp_path / "package")
    assert [one.name for one in package.routes] == [str(STITCH)]
    assert [latency.precision for latency in package.routes[0].latencies] == ["int8"]
    assert package.routes[0].latencies[0].p50_ms != 2.0


@pytest.mark.parametrize("form", ["torch", "model-package"])
def test_other_formats_are_written_by_the_same_command(form: str, place: Path, tmp_path: Path) -> None:
    code, out, error = export(place, tmp_path / "package", "--format", form, "--routes", "half")
    assert code == 0, error
    assert "verified" in out
    assert (tmp_path / "package" / "manifest.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


BAD = {
    "an unknown route": (("--routes", "haf"), 2, "did you mean half"),
    "two ways to choose": (("--routes", "half", "--frontier"), 2, "contradict each other"),
    "a budget nothing keeps": (("--latency", "1us"), 1, "the fastest, half, takes 1.00 ms"),
    "no budget": (("--latency", "5"), 2, "5ms, 200us or 1.5s"),
    "int8 for torch": (("--format", "torch", "--precision", "int8"), 2, "takes --precision fp32, fp16, bf16"),
    "another device": (("--device", "cuda"), 1, "No build has left"),
    "images that are not there": (("--data", "nowhere"), 1, "nowhere is not a folder"),
}


@pytest.mark.parametrize(("options", "code", "says"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_sentence_and_writes_nothing(
    options: tuple[str, ...], code: int, says: str, place: Path, tmp_path: Path
) -> None:
    found, out, error = export(place, tmp_path / "package", *options)
    assert (found, out) == (code, "")
    assert says in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_what_stands_at_the_target_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, error = export(place, tmp_path, "--routes", "half")
    assert code == 1
    assert "is there already and is no empty folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_a_manifest_is_no_package(tmp_path: Path) -> None:
    code, _, error = run("verify", tmp_path)
    assert code == 1
    assert "is no package: it has no manifest.json" in error


def test_random_weights_are_packaged_loudly(place: Path, tmp_path: Path) -> None:
    code, _, error = export(place, tmp_path / "package", "--random-weights", "--routes", "half", "--precision", "fp16")
    assert code == 0, error
    assert "RANDOM WEIGHTS" in error
    package = Package.open(tmp_path / "package")
    assert package.manifest.family.weights == "random"
    assert [one.top1 for one in package.routes] == [None]

"""From what a build kept to a verified package, by the command line; and what it answers to bad input."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import packages
import pytest
import timm
import torch
from conftest import TINY_FAMILY
from test_cli import run
from torch import Tensor, nn
from toys import write_images

from klas_zoo.building import tuned
from klas_zoo.building.package_sources import choose, provenance_of, tuned_source
from klas_zoo.chains import Chain
from klas_zoo.errors import DamagedPackage, UsageError, WeightsError
from klas_zoo.exporters.family import PackageSource, VerificationImages, export_family
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.onnx_files import stated_preprocessing
from klas_zoo.exporters.package import Package
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec, read_family
from klas_zoo.registry import Registry
from klas_zoo.registry.records import NewEngine
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

HALF, FLOAT = Route.anchor("half", 3), Route.anchor("float", 4)
STITCH = Route.stitch("half", 2, "float", 3, 4)
ROUTES = (HALF, STITCH, FLOAT)


def listed() -> tuple[PackagedRoute, ...]:
    return tuple(
        PackagedRoute(
            route=route, file=None, macs=1000 * (index + 1), parameters=10, top1=50.0 + index, images=12,
            on_frontier=route != STITCH, verification=None, latencies=(packages.latency(1.0 + index),),
        )
        for index, route in enumerate(ROUTES)
    )  # fmt: skip


def keep(root: Path, family: Family, device: str = "cpu") -> Supernet:
    """Leaves in a registry what a build would: the fp32 package of a supernet."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        supernet = Supernet(copy.deepcopy(family.chains), ROUTES).eval()
        for parameter in supernet.parameters():
            parameter.normal_(0, 0.3)
        images = torch.randn(8, *family.input_shape)
    facts = FamilyFacts(
        name=family.name, input_shape=family.input_shape, num_classes=family.num_classes, weights=family.weights,
        data_config={**family.data_config, "mean": [0.5] * 3},
        anchors=tuple(family.described(name) for name in family.chains),
    )  # fmt: skip
    source = PackageSource(facts=facts, routes=listed(), load=lambda routes: supernet, provenance={})
    compared = VerificationImages(test=lambda: [(images, None)], calibration=list)
    with tempfile.TemporaryDirectory() as folder:
        package = export_family(
            source, Path(folder) / "fp32", precision="fp32", images=compared, threads=1, supernet_routes=listed()
        ).package
        engines = [
            NewEngine(
                family=family.name, route=one.route, device=device, runtime="onnxruntime", precision="fp32",
                macs=one.macs, parameters=one.parameters, top1=one.top1 or 0.0, images=one.images,
                input_shape=family.input_shape, verification=one.verification, latencies=one.latencies,
                weights="pretrained", dataset="clouds", data_fingerprint="c10d5", file=package.engine(one),
            )
            for one in package.routes
        ]  # fmt: skip
        Registry.open(root, create=True).register(made_up.build(family=family.name, device=device), engines)
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
    assert (found.build_id, found.build["family"]) == (1, "tiny-vits")
    assert [one.route for one in found.routes] == list(ROUTES)
    loaded = found.load(load_family(tiny_spec, random_weights=True, seed=77).chains)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for route in ROUTES:
            assert torch.equal(loaded(images, route), kept(images, route))


def test_without_a_build_the_command_that_makes_one_is_named(tmp_path: Path, tiny_family: Family) -> None:
    with pytest.raises(WeightsError, match="run klas-zoo build --family tiny-vits first, or pass --random-weights"):
        tuned.find(tmp_path, "tiny-vits")
    keep(tmp_path, replace(tiny_family, name="tiny-vits-two"))
    with pytest.raises(WeightsError, match="No build has left"):
        tuned.find(tmp_path, "tiny-vits")


def test_of_several_devices_one_has_to_be_named(tmp_path: Path, tiny_family: Family) -> None:
    keep(tmp_path, tiny_family)
    keep(tmp_path, tiny_family, "cuda")
    with pytest.raises(UsageError, match="for several devices, cpu, cuda: pass --device"):
        tuned.find(tmp_path, "tiny-vits")
    assert tuned.find(tmp_path, "tiny-vits", "cuda").build["device"] == "cuda"


def test_a_kept_file_that_is_damaged_or_of_other_anchors_is_refused(tmp_path: Path, tiny_family: Family) -> None:
    keep(tmp_path, tiny_family)
    found = tuned.find(tmp_path, "tiny-vits")
    with pytest.raises(WeightsError, match="not those of this family"):
        found.load({"half": tiny_family.chains["half"]})
    weights = found.path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedPackage, match=r"weights\.bin is cut short"):
        found.load(tiny_family.chains)


class Part(nn.Module):
    """A stem or a head as cuts written by hand once held it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, features: Tensor) -> Tensor:
        return self.part(features)


def test_a_supernet_under_an_earlier_versions_names_is_refused_with_both_names(place: Path, tmp_path: Path) -> None:
    family = load_family(read_family(place / "family.toml"), random_weights=True, seed=5)
    former = {
        name: Chain(
            Part(chain.stem), chain.blocks, Part(chain.head),
            input_shape=chain.input_shape, layout=chain.layouts, pool=chain.pool,
        )
        for name, chain in family.chains.items()
    }  # fmt: skip
    keep(tmp_path / "registry", replace(family, chains=former))
    code, out, error = export(place, tmp_path / "package", "--registry", tmp_path / "registry")
    assert (code, out) == (1, "")
    error = error.strip().splitlines()[-1]  # what is said before is of what was asked for
    assert "holds this family's tuned supernet under tensor names of an earlier klas-zoo" in error
    assert re.search(r"\(chains\.anchor_float\.head\.part\.[\w.]+, here chains\.anchor_float\.head\.[\w.]+\)", error)
    assert "engines built from it still run; to export or tune further, build the family again" in error
    assert not (tmp_path / "package").exists()


def test_a_supernet_of_networks_of_the_same_depth_but_another_width_is_no_earlier_name(
    tmp_path: Path, tiny_family: Family
) -> None:
    keep(tmp_path, tiny_family)
    found = tuned.find(tmp_path, "tiny-vits")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": tiny_family.num_classes}
    others = {
        name: Chain.of(timm.create_model("deit_tiny_patch16_224", depth=chain.depth, **sizes).eval(), (3, 16, 16))
        for name, chain in tiny_family.chains.items()
    }
    with pytest.raises(WeightsError, match="is not the supernet of this family: build it again"):
        found.load(others)


def test_a_package_is_exported_and_verified_and_tells_where_it_comes_from(place: Path, tmp_path: Path) -> None:
    code, out, error = export(place, tmp_path / "package", "--json")
    assert code == 0, error
    assert [one["status"] for one in json.loads(out)["routes"]] == ["verified"] * 3
    package = Package.open(tmp_path / "package")
    assert package.manifest.provenance["build_id"] == 1
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


BUILD = {
    "command": "klas-zoo build --data /home/ada/secret", "dataset": "50 images of clouds", "settings": {"batch": 50},
    "manifest": {
        "key": "c0ffee", "machine": {"host": "adas-desk", "system": "Linux-6.1"},
        "anchors": {"half": {"sha256": "0" * 64, "checkpoint": "/home/ada/half.pth"}},
    },
}  # fmt: skip


def test_what_is_published_names_neither_host_nor_kernel_nor_paths_unless_that_is_asked_for() -> None:
    public, full = (provenance_of(BUILD, 7, full=full) for full in (False, True))
    text = json.dumps(public)
    assert not [word for word in ("ada", "Linux-6.1", "command") if word in text]
    assert public["build"]["manifest"] == {"key": "c0ffee", "anchors": {"half": {"sha256": "0" * 64}}}
    assert public["build_id"] == 7 and public["build"]["dataset"] == BUILD["dataset"]
    assert full["build"] == BUILD and full["command"]


def test_the_full_provenance_is_an_option(place: Path, tmp_path: Path) -> None:
    for name, wanted in (("public", False), ("full", True)):
        assert export(place, tmp_path / name, "--provenance", name, "--routes", "half")[0] == 0
        provenance = Package.open(tmp_path / name).manifest.provenance
        assert ("command" in provenance, "command" in provenance["build"]) == (wanted, wanted)


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
def test_routes_are_chosen_by_name_frontier_or_latency(options: dict[str, Any], kept: list[str], place: Path) -> None:
    _, source = tuned_source(str(place / "family.toml"), place / "registry", None)
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
    "another device": (("--device", "a100"), 1, "No build has left"),
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


def test_a_family_that_was_built_is_exported_by_its_name_alone(place: Path, tmp_path: Path) -> None:
    code, _, error = run(
        "export", "--family", "tiny-vits", "--registry", place / "registry", "--data", place / "images", "--threads", 1,
        "--routes", "half", "--out", tmp_path / "package",
    )  # fmt: skip
    assert code == 0, error
    assert [one.name for one in Package.open(tmp_path / "package").routes] == ["half"]


def test_an_unknown_family_names_those_that_were_built(place: Path, tmp_path: Path) -> None:
    code, _, error = run("export", "--family", "tiny-vit5", "--registry", place / "registry", "--out", tmp_path / "p")
    assert code == 2
    assert "tiny-vits" in error


EDITS = {
    "an anchor's name": ('name = "half"', 'name = "thin"'),
    "another model": ("num_heads = 2", "num_heads = 4"),
    "the number of classes": ("num_classes = 4", "num_classes = 5"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_family_file_that_was_changed_since_its_build_is_refused(
    edit: tuple[str, str], place: Path, tmp_path: Path
) -> None:
    assert edit[0] in TINY_FAMILY
    (tmp_path / "family.toml").write_text(TINY_FAMILY.replace(*edit))
    code, out, error = run(
        "export", "--family", tmp_path / "family.toml", "--registry", place / "registry", "--out", tmp_path / "package",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert "family.toml was changed since build 1" in error and "pass --family tiny-vits" in error


def test_a_file_of_ones_own_that_is_called_like_a_built_in_family_is_named_in_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(TINY_FAMILY.replace('name = "tiny-vits"', 'name = "deit"', 1))
    for command in (("export", "--out", tmp_path / "package"), ("routes",)):
        code, _, error = run(*command, "--family", tmp_path / "mine.toml", "--registry", tmp_path / "registry")
        assert code == 1
        assert f"klas-zoo build --family {tmp_path / 'mine.toml'} " in error


ODD_FAMILIES = {
    "two classes": ({"num_classes": 2}, "half"),
    "four channels": ({"input_shape": "[4, 16, 16]", "in_chans": 4}, "half"),
    "one channel": ({"input_shape": "[1, 16, 16]", "in_chans": 1}, "half"),
}


@pytest.mark.parametrize(("changes", "route"), ODD_FAMILIES.values(), ids=ODD_FAMILIES)
def test_untrained_families_of_any_classes_and_channels_are_exported_with_images_that_are_lent(
    changes: dict[str, Any], route: str, tmp_path: Path
) -> None:
    text = re.sub(r"num_classes = \d+", f"num_classes = {changes.get('num_classes', 4)}", TINY_FAMILY)
    text = re.sub(r"input_shape = .*", f"input_shape = {changes.get('input_shape', '[3, 16, 16]')}", text)
    text = text.replace("num_heads", f"in_chans = {changes.get('in_chans', 3)}, num_heads")
    (tmp_path / "family.toml").write_text(text)
    code, _, error = run(
        "export", "--family", tmp_path / "family.toml", "--random-weights", "--routes", route, "--threads", 1,
        "--out", tmp_path / "package",
    )  # fmt: skip
    assert code == 0, error
    (graph,) = (tmp_path / "package").glob("*.onnx")
    stated = stated_preprocessing(graph)
    assert stated["input_size"] == Package.open(tmp_path / "package").manifest.family.data_config["input_size"]
    assert len(stated["mean"]) == len(stated["std"]) == changes.get("in_chans", 3)


def test_random_weights_are_packaged_loudly(place: Path, tmp_path: Path) -> None:
    code, _, error = export(place, tmp_path / "package", "--random-weights", "--routes", "half", "--precision", "fp16")
    assert code == 0, error
    assert "RANDOM WEIGHTS" in error
    package = Package.open(tmp_path / "package")
    assert package.manifest.family.weights == "random"
    assert [one.top1 for one in package.routes] == [None]

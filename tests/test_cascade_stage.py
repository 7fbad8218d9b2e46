"""Cascades in a build: fitted on held-out images, registered beside the engines, cached, and left out where asked."""

from __future__ import annotations

import json
from pathlib import Path

import made_up
import numpy as np
import pytest
import timm
from click.testing import CliRunner
from safetensors.torch import save_file

from klas_zoo.building import cascade_stage
from klas_zoo.building.cascade_stage import fastest_package
from klas_zoo.building.engines import EngineResult, RouteResult
from klas_zoo.cli import main
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import read_cascades
from klas_zoo.profiles.macs import RouteCost
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.routes import Route

FAMILY = """
name = "toy"
input_shape = [3, 16, 16]
num_classes = 3
"""
ANCHOR = """
[[anchors]]
name = "{name}"
model = "vit_tiny_patch16_224"
arguments = {{ img_size = 16, patch_size = 8, embed_dim = {width}, depth = 3, num_heads = 2 }}
"""
WIDTHS = {"small": 8, "large": 16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks with weights from a folder, and 3,200 training images of noise in arrays."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.toml").write_text(FAMILY + "".join(ANCHOR.format(name=n, width=w) for n, w in WIDTHS.items()))
    (folder / "weights").mkdir()
    for name, width in WIDTHS.items():
        network = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=width, depth=3, num_heads=2, num_classes=3
        )
        generator = np.random.default_rng(width)
        for one in network.parameters():
            one.data.copy_(one.data.new_tensor(generator.normal(0, 0.3, tuple(one.shape))))
        save_file(network.state_dict(), folder / "weights" / f"{name}.safetensors")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 3_200), ("test", 400)):
        images = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / "images" / f"{split}.npz", images=images, labels=np.arange(count) % 3)
    return folder


def _build(toy: Path, root: Path, *more: str) -> dict[str, object]:
    arguments = [
        *("build", "--family", toy / "toy.toml", "--data", toy / "images", "--weights", toy / "weights", "--force"),
        *("--registry", root, "--tune-steps", "2", "--tune-batch", "8", "--init-images", "16", "--probe-epochs", "1"),
        *("--buckets", "3", "--tolerance", "0", "--threads", "1", "--precision", "fp32", "--json", *more),
    ]
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return {"stderr": result.stderr, **json.loads(result.stdout)}


@pytest.fixture(scope="module")
def built(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("registry")
    _build(toy, root)
    return root


@pytest.mark.slow
def test_a_build_registers_cascades_that_compare_with_its_engines(built: Path) -> None:
    registry = Registry.open(built, create=False)
    engines = registry.engines()
    cascades, plain = ([one for one in engines if (one.cascade is not None) == wanted] for wanted in (True, False))
    assert cascades and plain
    assert {(one.images, one.data_fingerprint, one.package) for one in engines} == {
        (400, plain[0].data_fingerprint, plain[0].package)
    }
    for one in cascades:
        assert one.cascade is not None and one.verification is not None
        assert (one.cascade.heldout.images, one.cascade.test.images) == (399, 400)
        assert one.verification.passed
        assert one.latencies[0].conditions == plain[0].latencies[0].conditions
        assert one.top1 == one.cascade.test.top1
        assert one.size_bytes > 1000 and one.parameters > 1000
    (package,) = registry.packages(1)
    carried = read_cascades(Package.open(package.path))
    assert {one.name for one in carried.cascades} == {str(one.route) for one in cascades}
    assert carried.data["fingerprint"] == plain[0].data_fingerprint
    assert check(registry) == []
    assert pick(mean=1e3, registry=registry).candidates == len(engines)


@pytest.mark.slow
def test_an_exported_package_carries_the_cascades_of_the_build(built: Path, toy: Path, tmp_path: Path) -> None:
    registered = {str(one.route): one for one in Registry.open(built, create=False).engines() if one.cascade}

    def export(name: str, *more: str) -> Path:
        arguments = ["export", "--family", toy / "toy.toml", "--registry", built, "--data", toy / "images",
                     "--out", tmp_path / name, "--threads", "1", "--images", "20", *more]  # fmt: skip
        result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    carried = read_cascades(Package.open(export("package")))
    assert {one.name for one in carried.cascades} == set(registered)
    for one in carried.cascades:
        known = registered[one.name]
        assert (one.facts, one.latencies, one.macs) == (known.cascade, known.latencies, known.macs)
        assert one.verification.passed
    served = Package.open(export("repository", "--format", "triton") / "family")
    assert {one.name for one in read_cascades(served).cascades} == set(registered)


def test_cascades_are_those_of_the_package_whose_anchors_are_fastest() -> None:
    def result(name: str, depth: int, **ms: float) -> RouteResult:
        engines = tuple(
            EngineResult(
                format="onnx", runtime="onnxruntime", precision=precision, package=precision, file="x", size_bytes=1,
                status="verified", latencies=(made_up.latency(time),),
            )
            for precision, time in ms.items()
        )  # fmt: skip
        cost = RouteCost(macs=1, parameters=1)
        return RouteResult(
            route=Route.anchor(name, depth), cost=cost, top1_before=0.0, top1=0.0, on_frontier=True, engines=engines
        )

    both = [result("small", 2, fp32=2.0, int8=3.0), result("large", 3, fp32=9.0, int8=5.0)]
    assert fastest_package(both, ("fp32", "int8")) == "int8"
    one_refused = [both[0], result("large", 3, fp32=9.0)]
    assert fastest_package(one_refused, ("fp32", "int8")) == "fp32"
    assert fastest_package(both, ()) is None


@pytest.mark.slow
def test_a_second_build_finds_its_cascades_cached_and_registers_nothing(built: Path, toy: Path) -> None:
    before = Registry.open(built, create=False).engines()
    assert "cascades          cached" in str(_build(toy, built)["stderr"])
    assert Registry.open(built, create=False).engines() == before


@pytest.mark.slow
def test_a_build_whose_engines_take_long_says_so_and_has_none(
    built: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade_stage, "_MOST_MACS", 1.0)
    said = str(_build(toy, built)["stderr"])
    assert "No cascades of fp32" in said and "klas-zoo cascades fits them on fewer" in " ".join(said.split())
    assert not any(one.cascade for one in Registry.open(built, create=False).engines())


def test_routes_are_thinned_evenly_and_anchors_stay() -> None:
    routes = [f"r{number}" for number in range(50)]
    kept = cascade_stage._thinned(routes, {"r0", "r24", "r49"})
    assert kept == sorted(kept, key=lambda one: int(one[1:]))
    assert {"r0", "r24", "r49"} <= set(kept) and 16 <= len(kept) <= 17
    assert cascade_stage._thinned(routes[:16], set()) == routes[:16]


@pytest.mark.slow
def test_a_build_without_cascades_registers_engines_only(built: Path, toy: Path) -> None:
    _build(toy, built, "--no-cascades")
    assert not any(one.cascade for one in Registry.open(built, create=False).engines())

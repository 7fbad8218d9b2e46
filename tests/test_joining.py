"""Plain networks as stages of cascades: joined, fitted on held-out images, registered, picked and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packages
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from klas_zoo.cascades.definition import Cascade
from klas_zoo.catalogue.adding import add
from klas_zoo.catalogue.installing import install
from klas_zoo.catalogue.joining import fit_registered
from klas_zoo.cli import main
from klas_zoo.errors import KlasZooError, PackageError, UnknownName, UsageError
from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.joined_package import Part, join_packages
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import read_cascades
from klas_zoo.preprocess import Preprocess
from klas_zoo.profiles.timing import Method
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.loaded import prepared
from klas_zoo.registry.picking import pick
from klas_zoo.runtime import ElasticSession
from klas_zoo.runtimes import open_engine

QUICK = Method(warmup_ms=0, min_runs=3, min_ms=0, rounds=1)
PREPARED = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
CLASSES, EDGE = 3, 8
PATTERNS = np.sign(np.random.default_rng(7).standard_normal((CLASSES, 1, EDGE, EDGE))).astype(np.float32)
COLOURS = np.eye(CLASSES, dtype=np.float32)
PROVIDER = "CPUExecutionProvider"


def _images(folder: Path, count: int, seed: int) -> Path:
    """Three of four show their class as a colour, which both networks know; the others as a pattern, in grey."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        label = number % CLASSES
        shown = PATTERNS[label] if number % 4 == 0 else COLOURS[label][:, None, None]
        pixels = 128 + 50 * (shown - shown.mean()) + draw.normal(0, 12, (3, EDGE, EDGE))
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0)).save(place / f"{number}.png")
    return folder


def small_logits(images: np.ndarray) -> np.ndarray:
    """(B, 3, 8, 8) → (B, 3): the mean of each channel."""
    return 4 * images.mean((2, 3)) @ COLOURS


def large_logits(images: np.ndarray) -> np.ndarray:
    """Both colours and patterns; a product over all pixels."""
    return images.reshape(len(images), -1) @ _large_weights().T


def _large_weights() -> np.ndarray:
    of_colours = np.repeat(4 * COLOURS / EDGE**2, EDGE**2, axis=1)
    of_patterns = np.tile(PATTERNS.reshape(CLASSES, -1), (1, 3)) / EDGE**2
    return (of_colours + of_patterns).astype(np.float32)


def _network(path: Path, size: str, *, batch: int | str = "batch", opset: int = 17) -> Path:
    if size == "small":
        nodes = [
            helper.make_node("GlobalAveragePool", ["images"], ["means"]),
            helper.make_node("Flatten", ["means"], ["features"]),
        ]
        weights = 4 * COLOURS
    else:
        nodes, weights = [helper.make_node("Flatten", ["images"], ["features"])], _large_weights()
    nodes.append(helper.make_node("Gemm", ["features", "matrix"], ["logits"], transB=1))
    graph = helper.make_graph(
        nodes, size, [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, EDGE, EDGE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(weights, "matrix")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


class Place:
    """A registry of two plain networks, labelled images to fit on, and the ones they were evaluated on."""

    def __init__(self, folder: Path) -> None:
        self.registry = folder / "registry"
        self.heldout, self.test = _images(folder / "heldout", 480, 1), _images(folder / "test", 240, 2)
        for size in ("small", "large"):
            self.add(_network(folder / f"{size}.onnx", size), data_config=PREPARED)

    def add(self, file: Path, **options: Any) -> None:
        add(file, data=self.test, registry=self.registry, threads=1, method=QUICK, **options)

    def fit(self, *targets: str | Path, **changes: Any) -> Any:
        options = {"data": self.heldout, "test": self.test, "registry": self.registry, "threads": 1, **changes}
        return fit_registered(targets or ("small", "large"), **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("joining"))


@pytest.fixture(scope="module")
def registered(place: Place) -> Place:
    found = place.fit(register="both")
    assert found.notes == () and found.build_id == 3
    return place


def _test_set(place: Place) -> tuple[np.ndarray, np.ndarray]:
    prepare = Preprocess.from_json({**PREPARED, "input_size": (3, EDGE, EDGE)})
    files = sorted(place.test.rglob("*.png"))
    return np.stack([prepare(one) for one in files]), np.array([int(one.parent.name[-1]) for one in files])


def test_plain_networks_are_registered_as_cascades_that_compare_with_them(registered: Place) -> None:
    registry = Registry.open(registered.registry, create=False)
    engines = registry.engines()
    cascades = [one for one in engines if one.cascade is not None]
    assert cascades and {one.family for one in cascades} == {"both"}
    plain = {one.family: one for one in engines if one.cascade is None}
    for one in cascades:
        assert isinstance(one.route, Cascade) and list(map(str, one.route.routes)) == ["small", "large"]
        assert one.cascade is not None and (one.cascade.heldout.images, one.cascade.test.images) == (480, 240)
        assert one.data_fingerprint == plain["small"].data_fingerprint == plain["large"].data_fingerprint
        assert one.latencies[0].conditions == plain["small"].latencies[0].conditions
        assert plain["small"].macs < one.macs < plain["small"].macs + plain["large"].macs
        assert one.preprocessing == plain["small"].preprocessing
    # three in four show their class as a colour; of the others small guesses
    assert plain["small"].top1 < 90 < max(one.top1 for one in cascades) <= plain["large"].top1 == 100
    assert pick(mean=1e3, registry=registry).candidates == len(engines)
    assert registry.build(3).kind == "cascades"
    assert check(registry) == []


def test_a_picked_cascade_of_plain_networks_answers_as_its_stages_by_numpy(registered: Place) -> None:
    registry = Registry.open(registered.registry, create=False)
    found = pick(mean=1e3, family="both", registry=registry)
    cascade = found.engine.route
    assert isinstance(cascade, Cascade)
    images, labels = _test_set(registered)
    first = small_logits(images)
    shares = np.exp(first / cascade.stages[0].temperature)
    sure = (shares / shares.sum(1, keepdims=True)).max(1) >= cascade.stages[0].threshold
    expected = np.where(sure[:, None], first, large_logits(images))
    with found.load(threads=1) as engine:
        np.testing.assert_allclose(engine.run(images), expected, atol=1e-4)
        assert engine.session.counters().images == (sure.sum(), (~sure).sum())
        assert engine.predict(sorted(registered.test.rglob("*.png"))[0], top=1)[0].label == "class0"
    assert 0 < sure.sum() < len(images)
    assert found.engine.top1 == pytest.approx(100 * (expected.argmax(1) == labels).mean())


def test_what_is_registered_stays_when_a_network_is_added_again_or_removed(tmp_path: Path) -> None:
    own = Place(tmp_path)
    own.fit(register="both")
    own.add(tmp_path / "small.onnx", data_config=PREPARED)
    registry = Registry.open(own.registry, create=False)
    assert check(registry) == []
    removed = CliRunner().invoke(main, ["registry", "remove", "large", "--registry", str(own.registry)])
    assert removed.exit_code == 0, removed.output
    assert CliRunner().invoke(main, ["registry", "gc", "--registry", str(own.registry)]).exit_code == 0
    with pick(mean=1e3, family="both", registry=registry).load(threads=1) as engine:
        assert engine.run(np.zeros((2, 3, EDGE, EDGE), np.float32)).shape == (2, CLASSES)


def test_fitting_again_replaces_the_cascades_and_other_families_keep_their_names(registered: Place) -> None:
    before = Registry.open(registered.registry, create=False).engines("both")
    registered.fit(register="both")
    after = Registry.open(registered.registry, create=False).engines("both")
    assert {one.build_id for one in before}.isdisjoint(one.build_id for one in after)
    assert all(one.cascade is not None for one in after)
    for name in ("small", "deit-micro"):
        with pytest.raises(UsageError, match=f"{name} is a family of other engines"):
            registered.fit(register=name)


def test_a_joined_package_is_verified_installed_and_evaluated_as_any_other(place: Place, tmp_path: Path) -> None:
    place.fit(out=tmp_path / "joined")
    package = Package.open(tmp_path / "joined")
    assert [one.name for one in package.routes] == ["small", "large"]
    assert package.manifest.family.name == "small-large"
    assert package.manifest.family.classes == ("class0", "class1", "class2")
    assert [one.status for one in verify_package(package.folder)] == ["verified"] * 2
    images = package.references().images
    for name, expected in (("small", small_logits), ("large", large_logits)):
        np.testing.assert_allclose(package.references().logits[name], expected(images), atol=1e-4)
    session = ElasticSession(package, threads=1)  # what servers open
    names = session.add_package_cascades()
    assert names and set(names) <= {one.name for one in read_cascades(package).cascades}
    assert session.run(images, route=names[0]).shape == (len(images), CLASSES)
    installed = install(package.folder, registry=tmp_path / "elsewhere", threads=1, method=QUICK)
    assert installed is not None
    engines = Registry.open(tmp_path / "elsewhere", create=False).engines()
    assert sorted({one.cascade is None for one in engines}) == [False, True]
    with pick(mean=1e3, registry=tmp_path / "elsewhere").load(threads=1) as engine:
        np.testing.assert_allclose(engine.run(images).argmax(1), large_logits(images).argmax(1))


def test_routes_of_a_stitched_family_join_under_its_name_and_still_share_their_prefix(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "package")
    other = packages.write_package(tmp_path / "other")
    packages.edit(other.folder, lambda manifest: manifest["family"].update(name="copied"))
    facts = package.manifest.family
    preprocess = prepared(facts.data_config, facts.input_shape, "it")
    parts = [Part(name=one.manifest.family.name, package=one, preprocess=preprocess)
             for one in (package, Package.open(other.folder))]  # fmt: skip
    (tmp_path / "joined").mkdir()
    joined = join_packages(parts, tmp_path / "joined", name="joined", provider=PROVIDER, threads=1)
    own = [one.name for one in package.routes]
    wanted = {_prefixed(name, family) for name in own for family in ("made-up", "copied")}
    assert {one.name for one in joined.routes} == wanted
    images = package.references().images
    for name in own:
        path = joined.engine(joined.route(_prefixed(name, "made-up")))
        with open_engine(path, provider=PROVIDER, threads=1) as session:
            np.testing.assert_allclose(session.run(images), package.references().logits[name], atol=1e-3)
    carried, one = packages.carry_cascade(joined, routes=[_prefixed(name, "made-up") for name in ("slim", own[1])])
    assert one.cascade.stages[1].shared == 2 and carried.manifest.family.name == "joined"


def _prefixed(name: str, family: str) -> str:
    return "+".join(f"{family}_{segment}" for segment in name.split("+"))


def _with_other(**changes: Any) -> Callable[[Place, Path], dict[str, Any]]:
    def make(place: Place, folder: Path) -> dict[str, Any]:
        given = {"data_config": {**PREPARED, **changes.get("data_config", {})}}
        file = _network(folder / "other.onnx", "large", batch=changes.get("batch", "batch"))
        place.add(file, **{**given, "name": changes["name"]})
        return {"targets": ("small", changes["name"])}

    return make


def _graphs_of_two_opsets(place: Place, folder: Path) -> dict[str, Any]:
    place.add(_network(folder / "older.onnx", "large", opset=16), data_config=PREPARED, name="older")
    return {"targets": ("small", "older"), "graphs": True}


REFUSED: list[tuple[Callable[[Place, Path], dict[str, Any]], type[KlasZooError], str]] = [
    (_with_other(name="elsewhere", data_config={"mean": [0.4] * 3}), UsageError,
     r"small and elsewhere cannot be stages of one cascade: mean is .*0\.5.* and .*0\.4"),
    (_with_other(name="single", batch=1), UsageError, "single takes batches of 1 only"),
    (_graphs_of_two_opsets, UsageError, "small and older use other opsets of ONNX: --graphs takes graphs of one"),
    (lambda p, f: {"targets": ("small", "smal")}, UnknownName, "did you mean small"),
    (lambda p, f: {"targets": ("small", "small")}, UsageError, "small is named twice"),
    (lambda p, f: {"targets": ("small", f / "nothing")}, PackageError, "is no package"),
    (lambda p, f: {"precision": "int8"}, UsageError, "small has no engines in int8 .* only in fp32"),
    (lambda p, f: {"register": "both", "test": None}, UsageError, "--register needs --test"),
    (lambda p, f: {"register": "a b"}, UsageError, "'a b' is no name of a family"),
    (lambda p, f: {"data": p.test, "test": p.heldout}, UsageError, "accuracies were measured on these images"),
    (lambda p, f: {"routes": ("small", "larg")}, UnknownName, "did you mean large"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence_and_nothing_is_registered(
    tmp_path: Path, place: Place, change: Callable[[Place, Path], dict[str, Any]], kind: type[KlasZooError],
    sentence: str,
) -> None:  # fmt: skip
    options = {"targets": ("small", "large"), "register": "refused", **change(place, tmp_path)}
    with pytest.raises(kind, match=sentence) as refused:
        place.fit(*options.pop("targets"), **options)
    assert "\n" not in str(refused.value)
    assert not any(one.family == "refused" for one in Registry.open(place.registry, create=False).engines())


def test_networks_of_other_classes_or_precisions_are_refused(tmp_path: Path) -> None:
    plain = packages.write_package(tmp_path / "plain")
    other = packages.write_package(tmp_path / "other")
    packages.edit(other.folder, lambda manifest: manifest["family"].update(name="other", classes=["a", "b"]))
    packages.edit(plain.folder, lambda manifest: manifest["family"].update(classes=["a", "c"]))
    with pytest.raises(UsageError, match="made-up and other cannot be stages of one cascade: class 1 is c and b"):
        fit_registered([plain.folder, other.folder], registry=tmp_path / "none")
    packages.edit(other.folder, lambda manifest: manifest.update(precision="fp16"))
    with pytest.raises(UsageError, match="made-up is in fp32 and other in fp16: a package has one precision"):
        fit_registered([plain.folder, other.folder], registry=tmp_path / "none")


def test_the_command_registers_and_says_so(place: Place) -> None:
    arguments = ["cascades", "small", "large", "--data", place.heldout, "--test", place.test, "--threads", "1",
                 "--registry", place.registry, "--register", "by-command", "--no-triples"]  # fmt: skip
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert "small ?p" in done.output and "Registered as build" in done.output
    picked = CliRunner().invoke(main, ["pick", "--mean", "10s", "--family", "by-command", "--registry",
                                       str(place.registry), "--json"])  # fmt: skip
    assert picked.exit_code == 0, picked.output
    assert " | large" in json.loads(picked.stdout)["engine"]["route"]

"""Plain networks as candidates: what is added, and what is refused with the registry unchanged."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_networks
import pytest
from click.testing import CliRunner
from onnx import TensorProto, external_data_helper
from toys import write_images

import klas_zoo
from klas_zoo.catalogue.adding import add
from klas_zoo.catalogue.second_runtime import second_runtime
from klas_zoo.cli import main
from klas_zoo.errors import ExportError, KlasZooError, UnknownName, UsageError, VerificationError
from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.onnx_files import read_network, stated_preprocessing
from klas_zoo.preprocess import Preprocess
from klas_zoo.profiles.timing import Method
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick

QUICK = Method(warmup_ms=0, min_runs=3, min_ms=0, rounds=1)
PREPARED = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
ANIMALS = ("ant", "bee", "cat")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return onnx_networks.write(tmp_path / "ours v3.onnx")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val/ alone, with 3 classes of 10 images."""
    folder = tmp_path_factory.mktemp("images") / "val"
    write_images(folder, ANIMALS, 10, size=(8, 8), seed=1)
    return folder


def registry_of(tmp_path: Path) -> Path:
    return tmp_path / "registry"


def expected_top1(file: Path, images: Path) -> float:
    """By numpy alone."""
    prepare = Preprocess.from_json({**PREPARED, "input_size": (3, 8, 8)})
    hits = Counter[bool]()
    for label, animal in enumerate(ANIMALS):
        for path in sorted((images / animal).iterdir()):
            hits[int(onnx_networks.logits(onnx.load(file), prepare(path)[None]).argmax()) == label] += 1
    return 100 * hits[True] / hits.total()


def test_an_onnx_file_is_verified_evaluated_timed_registered_and_picked(
    tmp_path: Path, file: Path, images: Path
) -> None:
    root = registry_of(tmp_path)
    added = add(file, data=images, data_config=PREPARED, registry=root, method=QUICK, batches=(1, 4))
    assert (added.name, added.notes, added.refused) == ("ours-v3", (), {})
    found = pick("10s", registry=root)
    engine = found.engine
    assert str(engine.route) == engine.family == "ours-v3"
    assert (engine.top1, engine.images) == (pytest.approx(expected_top1(file, images)), 30)
    # by hand: 8 · 8 positions · 16 filters · 27 products, then 16 · 3
    assert engine.macs == 8 * 8 * 16 * 27 + 48
    assert engine.parameters == 16 * 27 + 16 + 48 + 3
    assert engine.preprocessing["mean"] == [0.5] * 3
    assert {one.batch for one in engine.latencies} == {1, 4}
    assert engine.verification is not None and engine.verification.passed
    record = Registry.open(root, create=False).build(added.build_id)
    assert (record.kind, record.data_fingerprint) == ("add", engine.data_fingerprint)
    assert "ours v3.onnx, SHA-256 " in str(record.manifest["source"])
    assert check(Registry.open(root, create=False)) == []
    sample = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    with found.load() as session:
        assert session.run(sample) == pytest.approx(onnx_networks.logits(onnx.load(file), sample), abs=1e-4)
    assert [one.status for one in verify_package(engine.path.parent)] == ["verified"]


def test_the_package_names_classes_and_its_graph_says_how_images_are_prepared(
    tmp_path: Path, file: Path, images: Path
) -> None:
    add(file, data=images, data_config=PREPARED, registry=tmp_path / "first", method=QUICK)
    engine = pick("10s", registry=tmp_path / "first").load()
    assert engine.classes == ANIMALS
    assert engine.predict(next(images.rglob("*.png")), top=1)[0].label in ANIMALS
    graph = engine.record.path
    assert {key: stated_preprocessing(graph)[key] for key in PREPARED} == PREPARED
    # the graph alone is enough: to evaluate it, and to add it once more
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (graph, graph.parent / "weights.bin"):
        (alone / path.name).write_bytes(path.read_bytes())
    (found,) = klas_zoo.evaluate(alone / graph.name, data=images)
    assert found.top1 == pytest.approx(expected_top1(file, images))
    again = add(alone / graph.name, data=images, registry=tmp_path / "second", method=QUICK)
    assert again.notes == ()
    assert pick("10s", registry=tmp_path / "second").engine.preprocessing["std"] == PREPARED["std"]


def test_a_list_of_other_classes_is_refused(tmp_path: Path, file: Path, images: Path) -> None:
    with pytest.raises(UsageError, match=r"names 2 classes, and ours-v3 has 3\."):
        add(file, top1=50, top1_source="us", classes=("ant", "bee"), registry=registry_of(tmp_path), method=QUICK)


def test_a_claimed_accuracy_is_marked_and_picked_only_when_asked_for(tmp_path: Path, file: Path) -> None:
    root = registry_of(tmp_path)
    added = add(file, name="ours", top1=81.5, top1_source="its model card", registry=root, method=QUICK)
    assert "pass --mean, --std" in added.notes[0]
    with pytest.raises(UsageError, match="the accuracy is claimed"):
        pick("10s", registry=root)
    found = pick("10s", claimed=True, registry=root)
    assert (found.engine.top1, found.engine.accuracy_source) == (81.5, "its model card")
    assert found.engine.claimed and found.engine.data_fingerprint == ""


def test_several_precisions_and_runtimes_of_one_network(tmp_path: Path, file: Path, images: Path) -> None:
    pytest.importorskip("openvino")
    added = add(
        file, data=images, data_config=PREPARED, registry=registry_of(tmp_path), method=QUICK,
        precisions=("fp32", "int8"), runtimes=("onnxruntime", "openvino"),
    )  # fmt: skip
    made = {(one.precision, one.runtime) for one in added.engines}
    assert {("fp32", "onnxruntime"), ("fp32", "openvino")} <= made
    assert set(added.refused) | {precision for precision, _ in made} == {"fp32", "int8"}
    assert check(Registry.open(registry_of(tmp_path), create=False)) == []


def test_adding_again_replaces_the_network_and_leaves_others(tmp_path: Path, file: Path) -> None:
    root, claim = registry_of(tmp_path), {"top1": 50.0, "top1_source": "us", "method": QUICK}
    add(file, name="other", registry=root, **claim)  # type: ignore[arg-type]
    for top1 in (60.0, 70.0):
        add(file, name="ours", registry=root, **{**claim, "top1": top1})  # type: ignore[arg-type]
    engines = Registry.open(root, create=False).engines()
    assert {one.family: one.top1 for one in engines} == {"other": 50.0, "ours": 70.0}


def test_a_torch_module_is_added_through_python(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    added = klas_zoo.add(
        model.eval(), name="mine", input_shape=(3, 8, 8), data_config=PREPARED, top1=12.5, top1_source="us",
        registry=registry_of(tmp_path), method=QUICK,
    )  # fmt: skip
    (engine,) = added.engines
    assert (engine.num_classes, engine.macs) == (5, 36 * 4 * 27 + 144 * 5)
    assert engine.parameters == sum(one.numel() for one in model.parameters())
    sample = torch.randn(3, 3, 8, 8)
    with pick("10s", claimed=True, registry=registry_of(tmp_path)).load() as session:
        assert session.run(sample.numpy()) == pytest.approx(model(sample).detach().numpy(), abs=1e-4)


def test_a_timm_model_is_added_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    added = add(
        "timm:deit_micro_tiny", random_weights=True, top1=10.0, top1_source="chance", registry=registry_of(tmp_path),
        method=QUICK,
    )  # fmt: skip
    (engine,) = added.engines
    assert (added.name, engine.weights, engine.num_classes) == ("deit_micro_tiny", "random", 10)
    with pytest.raises(UnknownName, match="did you mean"):
        add("timm:deit_micro_tini", top1=1.0, top1_source="us", registry=registry_of(tmp_path))


def test_a_file_that_takes_one_batch_size_is_added_as_it_is(tmp_path: Path, images: Path) -> None:
    file = onnx_networks.write(tmp_path / "fixed.onnx", input_shape=(2, 3, 8, 8))
    added = add(file, data=images, data_config=PREPARED, registry=registry_of(tmp_path), method=QUICK)
    (engine,) = added.engines
    assert [one.batch for one in engine.latencies] == [2]
    assert engine.top1 == pytest.approx(expected_top1(onnx_networks.write(tmp_path / "free.onnx"), images))
    with pytest.raises(UsageError, match="takes batches of 2 only"):
        add(file, data=images, precisions=("fp32", "int8"), registry=registry_of(tmp_path), method=QUICK)


def test_an_engine_that_is_not_the_function_is_not_registered(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = second_runtime(onnx_networks.write(tmp_path / "other.onnx", seed=7))
    monkeypatch.setattr("klas_zoo.catalogue.networks.second_runtime", lambda path: other)
    with pytest.raises(VerificationError, match=r"ours-v3 was not registered, as no engine computes what .* does"):
        add(file, top1=50, top1_source="us", registry=registry_of(tmp_path), method=QUICK)
    assert Registry.open(registry_of(tmp_path), create=False).engines() == []


def test_without_openvino_the_reference_implementation_of_onnx_is_compared_with(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = second_runtime(file)
    assert found.name.startswith("onnx.reference ") and found.most_images == 4
    sample = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    assert found.logits(sample) == pytest.approx(onnx_networks.logits(onnx.load(file), sample), abs=1e-4)
    added = add(file, top1=50, top1_source="us", registry=registry_of(tmp_path), method=QUICK)
    (engine,) = added.engines
    assert engine.verification is not None and engine.verification.images == 4


def test_weights_beside_the_file_are_read_and_stored_once(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "network"
    folder.mkdir()
    model = onnx_networks.classifier()
    onnx.save(model, folder / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=100)
    assert (folder / "net.data").is_file()
    added = add(folder / "net.onnx", data=images, data_config=PREPARED, registry=registry_of(tmp_path), method=QUICK)
    (engine,) = added.engines
    assert engine.top1 == pytest.approx(expected_top1(folder / "net.onnx", images))


# what is refused


def outside(tmp_path: Path, location: str) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir(exist_ok=True)
    (tmp_path / "secret").write_bytes(bytes(16 * 27 * 4))
    model = onnx_networks.classifier()
    kernel = model.graph.initializer[0]
    external_data_helper.set_external_data(kernel, location)
    kernel.ClearField("raw_data")
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    if location == "link":
        (folder / "link").symlink_to(tmp_path / "secret")
    return folder / "net.onnx"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown operator": ({"domain": "our.own", "relu": "Relu7"}, r"ONNX does not define: our\.own::Relu7"),
    "an operator that ONNX lacks": ({"relu": "Rely"}, r"does not define: ai\.onnx::Rely"),
    "images of any size": ({"input_shape": ("batch", 3, "height", "width")}, r"\(batch, 3, height, width\): .*fixed"),
    "several inputs": ({"more_inputs": 1}, r"has 2 inputs and 1 outputs \(images, other0, logits\)"),
    "several outputs": ({"more_outputs": 2}, r"has 1 inputs and 3 outputs \(images, logits, more0, more1\)"),
    "bytes": ({"input_type": TensorProto.UINT8}, r"takes uint8: an engine takes normalised images as float32"),
    "flat images": ({"input_shape": ("batch", 192)}, r"shape \(batch, 192\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_such_network_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    changes, says = BAD[name]
    file = onnx_networks.write(tmp_path / "bad.onnx", **changes)
    refused(tmp_path, [str(file), "--top1", "50", "--top1-source", "us"], says)


@pytest.mark.parametrize("location", ["../secret", "link", "/etc/passwd", "a/../../secret", ""])
def test_weights_outside_of_the_folder_are_never_read(tmp_path: Path, location: str) -> None:
    file = outside(tmp_path, location)
    refused(tmp_path, [str(file), "--top1", "50", "--top1-source", "us"], "which is not a file of its own folder")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--top1", "100.5", "--top1-source", "us"], "per cent, 0 to 100, not 100.5"),
        (["--top1", "-1", "--top1-source", "us"], "per cent, 0 to 100, not -1"),
        (["--top1", "nan", "--top1-source", "us"], "per cent, 0 to 100, not nan"),
        (["--top1", "50"], "Who claims that top-1"),
        ([], "Pass either images"),
        (["--top1", "50", "--top1-source", "us", "--data", "here"], "Pass either images"),
        (["--top1", "50", "--top1-source", "us", "--labels", "10"], "has 3 classes, not 10"),
        (["--top1", "50", "--top1-source", "us", "--name", "a b"], "is no name of a network"),
        (["--top1", "50", "--top1-source", "us", "--name", "deit"], "deit is a family that klas-zoo builds"),
        (["--top1", "50", "--top1-source", "us", "--precision", "fp7"], "Unknown precision 'fp7'"),
        (["--top1", "50", "--top1-source", "us", "--runtime", "onnxruntim"], "did you mean onnxruntime"),
        (["--top1", "50", "--top1-source", "us", "--mean", "0.5"], "mean is three numbers"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_contradictory_or_impossible_requests_are_refused(
    tmp_path: Path, file: Path, arguments: list[str], says: str
) -> None:
    refused(tmp_path, [str(file), *arguments], says)


def test_images_of_other_classes_are_refused(tmp_path: Path, file: Path) -> None:
    write_images(tmp_path / "val", ("a", "b", "c", "d"), 2, size=(8, 8), seed=1)
    refused(tmp_path, [str(file), "--data", str(tmp_path / "val")], "has 4 classes, the family has 3")


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a network" * 50)
    claim = ["--top1", "50", "--top1-source", "us"]
    refused(tmp_path, [str(tmp_path / "bad.onnx"), *claim], "is not an ONNX file")
    refused(tmp_path, [str(tmp_path / "none.onnx"), *claim], "add takes timm:NAME, or the path of an ONNX file")


def test_a_file_that_the_checker_refuses_is_refused(tmp_path: Path) -> None:
    model = onnx_networks.classifier()
    model.graph.node[0].attribute.add(name="strides").s = b"two"
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="does not pass ONNX's checker"):
        read_network(tmp_path / "bad.onnx")


def test_nothing_is_added_to_a_registry_of_a_newer_version(tmp_path: Path, file: Path) -> None:
    import sqlite3

    root = registry_of(tmp_path)
    Registry.open(root, create=True)
    with sqlite3.connect(root / "registry.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = (root / "registry.sqlite").read_bytes()
    with pytest.raises(KlasZooError, match="made by a newer klas-zoo"):
        add(file, top1=50, top1_source="us", registry=root, method=QUICK)
    assert (root / "registry.sqlite").read_bytes() == before


def refused(tmp_path: Path, arguments: list[str], says: str) -> None:
    """One sentence, exit 1 or 2, and the registry as it was."""
    import re

    root = registry_of(tmp_path)
    Registry.open(root, create=True)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    result = CliRunner().invoke(main, ["add", *arguments, "--registry", str(root)], catch_exceptions=False)
    assert result.exit_code in (1, 2), result.output
    assert re.search(says, result.stderr), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 or "Usage:" in result.stderr
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "store.lock"}
    assert {path: content for path, content in before.items() if path.name != "store.lock"} == after


def test_the_command_prints_what_it_added(tmp_path: Path, file: Path, images: Path) -> None:
    root = registry_of(tmp_path)
    prepared = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--interpolation", "bilinear", "--crop-pct", "1"]
    arguments = ["add", str(file), "--data", str(images), "--name", "ours", *prepared, "--registry", str(root)]
    result = CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["name"] == "ours"
    assert found["engines"][0]["top1"] == pytest.approx(expected_top1(file, images))

"""Accuracy of engines of every kind, against a count in numpy; and what cannot be evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import light
import numpy as np
import onnx_networks
import pytest
from click.testing import CliRunner
from PIL import Image
from test_adding import ANIMALS, PREPARED, QUICK, expected_top1
from toys import write_images

import klas_zoo
from klas_zoo.catalogue.adding import add
from klas_zoo.catalogue.evaluating import Evaluation, evaluate
from klas_zoo.cli import main
from klas_zoo.confidence import lower_share, upper_share
from klas_zoo.data.loading import load_data
from klas_zoo.errors import DataError, UnknownName, UsageError
from klas_zoo.preprocess import Preprocess
from klas_zoo.registry import Registry

PREPROCESS = Preprocess.from_json({**PREPARED, "input_size": (3, 8, 8)})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/, with 3 classes of 10 images."""
    folder = tmp_path_factory.mktemp("images")
    for seed, split in enumerate(("train", "val")):
        write_images(folder / split, ANIMALS, 10, size=(8, 8), seed=seed)
    return folder


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Registry, Path]:
    """A registry with one network, and the file it was made of."""
    folder = tmp_path_factory.mktemp("registered")
    file = onnx_networks.write(folder / "ours.onnx")
    add(file, data=images, data_config=PREPARED, registry=folder / "registry", method=QUICK)
    return Registry.open(folder / "registry", create=False), file


def one(found: list[Evaluation]) -> Evaluation:
    (evaluation,) = found
    return evaluation


def test_a_package_a_file_of_it_and_a_registered_route_have_the_accuracy_of_a_count(
    registered: tuple[Registry, Path], images: Path
) -> None:
    registry, file = registered
    engine = registry.engines()[0]
    expected = expected_top1(file, images / "val")
    for target in (engine.path.parent, engine.path):
        assert one(evaluate(target, data=images)).top1 == pytest.approx(expected)
    found = one(evaluate("ours", data=images, registry=registry.root))
    assert (found.top1, found.images, found.num_classes, found.top5) == (pytest.approx(expected), 30, 3, None)
    assert found.data_fingerprint == engine.data_fingerprint
    assert one(klas_zoo.evaluate("ours", data=images / "val", registry=registry.root)) == one(
        evaluate("ours", data=images / "val", registry=registry.root)
    )


def test_a_file_on_its_own_needs_to_be_told_how_images_are_prepared(tmp_path: Path, images: Path) -> None:
    file = onnx_networks.write(tmp_path / "ours.onnx")
    found = one(evaluate(file, data=images, preprocess=PREPROCESS))
    assert found.top1 == pytest.approx(expected_top1(file, images / "val"))
    with pytest.raises(UsageError, match="is not part of a package, so that it is not known how"):
        evaluate(file, data=images)


def test_the_validation_folder_alone_gives_the_fingerprint_of_a_build(images: Path) -> None:
    data = load_data(images, sample=None, num_classes=3, data_config={**PREPARED, "input_size": (3, 8, 8)})
    from klas_zoo.data.sources import fingerprint, open_test_images

    assert fingerprint(open_test_images(images / "val", 3).test) == data.test_fingerprint
    assert fingerprint(open_test_images(images, 3).test) == data.test_fingerprint


def test_the_intervals_are_those_of_clopper_and_pearson(registered: tuple[Registry, Path], images: Path) -> None:
    found = one(evaluate(registered[0].engines()[0].path, data=images))
    hits = round(found.top1 * found.images / 100)
    low, high = found.top1_interval
    assert (low, high) == pytest.approx((100 * lower_share(hits, 30, 0.975), 100 * upper_share(hits, 30, 0.975)))
    assert low < found.top1 < high or found.top1 in (low, high)


def test_top5_and_ties_are_counted_as_sorting_counts_them(tmp_path: Path) -> None:
    animals = tuple(f"animal{number}" for number in range(8))
    write_images(tmp_path / "val", animals, 6, size=(8, 8), seed=3)
    model = onnx_networks.classifier(classes=8)
    matrix = next(one for one in model.graph.initializer if one.name == "matrix")
    matrix.raw_data = matrix.raw_data[: len(matrix.raw_data) // 8] * 8  # all classes are equal but for their bias
    bias = next(one for one in model.graph.initializer if one.name == "bias")
    bias.raw_data = np.asarray([0, 1, 1, 0, 2, 0, 0, 0], np.float32).tobytes()
    (tmp_path / "ties.onnx").write_bytes(model.SerializeToString())
    found = one(evaluate(tmp_path / "ties.onnx", data=tmp_path / "val", preprocess=PREPROCESS))
    # sorted: 4, 1, 2, 0, 3, 5, 6, 7
    assert (found.top1, found.top5) == (pytest.approx(100 / 8), pytest.approx(500 / 8))
    assert found.top5_interval is not None and found.top5_interval[0] < 500 / 8 < found.top5_interval[1]


def test_an_engine_that_gives_nan_is_never_right(tmp_path: Path, images: Path) -> None:
    model = onnx_networks.classifier()
    bias = next(one for one in model.graph.initializer if one.name == "bias")
    bias.raw_data = np.asarray([np.nan, 0, 0], np.float32).tobytes()
    (tmp_path / "nan.onnx").write_bytes(model.SerializeToString())
    assert one(evaluate(tmp_path / "nan.onnx", data=images, preprocess=PREPROCESS)).top1 == 0


@pytest.mark.parametrize("batch", [1, 7, 30, 64])
def test_engines_of_one_batch_size_see_every_image_once(tmp_path: Path, images: Path, batch: int) -> None:
    fixed = onnx_networks.write(tmp_path / "fixed.onnx", input_shape=(batch, 3, 8, 8))
    free = onnx_networks.write(tmp_path / "free.onnx")
    found = one(evaluate(fixed, data=images, preprocess=PREPROCESS))
    assert (found.top1, found.images) == (pytest.approx(expected_top1(free, images / "val")), 30)


def test_another_runtime_has_the_same_accuracy(registered: tuple[Registry, Path], images: Path) -> None:
    pytest.importorskip("openvino")
    path = registered[0].engines()[0].path
    found = one(evaluate(path, data=images, runtime="openvino"))
    assert (found.runtime, found.top1) == ("openvino", one(evaluate(path, data=images)).top1)


def test_nothing_of_evaluating_an_onnx_package_needs_torch(
    registered: tuple[Registry, Path], images: Path
) -> None:
    code = "import sys, klas_zoo\nprint(klas_zoo.evaluate(sys.argv[1], data=sys.argv[2])[0].top1)\n"
    done = light.run(registered[0].engines()[0].path.parent, images, code=code)
    assert done.stderr == "" and float(done.stdout) == pytest.approx(expected_top1(registered[1], images / "val"))


# what cannot be evaluated


def test_images_of_other_classes_are_refused_with_both_counts(
    tmp_path: Path, registered: tuple[Registry, Path]
) -> None:
    write_images(tmp_path / "val", ("a", "b", "c", "d"), 2, size=(8, 8))
    path = registered[0].engines()[0].path
    with pytest.raises(DataError, match="has 4 classes, the family has 3"):
        evaluate(path, data=tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "a")
    shutil.rmtree(tmp_path / "val" / "b")
    with pytest.raises(DataError, match=r"has 2 classes, the family has 3: .*--classes"):
        evaluate(path, data=tmp_path / "val")
    found = one(evaluate(path, data=tmp_path / "val", classes=("c", "x", "d")))
    assert found.images == 4


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, registered: tuple[Registry, Path]) -> None:
    write_images(tmp_path / "val", ANIMALS, 2, size=(8, 8))
    (tmp_path / "val" / "bee" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bee/1\.png cannot be read"):
        evaluate(registered[0].engines()[0].path, data=tmp_path / "val")


def test_what_is_no_target_is_answered_with_the_nearest_route(
    registered: tuple[Registry, Path], images: Path
) -> None:
    with pytest.raises(UnknownName, match="Unknown route 'our': did you mean ours"):
        evaluate("our", data=images, registry=registered[0].root)
    with pytest.raises(UsageError, match=r"Which images\? Pass --data DIR"):
        evaluate("ours", registry=registered[0].root)


def test_an_engine_that_was_tampered_with_is_not_evaluated(
    tmp_path: Path, registered: tuple[Registry, Path], images: Path
) -> None:
    package = tmp_path / "package"
    shutil.copytree(registered[0].engines()[0].path.parent, package)
    weights = package / "weights.bin"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(klas_zoo.KlasZooError, match="SHA-256"):
        evaluate(package, data=images)


def test_the_command_prints_intervals_and_json(registered: tuple[Registry, Path], images: Path) -> None:
    arguments = ["evaluate", "ours", "--data", str(images / "val"), "--registry", str(registered[0].root)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith("ours of ours (onnxruntime, fp32): top-1 ") and " to " in result.stdout
    (found,) = json.loads(CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (found["images"], found["level"], len(found["top1_interval"])) == (30, 0.95, 2)


def test_images_of_any_size_are_prepared_as_the_package_says(
    tmp_path: Path, registered: tuple[Registry, Path]
) -> None:
    """Larger images, so that resizing and cropping take part."""
    write_images(tmp_path / "val", ANIMALS, 3, size=(30, 21))
    path = registered[0].engines()[0].path
    hits = sum(
        int(
            onnx_networks.logits(onnx_networks.classifier(), PREPROCESS(Image.open(file))[None]).argmax() == label
        )
        for label, animal in enumerate(ANIMALS)
        for file in (tmp_path / "val" / animal).iterdir()
    )  # fmt: skip
    assert one(evaluate(path, data=tmp_path / "val")).top1 == pytest.approx(100 * hits / 9)

"""From an image file to named classes with a registered engine, without torch."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
import tiny_engines
from click.testing import CliRunner
from photos import photographs
from PIL import Image

from klas_zoo.cli import main
from klas_zoo.errors import DataError, UsageError
from klas_zoo.registry import Registry
from klas_zoo.registry.loaded import class_names
from klas_zoo.registry.picking import pick

README = Path(__file__).parent.parent / "README.md"
FACTS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "crop_pct": 1.0, "interpolation": "bilinear"}


NAMES = ("red", "green", "blue")


def registered(root: Path, *, classes: object = NAMES, batch: str = "batch", **changes: Any) -> Registry:
    """An engine whose logits are the means of the channels."""
    package = root / "package"
    package.mkdir(parents=True)
    file = tiny_engines.means(package, batch=batch)
    made_up.write_manifest(package)
    manifest = json.loads((package / "manifest.json").read_text())
    (package / "manifest.json").write_text(json.dumps({**manifest, "family": {"classes": classes}}))
    registry = Registry.open(root / "registry", create=True)
    engine = made_up.new_engine(file, "means", **{"preprocessing": FACTS, "num_classes": 3} | changes)
    registry.register(made_up.build(), [engine])
    shutil.rmtree(package)
    return registry


@pytest.fixture
def green(tmp_path: Path) -> Path:
    """A JPEG that is mostly green."""
    pixels = np.random.default_rng(0).integers(0, 90, (50, 70, 3), np.uint8)
    pixels[..., 1] += 120
    Image.fromarray(pixels).save(tmp_path / "green.jpg", quality=95)
    return tmp_path / "green.jpg"


def test_the_most_probable_classes_come_first_with_their_names(tmp_path: Path, green: Path) -> None:
    with pick("1s", registry=registered(tmp_path)).load() as engine:
        found = engine.predict(green, top=2)
        everything = engine.predict(green.read_bytes(), top=9)
        logits = engine.run(engine.preprocess.batch([green]))[0].astype(np.float64)
    assert [one.label for one in found] == ["green", everything[1].label] and len(everything) == 3
    assert sum(one.probability for one in everything) == pytest.approx(1)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [one.probability for one in everything] == pytest.approx(sorted(expected, reverse=True))
    assert re.fullmatch(r"green  \d+\.\d %", str(found[0]))


@pytest.mark.parametrize("picture", ["path", "text", "bytes", "image", "array"])
def test_pictures_of_every_form_give_the_same(tmp_path: Path, green: Path, picture: str) -> None:
    image = Image.open(green).convert("RGB")
    forms = {
        "path": green, "text": str(green), "bytes": green.read_bytes(), "image": image, "array": np.asarray(image)
    }  # fmt: skip
    with pick("1s", registry=registered(tmp_path)).load() as engine:
        assert engine.predict(forms[picture]) == engine.predict(green)


def test_engines_of_one_batch_size_are_filled_up(tmp_path: Path, green: Path) -> None:
    with pick("1s", registry=registered(tmp_path / "a")).load() as one:
        expected = one.predict(green)
    with pick("1s", registry=registered(tmp_path / "b", batch="4")).load() as four:
        assert [found.probability for found in four.predict(green)] == pytest.approx([f.probability for f in expected])


@pytest.mark.parametrize("classes", [None, {}, "red", 7])
def test_without_names_the_numbers_are_given(tmp_path: Path, green: Path, classes: object) -> None:
    with pick("1s", registry=registered(tmp_path, classes=classes)).load() as engine:
        assert engine.predict(green)[0].label == "1"


def test_a_file_that_is_no_package_has_no_names(tmp_path: Path) -> None:
    assert class_names(tmp_path / "engine.onnx") == ()
    (tmp_path / "manifest.json").write_text("[]")
    assert class_names(tmp_path / "engine.onnx") == ()


def test_what_cannot_be_predicted_is_refused(tmp_path: Path, green: Path) -> None:
    with pick("1s", registry=registered(tmp_path)).load() as engine:
        with pytest.raises(UsageError, match="top is the number of classes to give, 1 or more, not 0"):
            engine.predict(green, top=0)
        with pytest.raises(DataError, match=r"nothing\.jpg cannot be read"):
            engine.predict(tmp_path / "nothing.jpg")
    with (
        pick("1s", registry=registered(tmp_path / "old", preprocessing={})).load() as engine,
        pytest.raises(UsageError, match=r"How images are prepared for means is not known: .* lack mean, std"),
    ):
        engine.predict(green)


def test_a_prediction_survives_pickling(tmp_path: Path, green: Path) -> None:
    with pick("1s", registry=registered(tmp_path)).load() as engine:
        (best,) = engine.predict(green, top=1)
    assert pickle.loads(pickle.dumps(best)) == replace(best)


def test_the_command_shows_classes_of_every_image(tmp_path: Path, green: Path) -> None:
    registry = registered(tmp_path)
    words = ["predict", str(green), str(green), "--latency", "1s", "--top", "1", "--registry", str(registry.root)]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert re.fullmatch(r"(.*green\.jpg\n +\d+\.\d %  green\n){2}", result.stdout)
    shown = json.loads(CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False).stdout)
    assert [one["predictions"][0]["label"] for one in shown["images"]] == ["green", "green"]
    assert shown["engine"]["preprocessing"] == FACTS
    result = CliRunner().invoke(main, ["predict", str(tmp_path / "no.jpg"), *words[3:]], catch_exceptions=False)
    assert result.exit_code == 1 and "no.jpg cannot be read" in result.stderr and result.stderr.count("\n") == 1


def test_the_first_example_of_the_readme_runs_as_printed_without_torch(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None and "predict" in example[1]
    registry = registered(tmp_path)
    for name in ("cat.jpg", "dog.jpg"):
        photographs()[0].save(tmp_path / name)
    check = "assert logits.shape == (2, 3) and not {'torch', 'onnx', 'timm'} & set(sys.modules)"
    code = f"{example[1]}\nimport sys\n{check}\n"
    environment = os.environ | {"KLAS_ZOO_REGISTRY": str(registry.root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"((red|green|blue)  \d+\.\d %\n){3}", done.stdout)

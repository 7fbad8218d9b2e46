"""Preprocessing without torch is timm's evaluation transform, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photos import odd_images, photographs
from PIL import Image
from timm.data import create_transform

import klas_zoo
from klas_zoo.errors import DataError
from klas_zoo.families.specs import builtin_families
from klas_zoo.preprocess import Preprocess

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CONFIGS: dict[str, dict[str, Any]] = {
    "deit": {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9, **IMAGENET},
    "resnet": {"input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.95, **IMAGENET},
    "timm's defaults": {"input_size": (3, 96, 96), **IMAGENET},
    "cifar": {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0, **IMAGENET},
    "not square": {"input_size": (3, 96, 160), "interpolation": "lanczos", "crop_pct": 0.875, **IMAGENET},
    "squash": {"input_size": (3, 64, 80), "interpolation": "box", "crop_pct": 1.0, "crop_mode": "squash", **IMAGENET},
    "border": {"input_size": (3, 64, 96), "crop_pct": 0.9, "crop_mode": "border", "interpolation": "box", **IMAGENET},
    "nearest": {"input_size": (3, 50, 50), "interpolation": "nearest", "crop_pct": 0.77, **IMAGENET},
    "hamming": {"input_size": (3, 33, 47), "interpolation": "hamming", "crop_pct": 0.5, **IMAGENET},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    return list(odd_images(tmp_path_factory.mktemp("photos"), 500))


def as_timm(path: Path, mode: str, config: dict[str, Any]) -> np.ndarray:
    """timm's own way; images that Pillow clips come from what they were made of, 8 bits a pixel."""
    with Image.open(path) as opened:
        if mode == "I;16":
            opened = Image.fromarray((np.asarray(opened) // 257).astype(np.uint8))
        elif mode == "F":
            opened = Image.fromarray(np.rint(np.asarray(opened) * 255).astype(np.uint8))
        return create_transform(**config, is_training=False)(opened.convert("RGB")).numpy()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_five_hundred_odd_photographs_become_the_pixels_that_timm_makes_of_them(files: list[tuple[Path, str]]) -> None:
    assert photographs()
    names = list(CONFIGS)
    for number, (path, mode) in enumerate(files):
        config = CONFIGS[names[number % len(names)]]
        found = Preprocess.from_json(config)(path)
        assert found.dtype == np.float32 and found.shape == config["input_size"]
        assert np.array_equal(found, as_timm(path, mode, config)), (path.name, mode, names[number % len(names)])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_timms_own(name: str, files: list[tuple[Path, str]]) -> None:
    preprocess = Preprocess.from_json(CONFIGS[name])
    for path, mode in files[: 2 * 13]:
        assert np.array_equal(preprocess(path), as_timm(path, mode, CONFIGS[name])), (path.name, mode)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_network_of_one_channel_gets_grey_images_as_timm_makes_them(
    crop_mode: str, files: list[tuple[Path, str]]
) -> None:
    config: dict[str, Any] = {
        "input_size": (1, 48, 56), "mean": (0.4,), "std": (0.3,), "interpolation": "bicubic", "crop_pct": 0.9,
        "crop_mode": crop_mode,
    }  # fmt: skip
    transform = create_transform(**config, is_training=False)
    for path, mode in files[:60]:
        if mode not in ("I;16", "F"):
            with Image.open(path) as opened:
                expected = transform(opened.convert("RGB").convert("L")).numpy()
            assert np.array_equal(Preprocess.from_json(config)(path), expected), (path.name, mode)


def test_a_border_is_cut_off_first(files: list[tuple[Path, str]]) -> None:
    config = CONFIGS["deit"] | {"crop_border_pixels": 3}
    for path, mode in files[:10]:
        with Image.open(path) as opened:
            if min(opened.size) < 10:
                continue
        assert np.array_equal(Preprocess.from_json(config)(path), as_timm(path, mode, config))


def test_a_path_text_bytes_an_image_and_an_array_are_the_same(files: list[tuple[Path, str]]) -> None:
    preprocess = Preprocess.from_json(CONFIGS["cifar"])
    path = next(path for path, mode in files if mode == "RGB")
    wanted = preprocess(path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
        for picture in (str(path), path.read_bytes(), opened, pixels):
            assert np.array_equal(preprocess(picture), wanted)
    assert np.array_equal(preprocess.batch([path, pixels]), np.stack([wanted, wanted]))


def test_facts_survive_json() -> None:
    for config in CONFIGS.values():
        preprocess = Preprocess.from_json(config)
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_other_facts_of_timm_are_ignored() -> None:
    facts = {**CONFIGS["deit"], "crop_mode": None, "num_classes": 1000, "url": "x"}
    assert Preprocess.from_json(facts) == Preprocess.from_json(CONFIGS["deit"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mean": None}, "These preprocessing facts lack mean"),
        ({"std": (1, 1)}, r"std is three numbers, not \(1, 1\)\."),
        ({"std": (1, 1, 0)}, "std and input_size must be above zero"),
        ({"mean": (0, float("nan"), 0)}, "mean is three numbers"),
        ({"mean": (10**400, 0, 0)}, "mean is three numbers"),
        ({"mean": "abc"}, "mean is three numbers"),
        ({"input_size": (4, 28, 28)}, r"read as RGB, 3 channels, or .* 1 channel as grey; input_size is \[4, 28, 28\]"),
        ({"input_size": (1, 28, 28)}, "mean is one number, not"),
        ({"interpolation": "random"}, "interpolation is one of nearest, .*, not 'random'"),
        ({"crop_mode": "x"}, "crop_mode is one of center, squash, border, not 'x'"),
        ({"crop_pct": -1}, "crop_pct is a share above 0, mostly up to 1, not -1"),
        ({"crop_pct": float("nan")}, "crop_pct is a share above 0"),
    ],
)
def test_facts_without_meaning_are_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        Preprocess.from_json(CONFIGS["deit"] | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("/no/cat.jpg", r"^Image /no/cat\.jpg cannot be read: it does not exist\.$"),
        (Path("/"), r"^Image / cannot be read: it is not a regular file\.$|Is a directory"),
        (b"GIF89a", "^The image cannot be read: "),
        (b"", r"^The image cannot be read: it is not an image that Pillow can identify\.$"),
        (np.zeros((3, 8, 8), np.uint8), r"an array must be \(H, W, 3\) uint8, not \(3, 8, 8\) uint8\."),
        (np.zeros((8, 8, 3)), r"an array must be \(H, W, 3\) uint8, not \(8, 8, 3\) float64\."),
        (Image.new("I", (4, 4)), "its pixels are 32-bit integers of unknown range"),
        (Image.fromarray(np.full((4, 4), 7.0, np.float32)), "floating-point values from 7 to 7; only 0 to 1"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "floating-point values from nan to nan"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(picture: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        Preprocess.from_json(CONFIGS["cifar"])(picture)
    assert "\n" not in str(caught.value)


def test_threads_do_not_disturb_each_other(files: list[tuple[Path, str]]) -> None:
    preprocess = Preprocess.from_json(CONFIGS["deit"])
    chosen = [path for path, _ in files[:24]]
    wanted = preprocess.batch(chosen)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(preprocess.batch(chosen))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(one, wanted) for one in found)


def test_it_needs_neither_torch_nor_timm() -> None:
    code = (
        "import sys, klas_zoo, numpy; p = klas_zoo.Preprocess(input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1));"
        "p(numpy.zeros((9, 9, 3), 'uint8')); print(sorted({'torch', 'timm', 'torchvision', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_familys_own_configuration_is_one() -> None:
    from klas_zoo.families.anchors import load_family

    family = load_family(builtin_families()["deit-micro"])
    preprocess = klas_zoo.Preprocess.from_json(family.data_config)
    assert preprocess.input_size == (3, 32, 32) and preprocess.crop_pct == 1.0

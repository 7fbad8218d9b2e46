"""Every image is checked before work starts; damaged ones are named, and skipped where that is wanted."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys import write_images

from klas_zoo.data.damage import DamageCheck, find_damaged
from klas_zoo.data.folders import FolderOfImages
from klas_zoo.data.loading import Data, batches, load_data
from klas_zoo.errors import DataError

CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", ("ant", "bee"), 12, size=(40, 40))
    write_images(tmp_path / "val", ("ant", "bee"), 4, size=(40, 40))
    return tmp_path


def load(folder: Path, **options: Any) -> Data:
    return load_data(folder, sample=None, num_classes=2, data_config=CONFIG, damage=DamageCheck(**options))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])


def link_to_nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("/mount/that/is/not/there.png")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def metadata(file: Path) -> None:
    """An image whose XMP is no UTF-8: the pixels are whole."""
    with Image.open(file) as image:
        image.load()
    image.save(file, "JPEG", xmp=b"\xff\xfe\xfd not text", exif=b"Exif\0\0damaged")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "truncated": (truncate, "truncated"),
    "empty": (lambda file: file.write_bytes(b""), "not an image that Pillow can identify"),
    "text": (lambda file: file.write_text("<html>"), "not an image that Pillow can identify"),
    "link to nowhere": (link_to_nowhere, "it does not exist"),
    "pipe": (pipe, "it is not a regular file"),
    "folder of that name": (lambda file: (file.unlink(), file.mkdir()), None),
    "undecodable metadata": (metadata, None),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_image_is_named_before_work_starts(kind: str, folder: Path) -> None:
    damage, reason = DAMAGES[kind]
    damage(folder / "val" / "bee" / "1.png")
    if reason is None:
        load(folder)
        return
    lines: list[str] = []
    with pytest.raises(DataError) as caught:
        load(folder, say=lines.append)
    message = str(caught.value)
    assert message.startswith("1 of 32 images cannot be read (") and "val/bee/1.png: " in message and reason in message
    assert message.endswith("): repair or remove them, or pass --skip-damaged 1.")
    assert len(lines) == 1 and lines[0].startswith("Damaged: ") and "val/bee/1.png" in lines[0]


def test_damaged_images_are_skipped_up_to_a_number(folder: Path) -> None:
    whole = load(folder)
    for name in ("train/ant/3.png", "train/bee/7.png", "val/ant/0.png"):
        truncate(folder / name)
    with pytest.raises(DataError, match=r"^3 of 32 images cannot be read .* or pass --skip-damaged 3\.$"):
        load(folder, allowed=2)
    data = load(folder, allowed=3)
    assert (len(data.train) + len(data.heldout), len(data.test)) == (22, 7)
    assert data.notes[-1] == "3 damaged images of 32 are skipped."
    assert data.fingerprint != whole.fingerprint
    for split in (data.train, data.heldout, data.test):
        assert sum(len(labels) for _, labels in batches(split, 4)) == len(split)
        for index, label in enumerate(split.source.labels):
            assert Path(split.source.name(index)).parent.name == ("ant", "bee")[label]


def test_every_damaged_image_gets_a_line(folder: Path) -> None:
    for number in range(5):
        truncate(folder / "train" / "bee" / f"{number}.png")
    lines: list[str] = []
    with pytest.raises(DataError, match=r"; and 2 more\): repair"):
        load(folder, say=lines.append)
    assert len(lines) == 5


def test_a_check_is_made_once(folder: Path, tmp_path: Path) -> None:
    passes: list[tuple[str, int]] = []

    @contextmanager
    def watch(name: str, total: int, unit: str) -> Any:
        passes.append((name, total))
        yield lambda images, text: None

    cache = tmp_path / "cache"
    load(folder, cache=cache, watch=watch)
    assert passes == [("check images", 32)]
    load(folder, cache=cache, watch=watch)
    assert len(passes) == 1
    write_images(folder / "val" / "ant", ("more",), 1)
    load(folder, cache=cache, watch=watch)
    assert passes[1:] == [("check images", 9)]
    for file in cache.iterdir():
        file.write_text('{"3": "no image"}')  # a digit of it was another one
    load(folder, cache=cache, watch=watch)
    assert passes[2:] == [("check images", 33)]


def test_an_image_that_was_repaired_is_tried_again(folder: Path, tmp_path: Path) -> None:
    file = folder / "val" / "bee" / "1.png"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))  # as long as before, as after a power cut
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 32"):
            load(folder, cache=tmp_path / "cache")
    file.write_bytes(whole)
    assert len(load(folder, cache=tmp_path / "cache").test) == 8


def test_many_images_are_checked_in_parallel_with_the_same_result(tmp_path: Path) -> None:
    write_images(tmp_path, ("ant", "bee"), 300)
    bad = {"ant/17.png", "bee/250.png"}
    for name in bad:
        truncated = (tmp_path / name).read_bytes()[:60]
        (tmp_path / name).write_bytes(truncated)
    source = FolderOfImages(tmp_path)
    seen: list[int] = []
    before = set(threading.enumerate())
    alone = find_damaged(source, processes=1)
    assert find_damaged(source, processes=2, on_images=seen.append) == alone
    assert sum(seen) == 600
    assert {"/".join(Path(source.name(index)).parts[-2:]) for index in alone} == bad
    for one in set(threading.enumerate()) - before:
        one.join(timeout=30)  # torch closes a worker's queue without waiting for the thread that fed it
        assert not one.is_alive(), one.name


def test_sixteen_bit_and_floating_point_images_are_not_white_or_black(folder: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    place = folder / "val" / "ant"
    for file in place.iterdir():
        file.unlink()
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(place / "a.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(place / "b.tif")
    Image.fromarray(ramp.astype(np.float32)).save(place / "c.tif")
    (place / "d.pgm").write_bytes(b"P5 8 8 65535\n" + (ramp * 65535).astype(">u2").tobytes())
    Image.fromarray((ramp * 255).astype(np.uint8)).save(place / "e.png")
    source = FolderOfImages(folder / "val")
    pixels = [np.asarray(source.image(k)).astype(int) for k in range(5)]
    assert all(np.abs(one - pixels[4]).max() <= 1 for one in pixels)
    assert pixels[4].max() == 255 and pixels[4].min() == 0


def test_pixels_of_unknown_range_count_as_damaged(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(folder / "val" / "ant" / "a.tif")
    Image.fromarray(np.full((8, 8), 200, np.float32)).save(folder / "val" / "bee" / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: its pixels are 32-bit integers .*a\.tif: its pixels are floating"):
        load(folder)


def test_an_image_that_goes_between_listing_and_reading_is_named(folder: Path) -> None:
    data = load(folder)
    (folder / "val" / "bee" / "1.png").unlink()
    with pytest.raises(DataError, match=r"Image .*/val/bee/1\.png cannot be read: it does not exist\.$"):
        list(batches(data.test, 2))


def test_the_cache_is_plain_json(folder: Path, tmp_path: Path) -> None:
    truncate(folder / "train" / "ant" / "1.png")
    load(folder, cache=tmp_path / "cache", allowed=1)
    found = [json.loads(file.read_text()) for file in sorted((tmp_path / "cache").iterdir())]
    assert sorted(map(len, found)) == [1, 2]  # each with its own SHA-256
    assert all(file.stem.startswith("images-") for file in (tmp_path / "cache").iterdir())

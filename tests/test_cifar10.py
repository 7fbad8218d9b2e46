"""CIFAR-10's original files are read, other pickles never; arrays come in npz files."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from klas_zoo.data import cifar10
from klas_zoo.data.loading import load_data
from klas_zoo.data.sources import open_images
from klas_zoo.errors import DataError

NAMES = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


def a_batch(count: int = 20, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"batch_label": "one", "labels": [k % 10 for k in range(count)], "data": rows} | changes


class PicklerOfPython2(pickle._Pickler):
    """Writes text and bytes alike, as the byte strings of Python 2, in which the original files were made."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def put(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Path:
    """Six batches; with `monkeypatch` theirs are the published sums."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = []
    for index, name in enumerate(NAMES):
        stream = io.BytesIO()
        PicklerOfPython2(stream, protocol=2).dump(a_batch(seed=index))
        (folder / name).write_bytes(stream.getvalue())
        sums.append([name, hashlib.md5(stream.getvalue()).hexdigest()])
    if monkeypatch is not None:
        monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
        monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    return folder


def test_the_published_sums_are_torchvisions() -> None:
    assert len(NAMES) == 6 and dict(CIFAR10.train_list)["data_batch_1"] == "c99cafc152244af753f735de768cd75f"


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_original_files_are_found_in_their_folder_or_the_one_above(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / place, monkeypatch)
    data = load_data(tmp_path, sample=None, num_classes=10, data_config=CONFIG)
    assert data.description == "CIFAR-10, 90 + 10 held out, 20 test images"
    assert data.classes == cifar10.CLASSES
    with pytest.raises(DataError, match=r"^CIFAR-10 has 10 classes, the family has 1000: .*'airplane'"):
        load_data(tmp_path, sample=None, num_classes=1000, data_config=CONFIG)


def test_the_five_batches_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = cifar10.read(put(tmp_path, monkeypatch), train=True)
    assert (images.shape, images.dtype) == ((100, 32, 32, 3), np.uint8)
    assert labels == [label for index in range(5) for label in a_batch(seed=index)["labels"]]
    # a row is a red, a green and a blue plane
    row = a_batch(seed=1)["data"][3]
    assert np.array_equal(images[23, :, :, 1].ravel(), row[1024:2048])
    assert images[23, 2, 5].tolist() == [row[2 * 32 + 5], row[1024 + 2 * 32 + 5], row[2048 + 2 * 32 + 5]]


class Run:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_a_pickle_that_is_not_the_original_is_never_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    put(tmp_path / "cifar")
    (tmp_path / "cifar" / "data_batch_1").write_bytes(pickle.dumps(Run(Path.touch, marker)))
    sentence = "data_batch_1 is not the original file of CIFAR-10: its MD5 sum differs"
    with pytest.raises(DataError, match=sentence) as caught:
        open_images(tmp_path / "cifar", None)
    assert "train.npz and test.npz" in str(caught.value)
    assert not marker.exists()
    pickle.loads((tmp_path / "cifar" / "data_batch_1").read_bytes())
    assert marker.exists()  # the trap works: a careless reader steps on it


def test_a_changed_bit_in_any_batch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch)
    for name in NAMES:
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not the original"):
            cifar10.read(tmp_path, train=name != "test_batch")
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)


def test_a_missing_batch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (put(tmp_path, monkeypatch) / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"CIFAR-10 is not complete: .*data_batch_4 cannot be read \(No such file"):
        cifar10.read(tmp_path, train=True)


def write_arrays(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 10)):
        arrays = {
            "images": generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
            "labels": np.arange(count) % 4,
        }
        given = {key: value for key, value in (arrays | changes).items() if value is not None}
        np.savez(folder / f"{name}.npz", **given)
    return folder


def test_arrays_are_read_from_two_archives(tmp_path: Path) -> None:
    opened = open_images(write_arrays(tmp_path, classes=np.array(["a", "b", "c", "d"])), None)
    assert list(opened.train.labels) == [k % 4 for k in range(40)]
    assert opened.classes == ("a", "b", "c", "d")
    with np.load(tmp_path / "test.npz") as found:
        assert np.array_equal(np.asarray(opened.test.image(7)), found["images"][7])


def test_grey_arrays_get_three_channels(tmp_path: Path) -> None:
    grey = np.arange(40 * 64, dtype=np.uint8).reshape(40, 8, 8)
    opened = open_images(write_arrays(tmp_path, images=grey, labels=np.arange(40) % 4), None)
    assert np.array_equal(np.asarray(opened.train.image(3)), np.stack([grey[3]] * 3, -1))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": None}, r"train.npz has no array '?images"),
        ({"labels": None}, r"has no array '?labels"),
        ({"images": np.zeros((40, 8, 8, 3))}, r"images must be \(N, H, W, 3\) uint8, not \(40, 8, 8, 3\) float64"),
        ({"images": np.zeros((40, 3, 8, 8), np.uint8)}, r"must be \(N, H, W, 3\) uint8, not \(40, 3, 8, 8\)"),
        ({"labels": np.arange(39)}, "labels must be 40 integers from 0"),
        ({"labels": np.arange(40) - 1}, "labels must be 40 integers from 0"),
        ({"labels": np.full(40, 0.5)}, "labels must be 40 integers from 0, not .* float64"),
        ({"labels": np.array([None] * 40)}, "cannot be read as an archive of arrays: Object arrays cannot be loaded"),
        ({"classes": np.arange(4)}, "classes must be a list of texts"),
    ],
)
def test_arrays_of_another_kind_are_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        open_images(write_arrays(tmp_path, **changes), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"), [(8, 99), (6, 1), (6, 0x20)], ids=["compressed otherwise", "encrypted", "patched"]
)
def test_an_archive_that_no_zipfile_reads_is_one_sentence(tmp_path: Path, place: int, value: int) -> None:
    write_arrays(tmp_path)
    content = bytearray((tmp_path / "train.npz").read_bytes())
    for header, offset in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # of each file, and in the directory
        at = -1
        while (at := content.find(header, at + 1)) >= 0:
            content[at + place + offset] = value
    (tmp_path / "train.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npz cannot be read as an archive of arrays: ") as caught:
        open_images(tmp_path, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive" * 40])
def test_a_damaged_archive_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    write_arrays(tmp_path)
    (tmp_path / "train.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npz cannot be read as an archive of arrays"):
        open_images(tmp_path, None)


def test_every_byte_of_an_archive_may_be_wrong_without_a_traceback(tmp_path: Path) -> None:
    whole = (write_arrays(tmp_path) / "train.npz").read_bytes()
    for place in range(0, len(whole), 97):
        (tmp_path / "train.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            open_images(tmp_path, None)
        except DataError as error:
            assert "\n" not in str(error)


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path)
    with zipfile.ZipFile(tmp_path / "train.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("images.npy")
        with archive.open(info, "w", force_zip64=True) as stream:
            stream.write(bytes(100))
        archive.infolist()[0].file_size = 17 * 2**30  # the directory is written when the archive is closed
    with pytest.raises(DataError, match=r"train\.npz holds 17 GiB"):
        open_images(tmp_path, None)

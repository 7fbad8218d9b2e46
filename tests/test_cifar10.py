"""Reading CIFAR-10 as torchvision keeps it, without running what a pickle may hold."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klas_zoo.data import cifar10
from klas_zoo.errors import DataError

TRAIN = [f"data_batch_{index}" for index in range(1, 6)]


def a_batch(count: int = 4, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [int(label) for label in generator.integers(0, 10, count)]
    return {"batch_label": "one", "labels": labels, "data": rows} | changes


def put(folder: Path, **replaced: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for index, name in enumerate([*TRAIN, "test_batch"]):
        content = replaced.get(name, a_batch(seed=index))
        (folder / name).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=2))
    return folder


def test_the_five_batches_follow_each_other(tmp_path: Path) -> None:
    images, labels = cifar10.read(put(tmp_path), train=True)
    assert (images.shape, images.dtype) == ((20, 32, 32, 3), np.uint8)
    assert labels == [label for index in range(5) for label in a_batch(seed=index)["labels"]]
    test, test_labels = cifar10.read(tmp_path, train=False)
    assert len(test) == len(test_labels) == 4
    assert test_labels == a_batch(seed=5)["labels"]


def test_a_row_is_a_red_a_green_and_a_blue_plane(tmp_path: Path) -> None:
    rows = np.zeros((1, 3072), dtype=np.uint8)
    rows[0, 2 * 32 + 5] = 11  # red, row 2, column 5
    rows[0, 1024 + 31 * 32] = 22  # green, last row, first column
    rows[0, 2048 + 31] = 33  # blue, first row, last column
    images, _ = cifar10.read(put(tmp_path, test_batch={"data": rows, "labels": [3]}), train=False)
    assert images[0, 2, 5].tolist() == [11, 0, 0]
    assert images[0, 31, 0].tolist() == [0, 22, 0]
    assert images[0, 0, 31].tolist() == [0, 0, 33]
    assert images.sum() == 66


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_pickle_is_read(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(a_batch(), protocol=protocol)
    assert len(cifar10.read(put(tmp_path, test_batch=content), train=False)[0]) == 4


def test_arrays_pickled_by_numpy_before_2_are_read(tmp_path: Path) -> None:
    content = pickle.dumps(a_batch(), protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in content
    assert len(cifar10.read(put(tmp_path, test_batch=content), train=False)[0]) == 4


class PicklerOfPython2(pickle._Pickler):
    """Writes text and bytes alike, as the byte strings of Python 2."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value: str | bytes) -> None:
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def test_the_original_files_of_python_2_are_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    PicklerOfPython2(stream, protocol=2).dump(a_batch())
    images, labels = cifar10.read(put(tmp_path, test_batch=stream.getvalue()), train=False)
    assert labels == a_batch()["labels"]
    assert np.array_equal(images[3, :, :, 1].ravel(), a_batch()["data"][3, 1024:2048])


class Run:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def traps(marker: Path) -> dict[str, Any]:
    return {
        "method": Run(Path.touch, marker),
        "eval": Run(eval, f"__import__('pathlib').Path({str(marker)!r}).touch()"),
        "numpy": Run(np.savetxt, str(marker), [1.0]),
        "nested": a_batch(extra=[{"a": Run(Path.touch, marker)}]),
        "object array": a_batch(data=np.array([Run(Path.touch, marker)], dtype=object)),
    }


@pytest.mark.parametrize("kind", list(traps(Path())))
def test_code_in_a_batch_is_never_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    put(tmp_path / "cifar", data_batch_3=traps(marker)[kind])
    with pytest.raises(DataError, match=r"data_batch_3 is not a batch of CIFAR-10 \(it asks for "):
        cifar10.read(tmp_path / "cifar", train=True)
    assert not marker.exists()
    pickle.loads((tmp_path / "cifar" / "data_batch_3").read_bytes())
    assert marker.exists()  # the trap works: someone careless steps on it


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"no pickle", id="no pickle"),
        pytest.param(pickle.dumps(a_batch(), protocol=2)[:-300], id="truncated"),
        pytest.param([1, 2], id="a list"),
        pytest.param({"data": None, "labels": []}, id="no data"),
        pytest.param({"labels": [1]}, id="data missing"),
        pytest.param(a_batch(labels=[1, 2, 3]), id="a label short"),
        pytest.param(a_batch(labels=[1, 2, 3, 10]), id="an eleventh class"),
        pytest.param(a_batch(labels=[1, 2, 3, -1]), id="a label below zero"),
        pytest.param(a_batch(labels=[1, 2, 3, True]), id="a label that is no number"),
        pytest.param(a_batch(labels=np.zeros(4, int)), id="labels as an array"),
        pytest.param(a_batch(data=np.zeros((4, 3072))), id="floating point"),
        pytest.param(a_batch(data=np.zeros((4, 3000), np.uint8)), id="short rows"),
        pytest.param(a_batch(data=np.zeros((4, 3, 32, 32), np.uint8)), id="images already"),
        pytest.param({"fine_labels": [1] * 4, "data": np.zeros((4, 3072), np.uint8)}, id="CIFAR-100"),
    ],
)
def test_a_file_that_is_no_batch_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match="test_batch is not a batch of CIFAR-10"):
        cifar10.read(put(tmp_path, test_batch=content), train=False)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    (put(tmp_path) / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"CIFAR-10 is not complete: .*data_batch_4 does not exist\."):
        cifar10.read(tmp_path, train=True)

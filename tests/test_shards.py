"""Images in shards and in Parquet files: the same as in folders, each named when it is bad."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import write_images

from klas_zoo.data.loading import Data, batches, load_data
from klas_zoo.data.sources import FolderOfImages, open_images
from klas_zoo.errors import DataError
from klas_zoo.processes.team import Team

CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    write_images(place / "train", ("ant", "bee", "cat"), 12, seed=1)
    write_images(place / "val", ("ant", "bee", "cat"), 4, seed=2)
    return place


def png(source: FolderOfImages, index: int) -> bytes:
    return Path(source.name(index)).read_bytes()


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_shards(place: Path, source: FolderOfImages, start: str, *, label: str = "cls") -> None:
    """Seven images a shard."""
    for first in range(0, len(source.labels), 7):
        with tarfile.open(place / f"{start}-{first:04d}.tar", "w") as shard:
            for index in range(first, min(first + 7, len(source.labels))):
                number = source.labels[index]
                add(shard, f"part/{index:05d}.png", png(source, index))
                text = json.dumps({"label": number, "name": "x"}) if label == "json" else f"{number}\n"
                add(shard, f"part/{index:05d}.{label}", text.encode())


def write_parquet(place: Path, source: FolderOfImages, start: str) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets are an extra")
    datasets.disable_progress_bars()
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    )
    rows = [{"image": {"bytes": png(source, i), "path": None}, "label": n} for i, n in enumerate(source.labels)]
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(place / f"{start}-00000-of-00001.parquet")


@pytest.fixture(params=["cls", "json", "parquet"])
def packed(request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder's images as shards or as Parquet files."""
    for split, start in (("train", "train"), ("val", "val")):
        source = FolderOfImages(folder / split)
        if request.param == "parquet":
            pytest.importorskip("datasets", reason="needs datasets: pip install 'klas-zoo[datasets]'")
            monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)
            write_parquet(tmp_path, source, start)
        else:
            pytest.importorskip("webdataset", reason="WebDataset is an extra")
            write_shards(tmp_path, source, start, label=request.param)
    return tmp_path


def load(place: Path) -> Data:
    return load_data(place, sample=None, num_classes=3, data_config=CONFIG)


def test_they_hold_what_the_folder_holds(packed: Path, folder: Path) -> None:
    for found, wanted in zip(open_images(packed, None)[:2], open_images(folder, None)[:2], strict=True):
        assert list(found.labels) == list(wanted.labels)
        for index in range(0, len(wanted.labels), 5):
            assert np.array_equal(np.asarray(found.image(index)), np.asarray(wanted.image(index)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_team_sees_every_image_once_per_epoch(packed: Path, workers: int) -> None:
    data = load(packed)
    length = len(data.train)
    seen = []
    for rank in range(2):
        stream = batches(data.augmented, 6, shuffle_seed=0, forever=True, team=Team(rank, 2), workers=workers)
        seen += [next(stream) for _ in range(length // 6)]
        stream.close()
    labels = Counter(label for _, part in seen for label in part.tolist())
    whole = Counter(data.train.source.labels[index] for index in data.train.indices)
    # one epoch less what does not fill a batch
    assert sum(labels.values()) == length // 6 * 6
    assert all(0 <= whole[label] - count <= length % 6 for label, count in labels.items())


def test_they_are_told_apart_by_their_files(packed: Path, tmp_path: Path) -> None:
    before = load(packed)
    assert before.train_fingerprint != before.test_fingerprint
    assert load(packed).fingerprint == before.fingerprint
    name = next(packed.glob("val*"))
    with name.open("ab") as file:
        file.write(bytes(10_240))  # a tar file may end in zeros
    if name.suffix == ".tar":
        after = load(packed)
        assert after.test_fingerprint != before.test_fingerprint
        assert after.train_fingerprint == before.train_fingerprint
    else:
        with pytest.raises(DataError, match="datasets cannot load"):
            load(packed)


BAD = {
    "a shard that ends too early": (lambda tar: tar[:700], "train-0000.tar is no whole tar file"),
    "no tar file at all": (lambda tar: b"nothing" * 200, "train-0000.tar is no whole tar file"),
}


@pytest.mark.parametrize(("damage", "says"), BAD.values(), ids=BAD)
def test_a_damaged_shard_is_named(damage: object, says: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    for split in ("train", "val"):
        write_shards(tmp_path, FolderOfImages(folder / split), split)
    first = tmp_path / "train-0000.tar"
    first.write_bytes(damage(first.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.png": b"x"}, "Sample 1 of .*train.tar has .png: it needs an image"),
        ({"1.txt": b"x", "1.cls": b"1"}, "has .txt, .cls: it needs an image"),
        ({"1.png": b"x", "1.cls": b"cat"}, "The class of sample 1 in .*train.tar is not a number from 0 on"),
        ({"1.png": b"x", "1.cls": b"-1"}, "-1 is no class"),
        ({"1.png": b"x", "1.json": b"{}"}, "is not a number from 0 on"),
        ({"1.png": b"x", "1.json": b'{"label": "cat"}'}, "'cat' is no class"),
    ],
)
def test_a_sample_without_image_or_class_is_named(members: dict[str, bytes], says: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for member, content in members.items():
                add(shard, member, content)
    with pytest.raises(DataError, match=says):
        load(tmp_path)


def test_a_bad_image_in_a_shard_is_named(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    for split in ("train", "val"):
        write_shards(tmp_path, FolderOfImages(folder / split), split)
    with tarfile.open(tmp_path / "val-9999.tar", "w") as shard:
        add(shard, "bad.png", b"no picture")
        add(shard, "bad.cls", b"1")
    with pytest.raises(DataError, match=r"Image bad.png in .*val-9999.tar cannot be read"):
        list(batches(load(tmp_path).test, 4))


def test_a_missing_library_names_the_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ((".tar", "webdataset.tariterators", "webdataset"), (".parquet", "datasets", "datasets"))
    for suffix, module, extra in libraries:
        place = tmp_path / extra
        place.mkdir()
        for name in ("train", "val"):
            if suffix == ".tar":
                tarfile.open(place / f"{name}.tar", "w").close()
            else:
                (place / f"{name}.parquet").touch()
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(DataError, match=rf"pip install 'klas-zoo\[{extra}\]'"):
            load(place)


def test_images_decoded_from_shards_are_rgb(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    grey = io.BytesIO()
    Image.new("L", (8, 8), 7).save(grey, "PNG")
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as shard:
            for index in range(16):
                add(shard, f"{index}.png", grey.getvalue())
                add(shard, f"{index}.cls", str(index % 2).encode())
    images, _ = next(batches(load(tmp_path).test, 4))
    assert images.shape == (4, 3, 8, 8)

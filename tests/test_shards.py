"""Images in shards and in Parquet files: the same as in folders, each named when it is bad."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import write_images

from klas_zoo.data.damage import DamageCheck
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


def write_parquet(place: Path, source: FolderOfImages, start: str, *, count: int | None = None) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets are an extra")
    datasets.disable_progress_bars()
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    )
    rows = [{"image": {"bytes": png(source, i), "path": None}, "label": n} for i, n in enumerate(source.labels)]
    kept = range(len(rows) if count is None else count)
    datasets.Dataset.from_list(rows, features=kinds).select(kept).to_parquet(place / f"{start}-00000-of-00001.parquet")


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_test_split_without_images_is_refused_and_so_is_a_training_split(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source = FolderOfImages(folder / "train")
    of_shards = {"val": "there are no test images", "train": "there are no training images"}
    for empty in ("val", "train"):
        place = tmp_path / empty
        place.mkdir()
        for start in ("train", "val"):
            if kind == "parquet":
                write_parquet(place, source, start, count=0 if start == empty else None)
            elif start == empty:
                tarfile.open(place / f"{start}.tar", "w").close()
            else:
                write_shards(place, source, start)
        says = of_shards[empty] if kind == "shards" else "corresponds to no data"
        with pytest.raises(DataError, match=says):
            load_data(place, sample=None, num_classes=3, data_config=CONFIG)


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


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("train/000.tar", "val/000.tar"),
        ("Train_1.tar", "valid_1.tar"),
        ("data/train-0.tar", "data/test-0.tar"),
    ],
)
def test_published_names_of_shards_are_known(train: str, val: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    write_shards(tmp_path, FolderOfImages(folder / "train"), "x")
    first = tmp_path / "x-0000.tar"
    for name in (train, val):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(first.read_bytes())
    for path in tmp_path.glob("x-*.tar"):
        path.unlink()
    opened = open_images(tmp_path, None)
    assert len(opened.train.labels) == len(opened.test.labels) == 7


def one_shard(place: Path, members: list[tuple[str, bytes]]) -> None:
    for name in ("train", "val"):
        with tarfile.open(place / f"{name}.tar", "w") as shard:
            for member, content in members:
                add(shard, member, content)


PNG = io.BytesIO()
Image.new("RGB", (8, 8), (9, 8, 7)).save(PNG, "PNG")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("1.png", b"x"), ("1.cls", b"1"), ("1.png", b"y")], r"train\.tar has the sample 1 twice, as \.png"),
        ([("a.b.png", b"x"), ("a.b.cls", b"1")], r"A key ends at the first dot of its name\."),
        ([(f"1.t{n}", b"x") for n in range(40)], r"Sample 1 of .* has \.t0, \.t1, \.t2, .*\.t5, …: it"),
        ([("1.png", b"x"), ("1.json", b"{}")], "its .json has no 'label'"),
        ([("1.png", b"x"), ("1.json", b"[" * 10_000)], "is not a number from 0 on"),
        ([("1.png", b"x"), ("1.json", b"[]")], "its .json has no 'label'"),
    ],
)
def test_odd_samples_are_one_sentence(members: list[tuple[str, bytes]], says: str, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    one_shard(tmp_path, members)
    with pytest.raises(DataError, match=says) as caught:
        open_images(tmp_path, None)
    assert len(str(caught.value)) < 400


def test_labels_that_begin_at_one_are_named(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    files = [(f"{k}.png", PNG.getvalue()) for k in range(12)] + [(f"{k}.cls", b"%d" % (k % 3 + 1)) for k in range(12)]
    one_shard(tmp_path, files)
    with pytest.raises(DataError, match=r"numbered up to 3, the family's 3 end at 2: its numbers begin at 1\."):
        load(tmp_path)


def test_a_compressed_shard_is_named(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    one_shard(tmp_path, [("1.png", b"x"), ("1.cls", b"1")])
    (tmp_path / "val.tar").write_bytes(gzip.compress((tmp_path / "val.tar").read_bytes()))
    with pytest.raises(DataError, match=r"val\.tar is compressed by gzip, .*: unpack it first\."):
        open_images(tmp_path, None)


def test_damaged_images_in_shards_are_skipped(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="WebDataset is an extra")
    for split in ("train", "val"):
        write_shards(tmp_path, FolderOfImages(folder / split), split)
    with tarfile.open(tmp_path / "val-9999.tar", "w") as shard:
        add(shard, "bad.png", b"no picture")
        add(shard, "bad.cls", b"1")
    refusal = r"^1 of 49 images cannot be read \(bad.png in .*val-9999.tar: it is not an image"
    with pytest.raises(DataError, match=refusal):
        load_data(tmp_path, sample=None, num_classes=3, data_config=CONFIG, damage=DamageCheck())
    data = load_data(tmp_path, sample=None, num_classes=3, data_config=CONFIG, damage=DamageCheck(allowed=1))
    assert sum(len(labels) for _, labels in batches(data.test, 4)) == 12


def parquet(place: Path, rows: list[dict[str, object]], **kinds: object) -> Path:
    """The rows as both splits; column `image` of bytes."""
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'klas-zoo[datasets]'")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), **kinds})
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(place / f"{split}-00000-of-00001.parquet")
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'klas-zoo[datasets]'")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache", raising=False)


def rows_of(values: Sequence[object], name: str = "label", content: bytes | None = None) -> list[dict[str, object]]:
    return [{"image": {"bytes": content or PNG.getvalue(), "path": None}, name: value} for value in values]


@pytest.mark.usefixtures("cache")
def test_names_of_classes_in_parquet_are_numbered_naturally(tmp_path: Path) -> None:
    import datasets

    parquet(tmp_path, rows_of(["c10", "c9", "c10", "c1"] * 8), label=datasets.Value("string"))
    opened = open_images(tmp_path, None, 3)
    assert list(opened.train.labels)[:4] == [2, 1, 2, 0]
    assert opened.classes == ("c1", "c9", "c10") and "natural order" in opened.notes[0]
    assert list(open_images(tmp_path, None, 3, ("c9", "c10", "c1")).train.labels)[:4] == [1, 0, 1, 2]


@pytest.mark.usefixtures("cache")
def test_digits_and_whole_numbers_in_parquet_are_numbers(tmp_path: Path) -> None:
    import datasets

    for number, (kind, values) in enumerate((("string", ["0", "2", "1"]), ("float64", [0.0, 2.0, 1.0]))):
        place = tmp_path / str(number)
        place.mkdir()
        parquet(place, rows_of(values), label=datasets.Value(kind))
        assert list(open_images(place, None, 3).train.labels) == [0, 2, 1]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("int64", [0, None, 1], r"Row 1 of .* has no class \('label' is null\)\."),
        ("string", ["a", None], r"Row 1 of .* has no class"),
        ("float64", [0.0, 1.5], r"Row 1 of .* has no class: 'label' is 1\.5, not a number or a name\."),
        ("float64", [0.0, float("nan")], r"Row 1 of .* has no class"),
        ("int64", [0, -1], r"has images without a class \(-1 in 'label'\)\."),
    ],
)
def test_rows_without_a_class_are_named(kind: str, values: list[object], says: str, tmp_path: Path) -> None:
    import datasets

    parquet(tmp_path, rows_of(values), label=datasets.Value(kind))
    with pytest.raises(DataError, match=says):
        open_images(tmp_path, None, 3)


@pytest.mark.usefixtures("cache")
def test_rows_without_an_image_or_with_damaged_metadata(tmp_path: Path) -> None:
    import datasets

    odd = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, were it applied
    Image.new("RGB", (12, 6)).save(odd, "JPEG", xmp=b"\xff\xfe\xfd not text", exif=exif)
    rows = rows_of([0, 1, 2] * 8)
    rows[4]["image"] = None
    rows[5]["image"] = {"bytes": odd.getvalue(), "path": None}
    parquet(tmp_path, rows, label=datasets.Value("int64"))
    with pytest.raises(DataError, match=r"^2 of 48 images cannot be read \(number 4 of .*: its row has no image"):
        load_data(tmp_path, sample=None, num_classes=3, data_config=CONFIG, damage=DamageCheck())
    data = load_data(tmp_path, sample=None, num_classes=3, data_config=CONFIG, damage=DamageCheck(allowed=2))
    assert len(data.test) == 23
    assert data.test.source.image(4).size == (12, 6)  # not turned, as in folders


@pytest.mark.usefixtures("cache")
def test_of_several_columns_the_one_with_the_familys_classes_is_taken(tmp_path: Path) -> None:
    import datasets

    kinds = {name: datasets.ClassLabel(num_classes=count) for name, count in (("coarse_label", 2), ("fine_label", 3))}
    rows = [one | {"coarse_label": k % 2} for k, one in enumerate(rows_of([0, 1, 2] * 4, "fine_label"))]
    parquet(tmp_path, rows, **kinds)
    assert set(open_images(tmp_path, None, 3).train.labels) == {0, 1, 2}
    assert set(open_images(tmp_path, None, 2).train.labels) == {0, 1}
    with pytest.raises(DataError, match=r"needs one column with a class; it has image \(Image\), "):
        open_images(tmp_path, None, 7)


def test_a_data_set_of_the_hub_is_refused_within_seconds_when_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'klas-zoo[datasets]'")
    from huggingface_hub import constants

    # a port of this machine that nothing listens to
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match=r"hf:nobody/nothing is not in the cache of datasets, and the Hugging Face hub"):
        open_images("hf:nobody/nothing", None)
    assert not constants.HF_HUB_OFFLINE

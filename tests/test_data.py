"""Images: their sources, splits and batches."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from toys import write_images

from klas_zoo.data.loading import Data, Split, batches, hold_out, load_data, training_transform
from klas_zoo.data.sources import ImageArray
from klas_zoo.errors import DataError
from klas_zoo.families.specs import builtin_families

CONFIG: dict[str, Any] = {
    "input_size": (3, 8, 8),
    "interpolation": "bicubic",
    "mean": (0.5, 0.25, 0.5),
    "std": (0.5, 0.25, 0.125),
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def load(folder: Path | None, **changes: Any) -> Data:
    """For a family with as many classes as the folder, else ten."""
    classes = [*(folder / "train").iterdir()] if folder and (folder / "train").is_dir() else []
    settings = {"sample": None, "num_classes": len(classes) or 10, "data_config": CONFIG}
    return load_data(folder, **settings | changes)


def names(split: Split) -> set[str]:
    return {split.source.name(index) for index in split.indices}


def labels_of(split: Split) -> Counter[int]:
    return Counter(split.source.labels[index] for index in split.indices)


@pytest.mark.parametrize("held", ["val", "test"])
def test_an_image_folder_is_split_in_three_that_never_meet(tmp_path: Path, held: str) -> None:
    write_images(tmp_path / "train", ("ant", "bee", "cat"), 16)
    write_images(tmp_path / held, ("ant", "bee", "cat"), 3)
    data = load(tmp_path)
    assert labels_of(data.train) == {0: 14, 1: 14, 2: 14}
    assert labels_of(data.heldout) == {0: 2, 1: 2, 2: 2}
    assert labels_of(data.test) == {0: 3, 1: 3, 2: 3}
    assert not names(data.train) & names(data.heldout)
    assert len(names(data.train) | names(data.heldout)) == 48
    assert all(f"/{held}/" in name for name in names(data.test))
    assert data.augmented.indices == data.train.indices
    assert data.description == f"images in {tmp_path.name}, 42 + 6 held out, 9 test images"


@pytest.mark.parametrize(
    ("count", "found"), [(0, []), (1, [0]), (4, [0, 2, 4, 6]), (5, [0, 1, 3, 4, 6]), (99, [*range(8)])]
)
def test_some_images_of_a_split_are_spread_over_all_of_it(tmp_path: Path, count: int, found: list[int]) -> None:
    write_images(tmp_path / "train", ("ant", "bee"), 16)
    write_images(tmp_path / "val", ("ant", "bee"), 4)
    test = load(tmp_path).test
    assert [*test.spread(count).indices] == found
    assert test.spread(count).transform is test.transform


def test_val_comes_before_test(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, ("ant", "bee"), 5)
    assert all("/val/" in name for name in names(load(tmp_path).test))


def test_labels_are_the_folders_in_order(image_folder: Path) -> None:
    data = load(image_folder)
    for index, label in enumerate(data.test.source.labels):
        assert Path(data.test.source.name(index)).parent.name == ("ant", "bee", "cat")[label]


def test_an_image_becomes_the_pixels_its_anchors_were_trained_on(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    split = load(None, sample=write_sample(tmp_path, np.stack([pixels] * 16), [0, 1] * 8)).test
    image, label = split[3]
    expected = (pixels / 255 - np.array(CONFIG["mean"])) / np.array(CONFIG["std"])
    assert label == 1
    assert np.allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def write_sample(folder: Path, images: np.ndarray, labels: list[int], **changes: Any) -> Path:
    """All images in a sheet of four columns; the same for training and testing."""
    count, size = images.shape[:2]
    rows = images.reshape(count // 4, 4, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 4 * size, 3)
    for name in ("train", "test"):
        Image.fromarray(rows).save(folder / f"{name}.webp", lossless=True)
    content = {"size": size, "train": labels, "test": labels} | changes
    (folder / "labels.json").write_text(json.dumps(content))
    return folder


def test_a_sheet_is_read_row_by_row(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    data = load(None, sample=write_sample(tmp_path, images, [0, 1] * 8))
    assert all(np.array_equal(np.asarray(data.test.source.image(k)), images[k]) for k in range(16))


def test_the_built_in_sample_holds_every_class_alike() -> None:
    micro = builtin_families()["deit-micro"]
    data = load(None, sample=micro.sample, data_config=CONFIG | {"input_size": micro.input_shape})
    assert labels_of(data.train) == dict.fromkeys(range(10), 350)
    assert labels_of(data.heldout) == dict.fromkeys(range(10), 50)
    assert labels_of(data.test) == dict.fromkeys(range(10), 100)
    assert data.description == "CIFAR-10 sample, 3500 + 500 held out, 1000 test images"
    image, label = data.test[0]
    assert image.shape == (3, 32, 32) and 0 <= label < 10
    pixels = data.train.source.images
    assert pixels.shape == (4000, 32, 32, 3)
    # a sheet cut at the wrong places would have edges inside images as sharp as those between them
    inside = np.abs(np.diff(pixels.astype(int), axis=2)).mean()
    between = np.abs(pixels[:-1, :, -1].astype(int) - pixels[1:, :, 0]).mean()
    assert inside < between / 3


def nothing(folder: Path) -> None:
    (folder / "train").mkdir()


def other_classes(folder: Path) -> None:
    write_images(folder / "train", ("ant", "bee"), 5)
    write_images(folder / "val", ("ant", "cow"), 5)


def no_classes(folder: Path) -> None:
    (folder / "train").mkdir()
    write_images(folder / "val", ("ant", "bee"), 5)


def empty_class(folder: Path) -> None:
    write_images(folder / "train", ("ant", "bee"), 5)
    write_images(folder / "val", ("ant", "bee"), 5)
    (folder / "train" / "cow").mkdir()


def one_class(folder: Path) -> None:
    for part in ("train", "val"):
        write_images(folder / part, ("ant",), 9)


def too_few_images(folder: Path) -> None:
    for part in ("train", "val"):
        write_images(folder / part, ("ant", "bee"), 3)


@pytest.mark.parametrize(
    ("fill", "sentence"),
    [
        (nothing, r"holds neither train/ and val/, validation/, .* with a folder for each class, nor cifar-10"),
        (other_classes, r"train has a class 'bee' that .*/val does not have: both need the same classes\."),
        (no_classes, r"train has no usable classes\. It needs a folder for each class\."),
        (empty_class, r"train has no usable classes in 1 of its folders, which hold no image \(.*\): cow\."),
        (one_class, r"training images of one class only"),
        (too_few_images, r"6 training images are too few: at least 4 of a class are needed\."),
    ],
)
def test_a_folder_that_cannot_be_used_is_answered_in_one_sentence(tmp_path: Path, fill: Any, sentence: str) -> None:
    fill(tmp_path)
    with pytest.raises(DataError, match=sentence) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "num_classes", "sentence"),
    [
        (("ant", "bee", "cat"), 2, r"^images in .* has 3 classes, the family has 2: ant, bee, cat\. Remove"),
        (("ant", "bee"), 3, r"^images in .* has 2 classes, the family has 3: which .* Pass --classes FILE with"),
        (("n01440764", "n99999999"), 1000, r" has 2 classes, the family has 1000: .* 'n99999999' is none of"),
        (("ant", "bee"), 1000, r"only if they are named by synset, such as n01440764; 'ant' is none of"),
    ],
)
def test_classes_that_are_not_the_familys_are_refused_with_their_numbers(
    names: tuple[str, ...], num_classes: int, sentence: str, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, names, 5)
    with pytest.raises(DataError, match=sentence):
        load(tmp_path, num_classes=num_classes)


def test_some_of_imagenets_synsets_keep_the_numbers_they_have_among_the_thousand(tmp_path: Path) -> None:
    # tench, goldfish, Granny Smith and toilet tissue: the first two, one in between and the last
    for part in ("train", "val"):
        write_images(tmp_path / part, ("n01440764", "n01443537", "n07742313", "n15075141"), 5)
    data = load(tmp_path, num_classes=1000)
    assert set(labels_of(data.test)) == set(labels_of(data.train)) == {0, 1, 948, 999}
    ends = {0: "764", 1: "537", 948: "313", 999: "141"}
    for index, label in enumerate(data.test.source.labels):
        assert Path(data.test.source.name(index)).parent.name.endswith(ends[label])


def test_no_folder_and_no_sample_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="This family brings no images of its own: pass --data DIR"):
        load(None)
    with pytest.raises(DataError, match=r"nowhere is not a folder\."):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("augmentation", ["light", "strong"])
def test_anchors_of_one_channel_get_grey_images(augmentation: str, image_folder: Path) -> None:
    grey = CONFIG | {"input_size": (1, 8, 8), "mean": (0.4,), "std": (0.2,)}
    data = load(image_folder, data_config=grey, augmentation=augmentation)
    image, _ = data.test[0]
    grey_image = data.test.source.image(data.test.indices[0]).convert("L")
    assert torch.equal(image, create_transform(**grey, is_training=False)(grey_image))
    augmented = next(iter(batches(data.augmented, 4, shuffle_seed=1)))[0]
    assert augmented.shape == (4, 1, 8, 8) and bool(torch.isfinite(augmented).all())


def test_anchors_of_other_channels_are_refused(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"Images are read as RGB, 3 channels, or .* as grey; the anchors take 4"):
        load(image_folder, data_config=CONFIG | {"input_size": (4, 8, 8)})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "labels.json").unlink(),
        lambda folder: (folder / "labels.json").write_text("{"),
        lambda folder: (folder / "labels.json").write_text('{"size": 8}'),
        lambda folder: (folder / "labels.json").write_text('{"size": "8", "train": [], "test": []}'),
        lambda folder: (folder / "test.webp").unlink(),
        lambda folder: (folder / "train.webp").write_bytes(b"RIFF"),
    ],
    ids=["no labels", "no json", "a key missing", "a size in words", "a sheet missing", "a sheet damaged"],
)
def test_a_familys_sample_that_cannot_be_read_is_one_sentence(tmp_path: Path, spoil: Any) -> None:
    sample = write_sample(tmp_path, np.zeros((8, 8, 8, 3), np.uint8), [0, 1] * 4)
    spoil(sample)
    with pytest.raises(DataError, match=r"The family's sample images in .* cannot be read: ") as caught:
        load(None, sample=sample)
    assert "\n" not in str(caught.value)


def test_a_sample_with_more_labels_than_images_is_refused(tmp_path: Path) -> None:
    sample = write_sample(tmp_path, np.zeros((8, 8, 8, 3), np.uint8), [0, 1] * 4, test=[0, 1] * 5)
    with pytest.raises(DataError, match=r"is not a sample: 10 test labels for 8 images\."):
        load(None, sample=sample)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["no image", "truncated", "gone"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    write_images(tmp_path / "train", ("ant", "bee"), 5, size=(40, 40))
    write_images(tmp_path / "val", ("ant", "bee"), 2, size=(40, 40))
    data = load(tmp_path)
    file = tmp_path / "val" / "bee" / "1.png"
    content = file.read_bytes()
    file.unlink()
    if kind != "gone":
        file.write_bytes(content[:-500] if kind == "truncated" else b"no image")
    with pytest.raises(DataError, match=r"^Image .*/val/bee/1\.png cannot be read: .*\.$") as caught:
        list(batches(data.test, 2, workers=workers))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    for part in ("train", "val"):
        write_images(tmp_path / part, ("ant", "bee"), 5)
    with Image.open(tmp_path / "val" / "ant" / "0.png") as image:
        converted = image.convert(mode)
    (tmp_path / "val" / "ant" / "0.png").unlink()
    converted.save(tmp_path / "val" / "ant" / ("0.tif" if mode == "CMYK" else "0.png"))
    test = load(tmp_path).test
    assert all(test[position][0].shape == (3, 8, 8) for position in range(len(test)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 5))
def test_an_eighth_of_every_class_is_held_out(counts: list[int], seed: int) -> None:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    wanted = {label: (count + 4) // 8 for label, count in enumerate(counts)}  # rounded, half up
    if not any(wanted.values()):
        with pytest.raises(DataError, match="at least 4 of a class are needed"):
            hold_out(labels, seed)
        return
    kept, heldout = hold_out(labels, seed)
    assert sorted(kept + heldout) == list(range(len(labels)))
    assert Counter(labels[index] for index in heldout) == Counter({k: n for k, n in wanted.items() if n})
    assert (kept, heldout) == hold_out(labels, seed)


def test_of_many_images_ten_thousand_are_held_out() -> None:
    _, heldout = hold_out([0, 1] * 100_000, seed=0)
    assert len(heldout) == 10_000


def test_what_is_held_out_depends_on_the_seed(image_folder: Path) -> None:
    one, same, other = (load(image_folder, seed=seed).heldout.indices for seed in (0, 0, 1))
    assert one == same != other


def test_a_fingerprint_notices_other_images(image_folder: Path, tmp_path: Path) -> None:
    before = load(image_folder)
    assert load(image_folder, seed=3).fingerprint == before.fingerprint
    for part, seed, count in (("train", 1, 16), ("val", 2, 5)):
        write_images(tmp_path / part, ("ant", "bee", "cat"), count, seed=seed)
    after = load(tmp_path)
    assert after.test_fingerprint != before.test_fingerprint
    (tmp_path / "val").rename(tmp_path / "old")
    write_images(tmp_path / "val", ("ant", "bee", "cat"), 4, seed=2)
    after = load(tmp_path)
    assert after.test_fingerprint == before.test_fingerprint
    assert after.fingerprint == before.fingerprint
    with (tmp_path / "val" / "bee" / "0.png").open("ab") as file:
        file.write(b"one byte more")
    assert load(tmp_path).test_fingerprint != before.test_fingerprint
    shutil.copy(image_folder / "val" / "bee" / "0.png", tmp_path / "val" / "bee")
    write_images(tmp_path / "train" / "ant", ("more",), 1)
    after = load(tmp_path)
    assert (after.test_fingerprint == before.test_fingerprint, after.fingerprint == before.fingerprint) == (True, False)


def numbered(count: int) -> Split:
    """Image k is filled with k."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 2, 2, 3))
    source = ImageArray(pixels, [k % 3 for k in range(count)])
    return Split(source, range(count), lambda image: torch.tensor(image.getpixel((0, 0))))


def order(stream: Any) -> list[list[int]]:
    return [images[:, 0].tolist() for images, _ in stream]


def test_batches_come_in_order_and_the_last_is_short() -> None:
    assert order(batches(numbered(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    images, labels = next(batches(numbered(7), 3))
    assert labels.tolist() == [0, 1, 2]
    assert images.shape == (3, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_shuffled_batches_are_whole_and_follow_the_seed(workers: int) -> None:
    one, same, other = (order(batches(numbered(11), 3, shuffle_seed=s, workers=workers)) for s in (4, 4, 5))
    assert one == same != other
    assert [len(batch) for batch in one] == [3, 3, 3]
    assert len({k for batch in one for k in batch}) == 9


def test_a_split_smaller_than_a_batch_is_one_batch() -> None:
    assert len(order(batches(numbered(5), 64, shuffle_seed=0))[0]) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_endless_batches_go_round_in_another_order_each_time(workers: int) -> None:
    stream = batches(numbered(8), 4, shuffle_seed=1, workers=workers, forever=True)
    rounds = [[next(stream)[0][:, 0].tolist() for _ in range(2)] for _ in range(3)]
    stream.close()
    assert all(sorted(one + two) == list(range(8)) for one, two in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_batches_leave_torchs_own_generator_alone() -> None:
    state = torch.get_rng_state()
    list(batches(numbered(8), 3))
    list(batches(numbered(8), 3, shuffle_seed=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("augmentation", ["light", "strong"])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (32, 32), (64, 64), (80, 72)])
@pytest.mark.parametrize("image", [(32, 32), (5, 9), (100, 61)])
def test_training_images_have_the_size_of_the_anchors_whatever_they_had(
    augmentation: str, size: tuple[int, int], image: tuple[int, int]
) -> None:
    transform = training_transform(CONFIG | {"input_size": (3, *size)}, augmentation)
    assert transform(Image.new("RGB", image)).shape == (3, *size)


def test_strong_augmentation_takes_every_magnitude_that_it_may_draw() -> None:
    transform = training_transform(CONFIG | {"input_size": (3, 16, 16)}, "strong")
    (randaugment,) = (step for step in transform.transforms if hasattr(step, "ops"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for operation in randaugment.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 1000.0, 0  # as if all draws were too large
        assert np.asarray(operation(image)).shape == (16, 16, 3), operation.name


def test_small_training_images_are_moved_and_flipped_but_not_scaled() -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[10:20, 12:17] = 255
    transform = training_transform(CONFIG | {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3}, "light")
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        image = transform(Image.fromarray(pixels))
        rows, columns = image[0].nonzero().unbind(1)
        assert image.unique().tolist() == [0.0, 1.0]
        assert (len(rows), int(rows.max() - rows.min()), int(columns.max() - columns.min())) == (50, 9, 4)
        seen.add((int(rows.min()), int(columns.min())))
    assert {row for row, _ in seen} == set(range(6, 15))
    assert min(column for _, column in seen) < 12 < max(column for _, column in seen)
    assert all(8 <= column <= 19 for _, column in seen)


def test_a_training_image_larger_than_the_anchors_is_framed_before_it_is_moved() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[28:36, 28:36] = 255
    transform = training_transform(CONFIG | {"input_size": (3, 16, 16)}, "light")
    torch.manual_seed(0)
    assert all(transform(Image.fromarray(pixels)).max() > 0.9 for _ in range(20))


def test_strong_augmentation_changes_colours_and_erases() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    config = CONFIG | {"input_size": (3, 32, 32)}
    light, strong = (str(training_transform(config, name)) for name in ("light", "strong"))
    assert "RandAugment" in strong and "RandomErasing" in strong
    assert "RandAugment" not in light and "RandomErasing" not in light and "ColorJitter" not in light
    assert training_transform(config, "strong")(image).shape == (3, 32, 32)

"""Images: where they come from, how they are split, and how they become batches.

Three splits, never mixed: `train` is what probes, stitching layers and tuning learn from,
`heldout` is cut out of the training images and is what similarities are measured on, and
`test` is what reports accuracy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from klas_zoo import cifar10
from klas_zoo.errors import DataError

Batch = tuple[Tensor, Tensor]
_HELDOUT_SHARE = 8  # one training image in eight, at most so many:
_HELDOUT_MOST = 10_000


class LabelledImages(Protocol):
    """What a source has: PIL images, their labels, and a name for each to complain with."""

    labels: Sequence[int]

    def image(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...


class Split(Dataset[tuple[Tensor, int]]):
    """Some images of a source, with a transform from PIL image to tensor (C, H, W)."""

    def __init__(self, source: LabelledImages, indices: Sequence[int], transform: Any) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        try:
            image = self.source.image(index).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow reports damaged files with any of these
            raise DataError(f"Image {self.source.name(index)} cannot be read: {error}.") from error
        return self.transform(image), int(self.source.labels[index])


@dataclass(frozen=True, kw_only=True)
class Data:
    """The three splits of one data set. `augmented` is `train` with training transforms.

    `description` says what it is in a few words; the fingerprints identify all images and the
    test images alone: accuracies compare only where the latter is the same.
    """

    train: Split
    augmented: Split
    heldout: Split
    test: Split
    description: str
    fingerprint: str
    test_fingerprint: str


def load_data(
    folder: Path | None,
    *,
    sample: Path | None,
    num_classes: int,
    data_config: dict[str, Any],
    augmentation: str = "light",
    seed: int = 0,
) -> Data:
    """Opens an image folder, CIFAR-10 as torchvision stores it, or a family's embedded sample.

    Args:
        folder: train/ and val/ (or test/) with one folder a class; or the folder that holds
            `cifar-10-batches-py`. None: the family's sample.
        sample: the family's embedded images, if it has any.
        data_config: timm's, with input_size, mean, std, interpolation and crop_pct.
        augmentation: `light` (crop and flip) or `strong` (RandAugment and erasing, as DeiT).

    Raises:
        DataError: nothing there that can be used, or the classes do not fit the family.
    """
    channels = data_config["input_size"][0]
    if channels != 3:
        raise DataError(f"Images are read as RGB, 3 channels; the anchors take {channels}.")
    train, test, description = _open(folder, sample)
    if len(set(train.labels)) < 2:
        raise DataError(f"{description}: training images of one class only; there is nothing to tell apart.")
    most = max(max(train.labels), max(test.labels)) + 1
    if most > num_classes:
        raise DataError(f"{description} has {most} classes, the family tells {num_classes} apart.")
    kept, heldout = hold_out(train.labels, seed)
    plain = create_transform(**data_config, is_training=False)
    return Data(
        train=Split(train, kept, plain),
        augmented=Split(train, kept, training_transform(data_config, augmentation)),
        heldout=Split(train, heldout, plain),
        test=Split(test, range(len(test.labels)), plain),
        description=f"{description}, {len(kept)} + {len(heldout)} held out, {len(test.labels)} test images",
        fingerprint=_fingerprint(train, test),
        test_fingerprint=_fingerprint(test),
    )


def hold_out(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and indices to hold out, the same share of every class.

    Raises:
        DataError: too few images of every class to hold any out.
    """
    share = min(1 / _HELDOUT_SHARE, _HELDOUT_MOST / len(labels))
    generator = np.random.default_rng(seed)
    array, heldout = np.asarray(labels), []
    for label in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == label))
        # half rounds up; Python's round() would send it to the even neighbour
        heldout.extend(members[: math.floor(len(members) * share + 0.5)].tolist())
    if not heldout:
        needed = math.ceil(0.5 / share)
        raise DataError(f"{len(labels)} training images are too few: at least {needed} of a class are needed.")
    kept = np.setdiff1d(np.arange(len(array)), heldout).tolist()
    return kept, sorted(heldout)


def batches(
    split: Split,
    size: int,
    *,
    device: torch.device | str = "cpu",
    shuffle_seed: int | None = None,
    workers: int = 0,
    forever: bool = False,
) -> Iterator[Batch]:
    """Images (B, C, H, W) and labels (B,). Shuffled batches are all of one size; others end short.

    Raises:
        DataError: an image cannot be read; the message names it.
    """
    generator = torch.Generator()
    if shuffle_seed is not None:
        generator.manual_seed(shuffle_seed)
    loader = DataLoader(
        split,
        batch_size=min(size, len(split)),
        shuffle=shuffle_seed is not None,
        drop_last=shuffle_seed is not None,
        generator=generator,
        num_workers=workers,
        persistent_workers=workers > 0 and forever,
    )
    while True:
        try:
            for images, labels in loader:
                yield images.to(device), labels.to(device)
        except DataError as error:
            # a worker process sends its whole traceback; the last line is the sentence
            sentence = str(error).strip().splitlines()[-1].removeprefix("klas_zoo.errors.DataError: ")
            # its frames would keep the workers alive, waiting for work
            raise DataError(sentence) from error.with_traceback(None)
        if not forever:
            return


def training_transform(data_config: dict[str, Any], augmentation: str) -> Any:
    """timm's training transforms. Up to 64 pixels a padded crop replaces the resized one, as in DeiT."""
    height, width = data_config["input_size"][1:]
    chosen: dict[str, Any] = {**data_config, "is_training": True, "color_jitter": None}
    if augmentation == "strong":
        chosen |= {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25}
    made = create_transform(**chosen)
    if max(height, width) > 64:
        return made
    # images of another size are framed as for evaluation; then come conversion and normalisation
    frame = create_transform(**data_config, is_training=False).transforms[:-2]
    crop = RandomCrop((height, width), padding=(width // 8, height // 8), padding_mode="reflect")
    steps = [step for step in made.transforms if not isinstance(step, RandomHorizontalFlip)]
    return Compose([*frame, crop, RandomHorizontalFlip(), *steps[1:]])


def _open(folder: Path | None, sample: Path | None) -> tuple[LabelledImages, LabelledImages, str]:
    if folder is None:
        if sample is None:
            raise DataError("This family brings no images of its own: say --data DIR.")
        return (*_open_sample(sample), "CIFAR-10 sample")
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder.")
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").is_file():
            parts = [ImageArray(*cifar10.read(place, train=train)) for train in (True, False)]
            return parts[0], parts[1], "CIFAR-10"
    for held in ("val", "test"):
        if (folder / "train").is_dir() and (folder / held).is_dir():
            train, test = FolderOfImages(folder / "train"), FolderOfImages(folder / held)
            if train.classes != test.classes:
                odd = sorted(set(train.classes) ^ set(test.classes))[0]
                raise DataError(f"{folder}: train and {held} have other classes; one has '{odd}', one has not.")
            return train, test, f"images in {folder.resolve().name}"
    raise DataError(
        f"{folder} holds neither train/ and val/ (or test/) with a folder a class, nor cifar-10-batches-py."
    )


class FolderOfImages:
    """One folder a class, as in ImageNet."""

    def __init__(self, folder: Path) -> None:
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no usable classes: {str(error).splitlines()[0]}") from error
        self.classes = found.classes
        self.labels = found.targets
        self._paths = [Path(path) for path, _ in found.samples]

    def image(self, index: int) -> Image.Image:
        with Image.open(self._paths[index]) as opened:
            return opened.convert("RGB")

    def name(self, index: int) -> str:
        return str(self._paths[index])


class ImageArray:
    """Images in memory: (N, H, W, 3) uint8."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"number {index}"


def _open_sample(folder: Path) -> tuple[ImageArray, ImageArray]:
    """Sheets of square images, a row of the sheet after the other, as make_sample.py writes them."""
    try:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        train = ImageArray(_cut(folder / "train.webp", labels["size"]), labels["train"])
        test = ImageArray(_cut(folder / "test.webp", labels["size"]), labels["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The family's sample images in {folder} cannot be read: {error}.") from error
    for name, part in (("train", train), ("test", test)):
        if len(part.images) < len(part.labels):
            raise DataError(
                f"{folder} is no sample: {len(part.labels)} {name} labels for {len(part.images)} images."
            )
    return train, test


def _cut(sheet: Path, size: int) -> np.ndarray:
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, size, size, 3)


def _fingerprint(*sources: LabelledImages) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(np.asarray(source.labels, dtype=np.int64).tobytes())
        if isinstance(source, ImageArray):
            digest.update(source.images.tobytes())
        else:
            for index in range(len(source.labels)):
                path = Path(source.name(index))
                digest.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}".encode())
    return digest.hexdigest()

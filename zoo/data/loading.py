"""Images: how they are split, transformed and made into batches. `klas_zoo.data.sources` opens them.

Three splits, never mixed: `train` is what probes, stitching layers and tuning learn from,
`heldout` is cut out of the training images and is what similarities are measured on, and
`test` is what reports accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from klas_zoo.data.order import Draw, Order, in_order, shuffled
from klas_zoo.data.sources import LabelledImages, fingerprint, open_images
from klas_zoo.errors import DataError, UsageError
from klas_zoo.processes.randomness import keeping_randomness, seed_everything
from klas_zoo.processes.team import ALONE, Team

Batch = tuple[Tensor, Tensor]
_HELDOUT_SHARE = 8  # one training image in eight, at most so many:
_HELDOUT_MOST = 10_000


class Split(Dataset[tuple[Tensor, int]]):
    """Some images of a source, with a transform from PIL image to tensor (C, H, W).

    A `random` transform gives one and the same tensor for a `Draw`, in whichever process and order.
    """

    def __init__(
        self, source: LabelledImages, indices: Sequence[int], transform: Any, *, random: bool = False
    ) -> None:
        self.source, self.indices, self.transform, self.random = source, indices, transform, random

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Tensor, int]]:
        if not self.random:
            return [self[draw.position] for draw in draws]
        found = []
        with keeping_randomness():
            for position, seed in draws:
                seed_everything(seed)
                found.append(self[position])
        return found

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

    `description` says what it is in a few words; the fingerprints identify all images, the training
    and held-out images, and the test images: accuracies compare only where the last is the same.
    """

    train: Split
    augmented: Split
    heldout: Split
    test: Split
    description: str
    fingerprint: str
    train_fingerprint: str
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
    train, test, description = open_images(folder, sample, num_classes)
    if len(set(train.labels)) < 2:
        raise DataError(f"{description}: training images of one class only; there is nothing to tell apart.")
    most = max(max(train.labels), max(test.labels)) + 1
    if most > num_classes:
        raise DataError(f"{description} has {most} classes, the family tells {num_classes} apart.")
    kept, heldout = hold_out(train.labels, seed)
    plain = create_transform(**data_config, is_training=False)
    return Data(
        train=Split(train, kept, plain),
        augmented=Split(train, kept, training_transform(data_config, augmentation), random=True),
        heldout=Split(train, heldout, plain),
        test=Split(test, range(len(test.labels)), plain),
        description=f"{description}, {len(kept)} + {len(heldout)} held out, {len(test.labels)} test images",
        fingerprint=fingerprint(train, test),
        train_fingerprint=fingerprint(train),
        test_fingerprint=fingerprint(test),
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
    start: int = 0,
    team: Team = ALONE,
) -> Iterator[Batch]:
    """Images (B, C, H, W) and labels (B,).

    Shuffled batches are all of one size; those of one epoch leave out what does not fill a batch,
    those of forever go on into the next epoch, so that every epoch has every image exactly once.
    Batches in order end short.

    Args:
        size: of a batch of the whole team. Each process gets an equal share of every shuffled batch,
            or whole batches by turns where they are in order.
        start: how many batches to skip.

    Raises:
        DataError: an image cannot be read; the message names it.
        UsageError: a shuffled batch cannot be shared out evenly.
    """
    if not forever:
        size = min(size, len(split))
    if shuffle_seed is None:
        order = in_order(len(split), size, team)
    else:
        if size % team.size:
            raise UsageError(f"A batch of {size} images cannot be shared by {team.size} processes evenly.")
        order = shuffled(len(split), size, shuffle_seed, forever, start, team)
    loader = DataLoader(
        split,
        batch_sampler=Order(order),
        # a generator of its own: loaders draw a seed for their workers when they start
        generator=torch.Generator().manual_seed(0),
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
    )
    try:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except DataError as error:
        # a worker process sends its whole traceback; the last line is the sentence
        sentence = str(error).strip().splitlines()[-1].removeprefix("klas_zoo.errors.DataError: ")
        # its frames would keep the workers alive, waiting for work
        raise DataError(sentence) from error.with_traceback(None)


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

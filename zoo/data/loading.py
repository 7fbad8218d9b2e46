"""Images: how they are split, transformed and made into batches. `klas_zoo.data.sources` opens them.

Three splits, never mixed: `train` is what probes, stitching layers and tuning learn from,
`heldout` is cut out of the training images and is what similarities are measured on, and
`test` is what reports accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from klas_zoo.data.damage import DamageCheck
from klas_zoo.data.order import Draw, Order, in_order, shuffled
from klas_zoo.data.sources import LabelledImages, fingerprint, open_images
from klas_zoo.errors import DataError
from klas_zoo.pixels import UnreadableImage, check_channels, with_channels
from klas_zoo.processes.randomness import keeping_cpu_randomness, seed_cpu
from klas_zoo.processes.team import ALONE, Team

Batch = tuple[Tensor, Tensor]
_HELDOUT_SHARE = 8  # one training image in eight, at most so many:
_HELDOUT_MOST = 10_000
_LARGEST_MAGNITUDE = 9.99  # of RandAugment


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

    def spread(self, count: int) -> Split:
        """At most `count` of its images, evenly spread: folders list them class by class."""
        count = min(count, len(self))
        chosen = [self.indices[number * len(self) // count] for number in range(count)]
        return Split(self.source, chosen, self.transform, random=self.random)

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[Tensor, int]]:
        if not self.random:
            return [self[draw.position] for draw in draws]
        found = []
        with keeping_cpu_randomness():
            for position, seed in draws:
                seed_cpu(seed)
                found.append(self[position])
        return found

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.indices[position]
        try:
            image = self.source.image(index)
        except UnreadableImage as error:
            raise DataError(f"Image {self.source.name(index)} cannot be read: {error}.") from error
        return self.transform(image), int(self.source.labels[index])


@dataclass(frozen=True, kw_only=True)
class Data:
    """The three splits of one data set. `augmented` is `train` with training transforms.

    `description` says what it is in a few words; the fingerprints identify all images, the training
    and held-out images, and the test images: accuracies compare only where the last is the same.
    `classes` are names by number, empty where they are unknown; `notes` sentences for the user, about the order of
    classes and what was skipped; `alternatives` another order of the classes by its name: the number there of each
    number here.
    """

    train: Split
    augmented: Split
    heldout: Split
    test: Split
    description: str
    fingerprint: str
    train_fingerprint: str
    test_fingerprint: str
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: Mapping[str, Sequence[int]] = field(default_factory=dict)


def load_data(
    folder: str | Path | None,
    *,
    sample: Path | None,
    num_classes: int,
    data_config: dict[str, Any],
    augmentation: str = "light",
    seed: int = 0,
    classes: Sequence[str] | None = None,
    damage: DamageCheck | None = None,
) -> Data:
    """Opens an image folder, any other form that docs/data.md describes, or a family's embedded sample.

    Args:
        folder: train/ and val/ with one folder for each class, CIFAR-10's original files, arrays, shards, Parquet
            files, or `hf:owner/name`. None: the family's sample.
        sample: the family's embedded images, if it has any.
        data_config: timm's, with input_size, mean, std, interpolation and crop_pct.
        augmentation: `light` (crop and flip) or `strong` (RandAugment and erasing, as DeiT).
        classes: the family's, in its order, as `klas_zoo.data.classes.read_classes` gives them.
        damage: how images are checked first; None: not at all.

    Raises:
        DataError: nothing there that can be used, or the classes do not fit the family.
    """
    channels = data_config["input_size"][0]
    check_channels(channels, f"the anchors take {channels}")
    opened = open_images(folder, sample, num_classes, classes)
    train, test, description = opened[:3]
    notes = list(opened.notes)
    if damage is not None:
        before = len(train.labels) + len(test.labels)
        train, test = damage.without_damaged((train, test))
        if skipped := before - len(train.labels) - len(test.labels):
            notes.append(f"{skipped:,} damaged images of {before:,} are skipped.")
    _check_labels(train.labels, test.labels, num_classes, description)
    kept, heldout = hold_out(train.labels, seed)
    converted = partial(with_channels, channels=channels)
    plain = Compose([converted, create_transform(**data_config, is_training=False)])
    return Data(
        train=Split(train, kept, plain),
        augmented=Split(
            train, kept, Compose([converted, training_transform(data_config, augmentation)]), random=True
        ),
        heldout=Split(train, heldout, plain),
        test=Split(test, range(len(test.labels)), plain),
        description=f"{description}, {len(kept)} + {len(heldout)} held out, {len(test.labels)} test images",
        fingerprint=fingerprint(train, test),
        train_fingerprint=fingerprint(train),
        test_fingerprint=fingerprint(test),
        classes=opened.classes if len(opened.classes) == num_classes else tuple(classes or ()),
        notes=tuple(notes),
        alternatives=opened.alternatives,
    )


def _check_labels(train: Sequence[int], test: Sequence[int], num_classes: int, description: str) -> None:
    for name, labels in (("training", train), ("test", test)):
        if not len(labels):
            raise DataError(f"{description}: there are no {name} images.")
    if len(set(train)) < 2:
        raise DataError(f"{description}: training images of one class only; a classifier needs two or more.")
    least, most = min(min(train), min(test)), max(max(train), max(test))
    if most >= num_classes:
        counts = f"{description} has classes numbered up to {most}, the family's {num_classes} end at {num_classes - 1}"
        if (least, most) == (1, num_classes):
            raise DataError(f"{counts}: its numbers begin at 1. Write them from 0.")
        raise DataError(f"{counts}.")


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
    for step in made.transforms:
        for operation in getattr(step, "ops", ()):
            # timm posterizes to no bits at 10, the end of its scale, where one in 44 draws about 9 lands
            operation.magnitude_max = _LARGEST_MAGNITUDE
    if max(height, width) > 64:
        return made
    # images of another size are framed as for evaluation; then come conversion and normalisation
    frame = create_transform(**data_config, is_training=False).transforms[:-2]
    crop = RandomCrop((height, width), padding=(width // 8, height // 8), padding_mode="reflect")
    steps = [step for step in made.transforms if not isinstance(step, RandomHorizontalFlip)]
    return Compose([*frame, crop, RandomHorizontalFlip(), *steps[1:]])

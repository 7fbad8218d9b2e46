"""Networks, images and batches small enough to compute by hand, for the tests of the core modules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch, Data, Split

IMAGE = (3, 8, 8)
CLASSES = 5


class Patches(nn.Module):
    """Images (B, 3, 8, 8) → tokens (B, 4, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).flatten(2).transpose(1, 2)


class MeanHead(nn.Module):
    """Tokens or maps → logits of their mean."""

    def __init__(self, width: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.mean(1) if features.ndim == 3 else features.mean((2, 3)))


class Calls(nn.Module):
    """Passes features on, and counts how often, and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.training_seen: set[bool] = set()

    def forward(self, features: Tensor) -> Tensor:
        self.count += 1
        self.training_seen.add(self.training)
        return features


def token_chain(widths: Sequence[int] = (6, 6, 6, 6), *, seed: int = 0, classes: int = CLASSES) -> Chain:
    """Four tokens an image; `widths` after the stem and after every block. In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [nn.Sequential(nn.Linear(a, b), nn.Tanh(), Calls()) for a, b in pairwise(widths)]
        return Chain(Patches(widths[0]), blocks, MeanHead(widths[-1], classes), input_shape=IMAGE).eval()


def map_chain(widths: Sequence[int] = (4, 4, 8, 8), *, seed: int = 0, halved_by: int = 2, norm: bool = False) -> Chain:
    """Maps of 8×8, from block `halved_by` on of 4×4. In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = []
        for block, (before, after) in enumerate(pairwise(widths), start=1):
            layers = [nn.Conv2d(before, after, 3, 2 if block == halved_by else 1, 1)]
            layers += [nn.BatchNorm2d(after)] if norm else []
            blocks.append(nn.Sequential(*layers, nn.Tanh(), Calls()))
        stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        return Chain(stem, blocks, MeanHead(widths[-1]), input_shape=IMAGE).eval()


def three_chains(*, classes: int = CLASSES) -> dict[str, Chain]:
    """Anchors of 3, 4 and 5 blocks, each wider than the one before."""
    return {
        "tiny": token_chain((4,) * 4, seed=1, classes=classes),
        "small": token_chain((6,) * 5, seed=2, classes=classes),
        "base": token_chain((9,) * 6, seed=3, classes=classes),
    }


def calls(chain: Chain) -> list[int]:
    """How often each block was executed."""
    return [block[-1].count for block in chain.blocks]


def forget_calls(chain: Chain) -> None:
    for block in chain.blocks:
        block[-1].count = 0


def random_batches(sizes: Sequence[int] = (4, 4, 3), *, seed: int = 0, classes: int = CLASSES) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *IMAGE, generator=generator), torch.randint(classes, (size,), generator=generator))
        for size in sizes
    ]


class InMemory:
    """Images that are tensors already, as a source of labelled images."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.images = torch.cat([images for images, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches]).tolist()

    def image(self, index: int) -> Tensor:
        return self.images[index]


def data_of(train: Sequence[Batch], heldout: Sequence[Batch]) -> Data:
    """A data set of images in memory, not augmented; what is held out tests as well."""
    splits = [
        Split(source, range(len(source.labels)), lambda image: image)  # type: ignore[arg-type]
        for source in (InMemory(train), InMemory(heldout))
    ]
    return Data(
        train=splits[0], augmented=splits[0], heldout=splits[1], test=splits[1], description="in memory",
        fingerprint="", train_fingerprint="", test_fingerprint="",
    )  # fmt: skip


def rebatched(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The same images in batches of another size."""
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    return list(zip(images.split(size), labels.split(size), strict=True))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def write_images(
    folder: Path, classes: Sequence[str], count: int, *, size: tuple[int, int] = (12, 10), seed: int = 0
) -> Path:
    """`count` PNG files a class, in one folder a class; each class has a colour of its own."""
    generator = np.random.default_rng(seed)
    for index, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., index % 3] += np.uint8(60 + 20 * (index % 6))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


class Grid(nn.Module):
    """Maps of a given size, whatever comes in: the stem or the first block of a stage."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width, self.size = width, size

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean((1, 2, 3), keepdim=True)
        return mean.expand(len(features), self.width, self.size, self.size)


def staged_chain(depths: Sequence[int], *, sizes: Sequence[int] = (8, 4, 2, 1), convolutional: bool = False) -> Chain:
    """A network of stages of these depths, each on a grid of its own; its blocks compute nothing."""
    blocks: list[nn.Module] = []
    for depth, size in zip(depths, sizes, strict=False):
        for _ in range(depth):
            convolution = [nn.Conv2d(2, 2, 3, 1, 1)] if convolutional else []
            blocks.append(nn.Sequential(Grid(2, size), *convolution))
    return Chain(Grid(2, sizes[0]), blocks, MeanHead(2), input_shape=IMAGE).eval()

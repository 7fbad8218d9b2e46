"""What the scripts that train on CIFAR-10 share: images on one device, augmentation, Muon, a schedule by progress.

Everything works on CPUs and on CUDA devices. All images stay on the device as uint8, and are augmented there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from make_sample import choose
from torch import Tensor, nn

from klas_zoo.data import cifar10

SHIFT = 4  # pixels
SAMPLE = 4_000  # training images that make_sample.py takes, with its default seed
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Images (N, H, W, 3) uint8 and labels (N,) on one device."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def of(cls, pixels: np.ndarray, labels: Iterable[int], device: str) -> Images:
        return cls(torch.from_numpy(np.ascontiguousarray(pixels)).to(device), torch.tensor(list(labels), device=device))

    def __len__(self) -> int:
        return len(self.labels)

    def padded(self) -> Images:
        """The same with a reflected border of SHIFT pixels, for `augmented`."""
        edge = np.pad(np.arange(self.pixels.shape[1]), SHIFT, mode="reflect")
        index = torch.from_numpy(edge).to(self.pixels.device)
        return Images(self.pixels[:, index][:, :, index].contiguous(), self.labels)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (B, 3, H, W) and labels, in order."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield normalise(pixels), labels


def load(root: Path, device: str) -> tuple[Images, Images]:
    """The 46,000 training images outside the sample, and the sample's 4,000, which no training sees.

    Args:
        root: holds train.npz and test.npz (prepare_cifar10.py makes them), or `cifar-10-batches-py`.
    """
    pixels, labels = read(root, train=True)
    held = np.zeros(len(labels), dtype=bool)
    held[choose(labels, SAMPLE, seed=0)] = True
    array = np.asarray(labels)
    return Images.of(pixels[~held], array[~held], device), Images.of(pixels[held], array[held], device)


def load_test(root: Path, device: str) -> Images:
    """The 10,000 test images."""
    return Images.of(*read(root, train=False), device)


def read(root: Path, *, train: bool) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 and labels of the training or the test split."""
    if (place := cifar10.find(root)) is not None:
        return cifar10.read(place, train=train)
    with np.load(root / ("train.npz" if train else "test.npz")) as arrays:
        return arrays["images"], arrays["labels"].tolist()


def normalise(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W), channels last in memory."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def augmented(padded: Images, chosen: Tensor, generator: torch.Generator, cutout: int = 0) -> tuple[Tensor, Tensor]:
    """Random shifts, flips and one square cut out of each: images (B, 3, H, W) and labels (B,)."""
    device, count = chosen.device, len(chosen)
    size = padded.pixels.shape[1] - 2 * SHIFT
    shift = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator, device=device)
    flip = torch.rand(count, 1, generator=generator, device=device) < 0.5
    across = torch.arange(size, device=device).expand(count, size)
    rows, columns = across + shift[0], torch.where(flip, across.flip(1), across) + shift[1]
    images = normalise(padded.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]])
    if cutout:
        centre = torch.randint(0, size, (2, count, 1), generator=generator, device=device)
        inside = [(across - c).abs() <= cutout // 2 for c in centre]
        images = images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
    return images, padded.labels[chosen]


def mixed(images: Tensor, targets: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018, arXiv:1710.09412) of a share of the images with their neighbours in the batch.

    Args:
        targets: (B, classes), mixed likewise; an image keeps at least half of itself.
    """
    device, count = images.device, len(images)
    draws = torch.rand(2, count, 1, generator=generator, device=device)
    keep = torch.where(draws[0] < share, 0.5 + draws[1] / 2, 1.0)
    blended = images.lerp(images.roll(1, 0), 1 - keep[:, :, None, None])
    return blended, targets.lerp(targets.roll(1, 0), 1 - keep)


def rate_at(progress: float, warmup: float = 0.05) -> float:
    """Share of the peak learning rate after a share of the work: linear from zero, then a cosine to zero."""
    if progress < warmup:
        return max(progress, 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024, "Muon"); matrices of one shape together.

    A convolution's weights (O, I, k, k) count as one matrix (O, I·k·k).

    Steps are as large as those of AdamW (Liu et al. 2025, arXiv:2502.16982: 0.2 · √(larger side)). torch's own
    treats matrices one by one, which is many times slower for small networks on GPUs.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in shapes.items():
                self._step(matrices, max(shape[0], shape[1:].numel()), group)

    def _step(self, matrices: list[nn.Parameter], larger: int, group: dict) -> None:
        gradients = [m.grad for m in matrices]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, averages, group["momentum"]))
        updates = orthogonal(ahead.flatten(2)).view_as(ahead)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * 0.2 * math.sqrt(larger))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, rows, columns) → nearly orthogonal ones: Muon's quintic Newton-Schulz iteration in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimisers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices and full convolutions of the blocks, AdamW for everything else.

    Biases, norms and positions do not decay.
    """
    matrices, weights, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim >= 2 and parameter.shape[1] > 1:  # 1: depthwise
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "pos_embed" not in name:
            weights.append(parameter)
        else:
            rest.append(parameter)
    adam = torch.optim.AdamW(
        [{"params": weights, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    return [Muon(matrices, lr, weight_decay), adam] if matrices else [adam]


class Teacher(nn.Module):
    """A residual network of nine layers for 32×32 images (after Page 2018, "How to Train Your ResNet")."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(3, width),
            _convolution(width, 2 * width), nn.MaxPool2d(2), _Residual(2 * width),
            _convolution(2 * width, 4 * width), nn.MaxPool2d(2),
            _convolution(4 * width, 8 * width), nn.MaxPool2d(2), _Residual(8 * width),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, classes, bias=False),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return 0.125 * self.layers(images)

    @classmethod
    def of_state(cls, state: dict[str, Tensor]) -> Teacher:
        """One as wide as the weights are."""
        found = cls(width=len(state["layers.0.0.weight"]))
        found.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        return found


class Teachers(nn.Module):
    """Several teachers: images → the mean of their log-probabilities (B, classes)."""

    def __init__(self, *teachers: nn.Module) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)

    def forward(self, images: Tensor) -> Tensor:
        found = [teacher(images).float().log_softmax(1) for teacher in self.teachers]
        return torch.stack(found).mean(0)


def let_muon_update(optimiser: torch.optim.Optimizer, chains: nn.Module, rate: float, weight_decay: float) -> None:
    """Muon updates the matrices of anchors' blocks before every step of a tuner's optimiser, which keeps the rest.

    Its rate follows that of the optimiser's first group.
    """
    matrices = [p for name, p in chains.named_parameters() if ".blocks." in name and p.ndim == 2]
    taken = set(matrices)
    for group in optimiser.param_groups:
        group["params"] = [p for p in group["params"] if p not in taken]
    muon, first = Muon(matrices, rate, weight_decay), optimiser.param_groups[0]

    def before(*_: object) -> None:
        muon.param_groups[0]["lr"] = rate * first["lr"] / first["initial_lr"]
        muon.step()

    optimiser.register_step_pre_hook(before)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps)


def _convolution(source: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(source, target, 3, 1, 1, bias=False), nn.BatchNorm2d(target), nn.ReLU())

"""One temperature per probe (Guo et al. 2017, arXiv 1706.04599): softmax(z / t) of least cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.selection.probes import Probes, walk_pooled

# t from 1/16 to 16 in steps of 9 %; a parabola through the best three finds the rest
_GRID = torch.logspace(-4, 4, 65, base=2, dtype=torch.float64)


class TemperedProbes(nn.Module):
    """Probes whose logits are divided by a temperature each, (n,)."""

    temperatures: Tensor

    def __init__(self, probes: Probes, temperatures: Tensor) -> None:
        super().__init__()
        self.probes = probes
        self.register_buffer("temperatures", temperatures)

    def forward(self, pooled: list[Tensor]) -> Tensor:
        """Pooled features of block 1..n, each (B, D_k) → logits (n, B, classes)."""
        return self.probes(pooled) / self.temperatures[:, None, None]


@torch.no_grad()
def calibrate(
    chains: dict[str, Chain],
    probes: dict[str, Probes],
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, TemperedProbes]:
    """Fits the temperatures in one pass, on images the probes did not learn from.

    The anchors' own outputs stay as they are, so that the choice of pairs does too.

    Raises:
        SelectionError: there are no images.
    """
    losses = {name: torch.zeros(len(_GRID), chain.depth, dtype=torch.float64) for name, chain in chains.items()}
    count = 0
    for images, labels in batches:
        for name, chain in chains.items():
            logits = probes[name](walk_pooled(chain, images)[0]).double()
            rows, blocks = logits.flatten(0, 1), len(logits)
            for step, temperature in enumerate(_GRID.tolist()):
                each = F.cross_entropy(rows / temperature, labels.repeat(blocks), reduction="none")
                losses[name][step] += each.view(blocks, -1).sum(1).cpu()
        count += len(labels)
        on_batch(len(labels))
    if count == 0:
        raise SelectionError("There are no held-out images to calibrate probes on.")
    device = next(next(iter(chains.values())).parameters()).device
    return {
        name: TemperedProbes(probes[name], _lowest(found / count).float().to(device)) for name, found in losses.items()
    }


def every_other(batches: Iterable[Batch], start: int) -> Iterator[Batch]:
    """Half of the images: those at even (start 0) or odd (start 1) places of the stream.

    Splits are sorted by class; the first half would lack half of the classes.
    """
    place = start
    for images, labels in batches:
        if len(labels[place::2]):
            yield images[place::2], labels[place::2]
        place = (place + len(labels)) % 2


def _lowest(losses: Tensor) -> Tensor:
    """(steps, n) → the temperature of least loss, (n,)."""
    best = losses.argmin(0).clamp(1, len(_GRID) - 2)
    before, least, after = (losses.gather(0, (best + k)[None])[0] for k in (-1, 0, 1))
    bend = (before - 2 * least + after).clamp_min(1e-12)
    shift = (0.5 * (before - after) / bend).clamp(-1, 1)
    step = _GRID[1].log() - _GRID[0].log()
    return (_GRID[best].log() + shift * step).exp()

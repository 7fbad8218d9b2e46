"""ProbeNet: one linear probe on every block of every frozen anchor (KLAS §3.1).

The anchor's forward pass runs once per batch, without gradient, and all of its probes learn from that one pass;
or once per image, where features are stored (pooled_features.py). A probe is pooled features → standardisation
without parameters → Linear(width, classes) → softmax; standardisation with running statistics stays a linear map,
and lets probes of very different scales share one learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.selection.pooled_features import walk_pooled


class Probes(nn.Module):
    """The probes of one anchor, one per block, and its own final output as position n + 1.

    Blocks of equal width are computed together, as one batched matrix product.
    """

    def __init__(self, chain: Chain, team: Team = ALONE) -> None:
        super().__init__()
        self.depth = chain.depth
        widths = [chain.width(block) for block in range(1, chain.depth + 1)]
        self.groups = {width: [k for k, w in enumerate(widths) if w == width] for width in sorted(set(widths))}
        self.norms = nn.ModuleDict({str(w): _Standardise(len(b), w, team) for w, b in self.groups.items()})
        self.weights = nn.ParameterDict(
            {str(w): torch.zeros(len(b), w, chain.classes) for w, b in self.groups.items()}
        )
        self.biases = nn.ParameterDict(
            {str(w): torch.zeros(len(b), 1, chain.classes) for w, b in self.groups.items()}
        )

    def forward(self, pooled: list[Tensor]) -> Tensor:
        """Pooled features of block 1..n, each (B, D_k) → logits (n, B, classes)."""
        logits: list[Tensor | None] = [None] * self.depth
        for width, blocks in self.groups.items():
            key = str(width)
            features = self.norms[key](torch.stack([pooled[k] for k in blocks]))
            answers = torch.baddbmm(self.biases[key], features, self.weights[key])
            for k, answer in zip(blocks, answers, strict=True):
                logits[k] = answer
        return torch.stack(logits)  # type: ignore[arg-type]


class _Standardise(nn.Module):
    """Features of n blocks (n, B, D), each channel to mean 0 and variance 1.

    The anchors are frozen, so their statistics do not drift: all batches count alike. A moving
    average would still hold its starting values after a short training.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, blocks: int, width: int, team: Team) -> None:
        super().__init__()
        self.team = team
        self.batches = 0
        self.register_buffer("mean", torch.zeros(blocks, 1, width))
        self.register_buffer("variance", torch.ones(blocks, 1, width))

    def forward(self, features: Tensor) -> Tensor:
        if self.training:
            variance, mean = self._statistics(features)
            self.batches += 1
            self.mean.lerp_(mean, 1 / self.batches)
            self.variance.lerp_(variance, 1 / self.batches)
        else:
            variance, mean = self.variance, self.mean
        return (features - mean) * (variance + 1e-6).rsqrt()

    def _statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and mean over the batch; over all processes' shares of it, which are equally large."""
        variance, mean = torch.var_mean(features, 1, keepdim=True, correction=0)
        if self.team.size == 1:
            return variance, mean
        whole = self.team.all_reduce(mean.clone()) / self.team.size
        # the mean of the shares' variances, and the variance of the shares' means
        return self.team.all_reduce(variance + (mean - whole) ** 2) / self.team.size, whole


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How probes learn. The paper saw convergence by epoch 4."""

    epochs: int = 4
    batch: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 1e-3


def train_probes(
    chains: dict[str, Chain],
    epochs: Iterable[Iterator[Batch]],
    settings: ProbeSettings,
    *,
    pooled_at: Callable[[str, Tensor], list[Tensor]] | None = None,
    team: Team = ALONE,
    on_batch: Callable[[int], None] = lambda images: None,
) -> dict[str, Probes]:
    """Trains the probes of all anchors over the same batches.

    Args:
        epochs: `settings.epochs` iterators over the training split.
        pooled_at: an anchor's pooled features of a batch, each (B, D_k). By default batches are of images, and
            the anchor computes them.
        team: every process comes with an equal share of each batch; all end with the same probes, those
            of one process up to rounding.
        on_batch: called with the number of images after each batch.

    Raises:
        SelectionError: an anchor's features or a probe's loss are not finite; names the block.
    """
    if pooled_at is None:
        pooled_at = partial(_run_and_pool, chains)
    probes = {name: Probes(chain, team).to(_device(chain)).train() for name, chain in chains.items()}
    learned = [p for probe in probes.values() for p in probe.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    for epoch, batches in enumerate(epochs):
        # a linear decay to a tenth: the last epochs settle instead of circling
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1 - 0.9 * epoch / max(1, settings.epochs - 1))
        for batch, labels in batches:
            total = torch.zeros(())
            for name in chains:
                losses = _losses(probes[name](pooled_at(name, batch)), labels)
                _check_finite(losses, name)
                total = total + losses.sum()
            total.backward()
            team.average([weight.grad for weight in learned if weight.grad is not None])
            optimiser.step()
            optimiser.zero_grad()
            on_batch(len(labels))
    return {name: probe.eval() for name, probe in probes.items()}


def _run_and_pool(chains: Mapping[str, Chain], anchor: str, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        pooled, _ = walk_pooled(chains[anchor], images)
    return [features.clone() for features in pooled]  # what inference mode made cannot be learned from


def log_probabilities(chain: Chain, probes: nn.Module, images: Tensor) -> Tensor:
    """log P after every block, and of the anchor itself at the end: (n + 1, B, classes)."""
    pooled, logits = walk_pooled(chain, images)
    return F.log_softmax(torch.cat([probes(pooled), logits[None]]).float(), -1)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each probe: (n, B, classes), (B,) → (n,)."""
    blocks, count, classes = logits.shape
    flat = F.cross_entropy(logits.reshape(-1, classes), labels.repeat(blocks), reduction="none")
    return flat.view(blocks, count).mean(1)


def _check_finite(losses: Tensor, anchor: str) -> None:
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad):
        raise SelectionError(
            f"The probe after block {int(bad[0]) + 1} of {anchor} has no finite loss: its activations "
            "overflow or the checkpoint is damaged."
        )


def _device(chain: Chain) -> torch.device:
    return next(chain.parameters()).device

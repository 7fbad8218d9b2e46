"""Joint tuning: each step draws one route at random, so cost does not grow with their number.

The loss is a mix of cross-entropy and distillation from the largest anchor as it was before
tuning. Anchors and stitching layers have learning rates of their own. Settings follow
SN-Net (CVPR 2023, §4) in the preset `paper`; `quick` is for minutes on a CPU.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from klas_zoo.data import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.profiles.devices import has_fast_bf16
from klas_zoo.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How the supernet is tuned.

    Attributes:
        steps: optimiser steps; None: `epochs` over the training images. 0 keeps the closed form.
        batch: images per step.
        anchor_rate, stitch_rate: peak learning rates of anchors and of stitching layers.
        warmup: share of the steps in which the rates rise from zero, 0..1; a cosine follows.
        distillation: weight of the teacher's part of the loss, 0..1.
        hard: learn the teacher's most likely class instead of its whole distribution.
        clip: largest norm of the gradient; None does not clip.
        augmentation: `light` or `strong`, see klas_zoo.data.
        precision: of products while tuning; weights stay fp32. `auto`: bf16 where that is fast.
    """

    steps: int | None
    epochs: int
    batch: int
    anchor_rate: float
    stitch_rate: float
    weight_decay: float
    warmup: float
    distillation: float
    hard: bool
    clip: float | None
    augmentation: Literal["light", "strong"]
    init_images: int
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def on(self, device: str) -> TuningSettings:
        """The same with `auto` replaced by what it means on a torch device."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if has_fast_bf16(device) else "fp32")

    def total_steps(self, images: int) -> int:
        """Optimiser steps for so many training images."""
        return self.steps if self.steps is not None else self.epochs * max(1, images // self.batch)


PRESETS: dict[str, TuningSettings] = {
    "quick": TuningSettings(
        steps=1_500, epochs=1, batch=64, anchor_rate=2e-4, stitch_rate=1e-3, weight_decay=0.05, warmup=0.1,
        distillation=0.7, hard=False, clip=5.0, augmentation="light", init_images=1_000,
    ),
    # SN-Net for DeiT: learning rate 1e-4 at batch 1024, 5 of 50 epochs of warm-up
    "paper": TuningSettings(
        steps=None, epochs=50, batch=1_024, anchor_rate=1e-4, stitch_rate=1e-4, weight_decay=0.05, warmup=0.1,
        distillation=0.5, hard=True, clip=None, augmentation="strong", init_images=5_000,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What tuning reports after every step; `loss` is a running mean."""

    step: int
    steps: int
    loss: float
    images: int


def tune(
    supernet: Supernet,
    batches: Iterator[Batch],
    steps: int,
    settings: TuningSettings,
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Tunes anchors and stitching layers together, in place.

    Args:
        batches: endless training batches.

    Raises:
        SelectionError: the loss is not finite; names the route and the step.
    """
    if steps == 0:
        return
    device = next(supernet.parameters()).device.type
    settings = settings.on(device)
    dearest = list(supernet.chains.values())[-1]
    teacher = copy.deepcopy(dearest).eval().requires_grad_(False)
    optimiser = _optimiser(supernet, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps, settings.warmup))
    draw = random.Random(settings.seed)
    running = math.nan
    supernet.train()
    supernet.freeze_statistics()
    for step in range(steps):
        images, labels = next(batches)
        route = draw.choice(supernet.routes)
        with _arithmetic(device, settings):
            with torch.no_grad():
                taught = teacher(images).float()
            logits = supernet(images, route).float()
        loss = mixed_loss(logits, labels, taught, settings)
        if not torch.isfinite(loss):
            raise SelectionError(f"Tuning diverged at step {step + 1} on route {route}: lower the learning rates.")
        loss.backward()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(supernet.parameters(), settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        scheduler.step()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        on_step(Progress(step=step + 1, steps=steps, loss=running, images=len(labels)))
    supernet.eval()


def _arithmetic(device: str, settings: TuningSettings) -> ExitStack:
    """bf16 autocast, or nothing."""
    stack = ExitStack()
    if settings.precision == "bf16":
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if device == "cpu":
            # the backward pass of the fused kernel is ten times slower in bf16
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def mixed_loss(logits: Tensor, labels: Tensor, taught: Tensor, settings: TuningSettings) -> Tensor:
    """(1 − d) · cross-entropy + d · distillation, d = `settings.distillation`.

    Hard distillation is cross-entropy with the teacher's most likely class (DeiT, Eq. 3), soft
    is KL(teacher ‖ route) at temperature 1.
    """
    plain = F.cross_entropy(logits, labels)
    if settings.hard:
        distilled = F.cross_entropy(logits, taught.argmax(1))
    else:
        distilled = F.kl_div(
            F.log_softmax(logits, 1), F.log_softmax(taught, 1), log_target=True, reduction="batchmean"
        )
    return (1 - settings.distillation) * plain + settings.distillation * distilled


def _optimiser(supernet: Supernet, settings: TuningSettings) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases, norms and positions do not."""
    groups = []
    for part, rate in ((supernet.chains, settings.anchor_rate), (supernet.stitches, settings.stitch_rate)):
        for decays in (True, False):
            # positions and prefix tokens, (1, N, D), are no matrices
            chosen = [p for p in part.parameters() if (p.ndim > 1 and len(p) > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear from zero, then a cosine to zero."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))

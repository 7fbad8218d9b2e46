"""The optimiser of tuning, and its learning rates."""

from __future__ import annotations

import math

import torch
from torch import nn

from klas_zoo.supernet import Supernet
from klas_zoo.tuning.settings import TuningSettings


def make_optimiser(
    supernet: Supernet, settings: TuningSettings, memory_format: torch.memory_format
) -> torch.optim.Optimizer:
    """AdamW over what learns; matrices decay, biases, norms and positions do not.

    Routes' own tensors have the learning rate of the stitching layers.
    """
    groups = []
    of_stitches = nn.ModuleList([supernet.stitches, supernet.own])
    for part, rate in ((supernet.chains, settings.anchor_rate), (of_stitches, settings.stitch_rate)):
        for decays in (True, False):
            # positions and prefix tokens, (1, N, D), are no matrices
            chosen = [p for p in part.parameters() if p.requires_grad and (p.ndim > 1 and len(p) > 1) is decays]
            decay = settings.weight_decay if decays else 0.0
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    # a third of the time, on CPUs too; there it takes for granted that gradients are laid out as weights are
    return torch.optim.AdamW(groups, fused=memory_format is torch.contiguous_format)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear from zero, then a cosine to zero."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))

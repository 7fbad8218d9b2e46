"""What tuning minimises for one route: cross-entropy, distillation from a teacher, and the distance of features."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from klas_zoo.chains import Chain
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.settings import TuningSettings


class Objective(nn.Module):
    """Images (B, C, H, W), labels and the teacher's logits of them, and a route of a supernet → the mean loss.

    Args:
        settings: without `auto`, see `TuningSettings.on`.
        teacher: images → logits, what routes learn from besides labels. Default: the largest anchor as it is now.
    """

    def __init__(
        self, supernet: Supernet, settings: TuningSettings, memory_format: torch.memory_format,
        teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.supernet, self.settings, self.memory_format = supernet, settings, memory_format
        self.device = next(supernet.parameters()).device.type
        self.teacher = teacher or _frozen_copy(list(supernet.chains.values())[-1])
        self.untuned = nn.ModuleDict()
        if settings.features:
            ends = {route.segments[-1].anchor for route in supernet.routes if not route.is_anchor}
            self.untuned.update({f"anchor_{name}": _frozen_copy(supernet.chain(name)) for name in sorted(ends)})

    def forward(self, images: Tensor, labels: Tensor, taught: Tensor | None, route: Route) -> Tensor:
        images = images.contiguous(memory_format=self.memory_format)
        with self._arithmetic():
            if not self.untuned or route.is_anchor:
                return mixed_loss(self.supernet(images, route).float(), labels, taught, self.settings)
            *before, head = self.supernet.steps(route)
            features = images
            for step in before:
                features = self.supernet.module(step)(features)
            logits = self.supernet.module(head)(features).float()
            distance = self.distance(features, images, route.segments[-1].anchor)
        return mixed_loss(logits, labels, taught, self.settings) + self.settings.features * distance

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor | None:
        """The teacher's logits (B, classes); None where nothing is learnt from it."""
        if self.settings.distillation == 0:
            return None
        with self._arithmetic():
            return self.teacher(images.contiguous(memory_format=self.memory_format)).float()

    def distance(self, features: Tensor, images: Tensor, target: str) -> Tensor:
        """Of a stitch's last features, pooled, from those of its target before tuning, as a share of their variance."""
        untuned = self.untuned[f"anchor_{target}"]
        assert isinstance(untuned, Chain)
        with torch.no_grad():
            *_, wanted = untuned.walk(images)
            wanted = untuned.pool(wanted, untuned.layouts[-1]).float()
        found = untuned.pool(features, untuned.layouts[-1]).float()
        return (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)

    def chains(self) -> list[Chain]:
        """Networks beside the supernet."""
        return [one for one in (self.teacher, *self.untuned.values()) if isinstance(one, Chain)]

    @contextmanager
    def fast_attention(self) -> Iterator[None]:
        """In bf16 on a CPU without the fused kernel, whose backward pass is ten times slower there.

        timm's own two products and a softmax then take a quarter less than torch's, which look for masked rows.
        """
        if self.device != "cpu" or self.settings.precision != "bf16":
            yield
            return
        fused: list[Any] = [one for one in self.modules() if getattr(one, "fused_attn", False)]
        try:
            for attention in fused:
                attention.fused_attn = False
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for attention in fused:
                attention.fused_attn = True

    def _arithmetic(self) -> AbstractContextManager[Any]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device, torch.bfloat16) if self.settings.precision == "bf16" else nullcontext()


def mixed_loss(logits: Tensor, labels: Tensor, taught: Tensor | None, settings: TuningSettings) -> Tensor:
    """(1 − d) · cross-entropy + d · distillation, d = `settings.distillation`; cross-entropy without a teacher.

    Hard distillation is cross-entropy with the teacher's most likely class (DeiT, Eq. 3), soft
    is KL(teacher ‖ route) at temperature T, times T² (Hinton et al. 2015).
    """
    plain = F.cross_entropy(logits, labels)
    if taught is None:
        return plain
    if settings.hard:
        distilled = F.cross_entropy(logits, taught.argmax(1))
    else:
        heat = settings.temperature
        distilled = heat**2 * F.kl_div(
            F.log_softmax(logits / heat, 1), F.log_softmax(taught / heat, 1), log_target=True, reduction="batchmean"
        )
    return (1 - settings.distillation) * plain + settings.distillation * distilled


def _frozen_copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)

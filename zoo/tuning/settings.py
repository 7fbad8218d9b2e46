"""How the supernet is tuned: settings and presets. `klas_zoo.tuning.tuner` does it.

The preset `paper` follows SN-Net (CVPR 2023, §4); `quick` is for minutes on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from klas_zoo.chains import Chain
from klas_zoo.hardware import has_fast_bf16
from klas_zoo.route_tensors import OwnTensors
from klas_zoo.supernet import Supernet


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How the supernet is tuned.

    Attributes:
        steps: optimiser steps; None: `epochs` over the training images. 0 keeps the closed form.
        batch: images per step, over all processes.
        anchor_rate, stitch_rate: peak learning rates of anchors and of stitching layers.
        warmup: share of the steps in which the rates rise from zero, 0..1; a cosine follows.
        distillation: weight of the teacher's part of the loss, 0..1.
        hard: learn the teacher's most likely class instead of its whole distribution.
        clip: largest norm of the gradient; None does not clip.
        augmentation: `light` or `strong`, see klas_zoo.data.loading.
        precision: of products while tuning; weights stay fp32. `auto`: bf16 where that is fast.
        accumulate: parts that a batch is cut into, one after the other, to save memory.
        reuse: steps, for which routes are drawn anew, that learn from one batch; the teacher answers it once.
        ema: decay of a running average of the weights, 0..1, which then is the result; None: the last weights are.
        routes: of several processes, all take the `same` route in a step, or `each` another.
        compile: every block by torch.compile, each on its own: a new route compiles nothing.
        memory_format: of weights and maps. `auto`: channels last for convolutions on GPUs.
        anchors: `tuned` along with the stitching layers, or `frozen`: then only stitches learn.
        own_norms: every stitch has normalisations of its own behind its last seam.
        rank: of the updates of linear maps that every stitch has for itself; 0 has none.
        adapted_blocks: how many blocks behind the seam have such updates.
        features: weight of the distance of a stitch's last features from those of its target before tuning, as a
            share of their variance (arXiv:2603.12433).
        sampling: routes are drawn `uniform`ly, or in proportion to what they still `gain`.
        temperature: of soft distillation.
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
    accumulate: int = 1
    reuse: int = 1
    ema: float | None = None
    routes: Literal["same", "each"] = "same"
    compile: bool = False
    memory_format: Literal["auto", "contiguous", "channels-last"] = "auto"
    anchors: Literal["tuned", "frozen"] = "tuned"
    own_norms: bool = False
    rank: int = 0
    adapted_blocks: int = 2
    features: float = 0.0
    sampling: Literal["uniform", "gain"] = "uniform"
    temperature: float = 1.0
    seed: int = 0

    @property
    def own(self) -> OwnTensors:
        """Which tensors every stitch has for itself."""
        return OwnTensors(norms=self.own_norms, rank=self.rank, blocks=self.adapted_blocks)

    def on(self, device: str) -> TuningSettings:
        """The same with `auto` replaced by what it means on a torch device."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if has_fast_bf16(device) else "fp32")

    def format_of(self, supernet: Supernet, device: str) -> torch.memory_format:
        """What `memory_format` means for a supernet on a device."""
        chains = (chain for chain in supernet.chains.values() if isinstance(chain, Chain))
        convolutional = any(layout.kind == "maps" for chain in chains for layout in chain.layouts)
        auto = self.memory_format == "auto" and device == "cuda" and convolutional
        return torch.channels_last if auto or self.memory_format == "channels-last" else torch.contiguous_format

    def total_steps(self, images: int) -> int:
        """Optimiser steps for so many training images."""
        return self.steps if self.steps is not None else self.epochs * max(1, images // self.batch) * self.reuse


PRESETS: dict[str, TuningSettings] = {
    "quick": TuningSettings(
        steps=1_500, epochs=1, batch=64, anchor_rate=2e-4, stitch_rate=1e-3, weight_decay=0.05, warmup=0.1,
        distillation=0.7, hard=False, clip=5.0, augmentation="light", init_images=1_000, reuse=4,
    ),
    # SN-Net for DeiT: learning rate 1e-4 at batch 1024, 5 of 50 epochs of warm-up
    "paper": TuningSettings(
        steps=None, epochs=50, batch=1_024, anchor_rate=1e-4, stitch_rate=1e-4, weight_decay=0.05, warmup=0.1,
        distillation=0.5, hard=True, clip=None, augmentation="strong", init_images=5_000,
    ),
}  # fmt: skip

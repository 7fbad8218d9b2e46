"""A small model of each architecture, for images of 64×64 with 7 classes; weights are drawn at random."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from klas_zoo.chains import Chain

SHAPE = (3, 64, 64)
CLASSES = 7
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 2, 3, 1), "num_heads": (1, 2, 2, 2)}
LEVIT = {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (2, 2, 1)}
CONVNEXT = {"depths": (1, 2, 3, 1), "dims": (8, 16, 24, 32)}
RESNET = {"layers": (1, 2, 2, 1), "channels": (8, 16, 24, 32), "stem_width": 8}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT | {"class_token": False, "global_pool": "avg"}),
    "deit": ("deit_tiny_patch16_224", VIT),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 4}),
    "registers-without-class": (
        "vit_tiny_patch16_224",
        VIT | {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
    ),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "levit": ("levit_128s", LEVIT),
    "levit-undistilled": ("levit_128s", LEVIT | {"distilled": False}),
    "levit-conv": ("levit_conv_128s", LEVIT),
    "resnet": ("resnet18", RESNET),
    "resnet-bottleneck": ("resnet26d", RESNET),
    "convnext": ("convnext_tiny", CONVNEXT),
    "convnextv2": ("convnextv2_atto", CONVNEXT),
    "efficientnet": ("tinynet_e", {}),
    "mobilenetv2": ("mobilenetv2_035", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
}


def build(name: str, arguments: dict[str, Any], *, seed: int = 3, training: bool = False) -> nn.Module:
    """A timm model in which no part is without effect: timm starts many a branch at zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = timm.create_model(name, **arguments)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.3, 0.9)
            elif not parameter.any():
                parameter.normal_(0, 0.3)
    return model.train(training)


def small_model(name: str, *, seed: int = 3) -> nn.Module:
    model, arguments = MODELS[name]
    return build(model, arguments | {"num_classes": CLASSES}, seed=seed)


def small_chain(name: str, *, seed: int = 3) -> Chain:
    return Chain.of(small_model(name, seed=seed), SHAPE)

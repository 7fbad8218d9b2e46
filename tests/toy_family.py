"""A family of tiny Vision Transformers as a file, for the tests of whole builds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
from torch import nn

DEPTH = 3
_FAMILY = """
name = "{name}"
input_shape = [3, 16, 16]
num_classes = 3
"""
_ANCHOR = """
[[anchors]]
name = "{name}"
model = "vit_tiny_patch16_224"
arguments = {{ img_size = 16, patch_size = 8, embed_dim = {width}, depth = {depth}, num_heads = 2 }}
"""
WIDTHS = {"small": 8, "large": 16}


def write_family(folder: Path, *, name: str = "toy", depth: int = DEPTH, checkpoints: bool = False) -> Path:
    """`NAME.toml` in a folder: two anchors of five tokens and three classes.

    Args:
        checkpoints: anchors name files of weights beside the family, `small.safetensors` and `large.safetensors`.
    """
    text = _FAMILY.format(name=name)
    for anchor, width in WIDTHS.items():
        text += _ANCHOR.format(name=anchor, width=width, depth=depth)
        text += f'checkpoint = "{anchor}.safetensors"\n' if checkpoints else ""
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file


def networks(depth: int = DEPTH) -> Mapping[str, nn.Module]:
    """The family's anchors, with weights of torch's own random generator."""
    return {
        name: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=width, depth=depth, num_heads=2, num_classes=3
        )
        for name, width in WIDTHS.items()
    }

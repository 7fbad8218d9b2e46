"""Tiny engines for tests."""

from __future__ import annotations

from pathlib import Path

import onnx


def means(folder: Path, name: str = "means", batch: str = "batch") -> Path:
    """(B, 3, 8, 8) → (B, 3), the mean of every channel.

    Args:
        batch: a number fixes the batch size.
    """
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    means (float[{batch}, 3, 8, 8] pictures) => (float[{batch}, 3] logits) {{
        pooled = GlobalAveragePool(pictures)
        logits = Flatten(pooled)
    }}"""
    return written(folder / f"{name}.onnx", text)


def written(file: Path, text: str) -> Path:
    """A model in onnx's text format as a file."""
    onnx.save(onnx.parser.parse_model(text), file)
    return file

"""Logits of an ONNX file in another runtime than onnxruntime, to compare its engine with. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.errors import ExportError, KlasZooError, first_line
from klas_zoo.runtimes import runtime_named

Logits = Callable[[np.ndarray], np.ndarray]
_INTERPRETED_IMAGES = 4  # onnx.reference computes in numpy, node by node


@dataclass(frozen=True, kw_only=True)
class SecondRuntime:
    """Another implementation of the same file.

    Attributes:
        name: with its version.
        logits: images (B, C, H, W) → logits (B, classes), both float32.
        most_images: it can be asked for in reasonable time; None: any number.
    """

    name: str
    logits: Logits
    most_images: int | None = None


def second_runtime(path: Path) -> SecondRuntime:
    """OpenVINO where it is installed and can load the file, else the reference implementation of ONNX.

    Raises:
        ExportError: neither can.
    """
    openvino = runtime_named("openvino")
    if openvino.available():
        try:
            session = openvino.open(path, provider="CPU")
            return SecondRuntime(name=f"openvino {session.runtime_version}", logits=session.run)
        except KlasZooError:
            pass  # an operator it does not have; the reference may
    import onnx
    from onnx.reference import ReferenceEvaluator

    try:
        evaluator = ReferenceEvaluator(str(path))
    except Exception as error:  # it raises errors of many kinds
        raise ExportError(f"{path} cannot be verified: onnx.reference cannot read it ({first_line(error)}).") from error
    name = evaluator.input_names[0]

    def logits(images: np.ndarray) -> np.ndarray:
        try:
            answered: Any = evaluator.run(None, {name: images})
            found: np.ndarray = answered[0]
        except Exception as error:
            raise ExportError(
                f"{path} cannot be verified: onnx.reference cannot run it ({first_line(error)}). pip install openvino "
                "brings another runtime to compare with."
            ) from error
        return found.astype(np.float32, copy=False)

    return SecondRuntime(name=f"onnx.reference {onnx.__version__}", logits=logits, most_images=_INTERPRETED_IMAGES)

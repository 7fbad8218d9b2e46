"""Precisions of engines: how the fp32 graph of a route becomes one of another precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import onnx_ir as ir
from torch import Tensor

from klas_zoo.exporters.reduced_precision import Half

Convert = Callable[[ir.Model, str], ir.Model]
"""The fp32 graph of a route, which it may change, and the route's name → the graph in another precision."""


def converter(
    precision: str, calibration: Callable[[], Iterable[tuple[Tensor, Any]]], weight_bits: int = 7
) -> Convert:
    """What turns the fp32 graph of a route into one of another precision.

    Args:
        calibration: batches of images (B, C, H, W), and anything; int8 finds its ranges on them.
        weight_bits: of int8; 8 only for processors with dot products of eight bits.
    """
    if precision in ("fp16", "bf16"):
        return Half(ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16)
    if precision == "int8":
        from klas_zoo.exporters.int8 import Scheme, quantised  # its quantiser takes a second to import

        return partial(quantised, calibration=calibration, scheme=Scheme(weight_bits=weight_bits))
    return _unchanged


def _unchanged(model: ir.Model, name: str) -> ir.Model:
    """fp32 stays fp32."""
    return model

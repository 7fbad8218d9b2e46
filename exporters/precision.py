"""Precisions of engines, and how far each may be from the fp32 torch route."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import onnx_ir as ir
from torch import Tensor

from klas_zoo.exporters.contract import Limits
from klas_zoo.exporters.half import Half

Convert = Callable[[ir.Model, str], ir.Model]
"""The fp32 graph of a route, which it may change, and the route's name → the graph in another precision."""

_LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(relative=1e-4, min_agreement=0.999),
    "fp16": Limits(relative=2e-2, min_agreement=0.99, min_cosine=0.9999, most_lost=0.2),
    "bf16": Limits(relative=2e-1, min_agreement=0.95, min_cosine=0.99, most_lost=1.0),
    "int8": Limits(relative=1.0, min_agreement=0.9, min_cosine=0.95, most_lost=1.0),
}


def limits_for(precision: str, weights: str) -> Limits:
    """How far an engine of a precision may be from the fp32 torch route.

    Args:
        weights: `random` where nobody trained the networks: their classes lie within rounding of one
            another, so that only fp32 has to agree on them.
    """
    limits = _LIMITS[precision]
    if weights == "random" and precision != "fp32":
        return replace(limits, min_agreement=0.0, most_lost=None)
    return limits


def converter(precision: str, calibration: Callable[[], Iterable[tuple[Tensor, Any]]]) -> Convert:
    """What turns the fp32 graph of a route into one of another precision.

    Args:
        calibration: batches of images (B, C, H, W), and anything; int8 finds its ranges on them.
    """
    if precision in ("fp16", "bf16"):
        return Half(ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16)
    if precision == "int8":
        from klas_zoo.exporters.int8 import quantised  # its quantiser takes a second to import

        return partial(quantised, calibration=calibration)
    return _unchanged


def _unchanged(model: ir.Model, name: str) -> ir.Model:
    """fp32 stays fp32."""
    return model

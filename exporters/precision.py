"""Precisions of engines, and how far each may be from the fp32 torch route."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx_ir as ir

from klas_zoo.exporters.contract import Limits
from klas_zoo.exporters.half import Half

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


def converter(precision: str) -> Callable[[ir.Model], None]:
    """What turns the fp32 graph of a route into one of another precision, in place."""
    if precision in ("fp16", "bf16"):
        return Half(ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16)
    return lambda model: None

"""Precisions of engines, and how far each may be from the fp32 torch route."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from klas_zoo.errors import UsageError
from klas_zoo.exporters.contract import Limits

_LIMITS = {"fp32": Limits(relative=1e-4, min_agreement=0.999)}


def limits_for(precision: str, weights: str) -> Limits:
    """How far an engine of a precision may be from the fp32 torch route."""
    return _LIMITS[precision]


def converter(precision: str) -> Callable[[ir.Model], None]:
    """What turns the supernet's fp32 graph into one of another precision."""
    if precision == "fp32":
        return lambda model: None
    raise UsageError(f"{precision} is not there yet.")


def quantised(model: ir.Model, name: str, calibration: object) -> ir.Model:
    raise NotImplementedError

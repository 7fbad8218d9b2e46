"""Static quantisation to int8 by onnxruntime's own quantiser, calibrated on real images.

Weights are signed, symmetric, of seven bits or eight, one scale for each output channel: they follow from the weights
alone, so that routes go on sharing them. Seven, because processors without VNNI add two products in 16 bits:
255 · 64 · 2 fits, 255 · 127 · 2 does not and saturates silently; eight for a target that is known to have it
(`klas_zoo.hardware.has_dot_products`). benchmarks/README.md compares them. What a product reads is
unsigned with a zero point, its range taken from the calibration images of each route. What it gives stays
fp32, and so do biases, norms, attention, and everything from the last product on.

Tried on four routes of deit-micro, 3,000 test images, a processor with AVX2 and no VNNI: with weights of eight
bits 0.9 to 2.6 % of the answers change and the smallest cosine is 0.91 to 0.99, with seven 0.3 to 0.8 % and
0.989 to 0.998, as fast. Unsigned weights, whose products are added in 32 bits, change 0.3 to 0.7 % and take 2
to 6 % longer. With convolutions and outputs quantised too, 0.9 % of the answers change instead of 0.5 (base,
1,000 images, eight bits, VNNI).
Convolutions are quantised only where they hold most of the weights: they are fast in int8 only if what they
give is int8 as well, which is what costs answers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import Tensor

from klas_zoo.exporters.contract import stage
from klas_zoo.exporters.to_onnx import INPUT, finish

PRODUCTS = ("Conv", "Gemm", "MatMul")
_AT_ONCE = 10
"""Images that the calibrator sees at once: it keeps every activation of a batch until the batch has ended."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How numbers become eight bits.

    Attributes:
        weight_bits: 7 where a processor may add two products in 16 bits, 8 where none does.
        signed: what a product reads is signed and symmetric, instead of unsigned with a zero point.
    """

    weight_bits: int = 7
    signed: bool = False


ANYWHERE = Scheme()


def quantised(
    model: ir.Model,
    name: str,
    calibration: Callable[[], Iterable[tuple[Tensor, Any]]],
    scheme: Scheme = ANYWHERE,
) -> ir.Model:
    """A route's graph with int8 weights and QDQ pairs around its matrix products.

    Args:
        calibration: batches of real images that are not those it is verified on.

    Raises:
        ExportError: onnxruntime cannot quantise it.
    """
    proto = finish(model, {})
    kinds = _kinds(model)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-") as folder, stage("quantise", name), _quiet():
        file = Path(folder) / "route.onnx"
        quantize_static(
            proto,
            file,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=kinds,
            nodes_to_exclude=_last_product(model),
            per_channel=True,
            reduce_range=scheme.weight_bits == 7,
            activation_type=QuantType.QInt8 if scheme.signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "QuantizeBias": False,
                "WeightSymmetric": True,
                "ActivationSymmetric": scheme.signed,
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            },
        )
        return ir.load(file)


def _kinds(model: ir.Model) -> list[str]:
    """Operators to quantise."""
    sizes = dict.fromkeys(PRODUCTS, 0)
    for node in model.graph:
        weight = node.inputs[1].const_value if node.op_type in PRODUCTS and node.inputs[1] is not None else None
        if weight is not None:
            sizes[node.op_type] += weight.nbytes
    kinds = ["Gemm", "MatMul"]
    return [*kinds, "Conv"] if sizes["Conv"] > sizes["Gemm"] + sizes["MatMul"] else kinds


def _last_product(model: ir.Model) -> list[str]:
    return [str(node.name) for node in model.graph if node.op_type in PRODUCTS][-1:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantiser from logging advice on every graph, to the root logger and to stdout."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class _Reader:
    """onnxruntime takes whatever has `get_next` for a CalibrationDataReader."""

    def __init__(self, batches: Callable[[], Iterable[tuple[Tensor, Any]]]) -> None:
        self._batches = batches
        self.rewind()

    def rewind(self) -> None:
        self._left: Iterator[Tensor] = (part for images, _ in self._batches() for part in images.split(_AT_ONCE))

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        images = next(self._left, None)
        return None if images is None else {INPUT: images.numpy()}

"""ONNX files from anywhere: what they are checked for, and how one becomes an engine of a package. Needs no torch.

The graph stays as it is; only the place of its weights changes. Nothing outside of the file's folder is read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from klas_zoo.errors import ExportError, UsageError, first_line
from klas_zoo.exporters.graphs import ALIGNMENT, tensors_of
from klas_zoo.exporters.manifest import PREPROCESSING

_FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.DOUBLE: "float64"}
_VENDOR = "com.microsoft"  # operators of onnxruntime, which it documents
_INLINE_BYTES = 1024
_PRODUCTS = frozenset({"Conv", "ConvInteger", "QLinearConv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger",
                       "QLinearMatMul", "Attention", "Einsum"})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OnnxNetwork:
    """An image classifier in an ONNX file that passed every check.

    Attributes:
        model: with its weights in memory.
        input_shape: (C, H, W) of one image.
        batch: the only batch size it takes; None: any.
        precision: fp32, fp16 or int8, by its weights and operators.
        macs: multiply-adds for one image.
        parameters: how many numbers its weights are.
    """

    path: Path
    model: onnx.ModelProto
    input_name: str
    input_shape: tuple[int, ...]
    batch: int | None
    num_classes: int
    precision: str
    macs: int
    parameters: int


def read_network(path: Path) -> OnnxNetwork:
    """Reads an ONNX file and checks that it is an image classifier that an engine can be made of.

    Raises:
        UsageError: it is no ONNX file, or not of this kind; says what is expected.
        ExportError: ONNX's own checker refuses it, or its weights cannot be read.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf's errors have no common class that it documents
        raise UsageError(f"{path} is not an ONNX file ({first_line(error)}).") from error
    if not model.graph.node:
        raise UsageError(f"{path} is not an ONNX file of a network: it computes nothing.")
    _refuse_outside(model, path)
    _refuse_unknown_operators(model, path)
    name, shape, batch = _input(model, path)
    classes = _output(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # of the checker, of shape inference, of files that are missing or too short
        raise ExportError(f"{path} does not pass ONNX's checker: {first_line(error)}.") from error
    return OnnxNetwork(
        path=path, model=model, input_name=name, input_shape=shape, batch=batch, num_classes=classes,
        precision=_precision(model), macs=count_macs(model, name, shape),
        parameters=sum(math.prod(one.dims) for one in _weights(model)),
    )  # fmt: skip


def stated_preprocessing(path: Path) -> dict[str, Any]:
    """How images are prepared for a graph, in timm's terms, where its metadata say so as klas-zoo writes them."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        found = json.loads(next(one.value for one in model.metadata_props if one.key == PREPROCESSING))
    except (StopIteration, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_network(network: OnnxNetwork, graph: Path, weights: Path, metadata: Mapping[str, str]) -> None:
    """Writes a network as a graph whose larger weights lie in a file beside it, each at the start of a page.

    Args:
        metadata: written into the graph beside its own.

    Raises:
        OSError: a file cannot be written.
    """
    model = onnx.ModelProto()
    model.CopyFrom(network.model)
    places: dict[bytes, int] = {}
    with weights.open("xb") as file:
        for tensor in model.graph.initializer:
            content = _content(tensor)
            if len(content) < _INLINE_BYTES:
                continue
            if content not in places:
                file.write(bytes(-file.tell() % ALIGNMENT))
                places[content] = file.tell()
                file.write(content)
            kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            kept.data_location = TensorProto.EXTERNAL
            for key, value in (("location", weights.name), ("offset", places[content]), ("length", len(content))):
                kept.external_data.add(key=key, value=str(value))
            tensor.CopyFrom(kept)
    own = {one.key: one.value for one in model.metadata_props}
    helper.set_model_props(model, {**own, **metadata})
    graph.write_bytes(model.SerializeToString(deterministic=True))


def count_macs(model: onnx.ModelProto, input_name: str, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of products and convolutions for one image.

    Raises:
        ExportError: the shape of a product cannot be inferred, so that it cannot be counted.
    """
    one = onnx.ModelProto()
    one.CopyFrom(model)
    for value in one.graph.input:
        if value.name == input_name:
            value.type.tensor_type.shape.dim[0].ClearField("value")
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    del one.graph.value_info[:]
    inferred = shape_inference.infer_shapes(one, data_prop=True).graph
    shapes = {value.name: _dims(value) for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    shapes |= {
        node.output[0]: tuple(attribute.t.dims)
        for node in inferred.node if node.op_type == "Constant"
        for attribute in node.attribute if attribute.name == "value"
    }  # fmt: skip
    total = 0
    for node in inferred.node:
        if node.op_type in _PRODUCTS:
            try:
                total += _macs(node, shapes)
            except (KeyError, IndexError, TypeError) as error:
                raise ExportError(
                    f"The multiply-adds of {node.op_type} {node.name or node.output[0]} cannot be counted: the shape "
                    "of what it reads is not known."
                ) from error
    return total


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[Any, ...]]) -> int:
    names = list(node.input)
    if node.op_type in ("QLinearConv", "QLinearMatMul"):  # x, scale, zero point, w, …
        names = [names[0], names[3]]
    first, second = _known(shapes[names[0]]), _known(shapes[names[1]])
    out = _known(shapes[node.output[0]])
    if node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Attention":  # queries and keys (B, heads, L, D) or (B, L, heads · D)
        keys = second[-2]
        return 2 * math.prod(first) * keys
    if node.op_type == "Einsum":
        equation = helper.get_attribute_value(next(one for one in node.attribute if one.name == "equation")).decode()
        sizes: dict[str, int] = {}
        for term, name in zip(equation.replace(" ", "").split("->")[0].split(","), node.input, strict=True):
            sizes |= dict(zip(term, _known(shapes[name]), strict=True))
        return math.prod(sizes.values())
    transposed = any(one.name == "transA" and one.i for one in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])


def _known(shape: tuple[int, ...]) -> tuple[int, ...]:
    if any(size is None for size in shape):
        raise TypeError(shape)
    return shape


def _dims(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(
        one.dim_value if one.HasField("dim_value") else None for one in value.type.tensor_type.shape.dim
    )


def _weights(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors of numbers that are not shapes and indices."""
    for tensor in tensors_of(model):
        if tensor.data_type not in (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING, TensorProto.UNDEFINED):
            yield tensor


def _precision(model: onnx.ModelProto) -> str:
    if any(node.op_type in ("QuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
           for node in model.graph.node):  # fmt: skip
        return "int8"
    sizes = Counter[int]()
    for tensor in _weights(model):
        sizes[tensor.data_type] += math.prod(tensor.dims)
    kind = sizes.most_common(1)[0][0] if sizes else TensorProto.FLOAT
    narrow: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    return narrow.get(kind, "fp32")


def _content(tensor: onnx.TensorProto) -> bytes:
    """As an external file holds it."""
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()


def _refuse_outside(model: onnx.ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in tensors_of(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((one.value for one in tensor.external_data if one.key == "location"), "")
        place = folder / location
        if not location or not place.resolve().is_relative_to(folder) or place.is_symlink():
            raise UsageError(
                f"{path} reads the weights {tensor.name!r} from {location!r}, which is not a file of its own folder: "
                "save it with its weights beside it."
            )


def _refuse_unknown_operators(model: onnx.ModelProto, path: Path) -> None:
    local = {(one.domain, one.name) for one in model.functions}
    unknown = sorted(
        {
            f"{node.domain or 'ai.onnx'}::{node.op_type}"
            for node in model.graph.node
            if (node.domain, node.op_type) not in local
            and node.domain != _VENDOR
            and not onnx.defs.has(node.op_type, node.domain if node.domain != "ai.onnx" else "")
        }
    )
    if unknown:
        raise UsageError(
            f"{path} uses operators that ONNX does not define: {', '.join(unknown)}. Export it without them."
        )


def _input(model: onnx.ModelProto, path: Path) -> tuple[str, tuple[int, ...], int | None]:
    """The input's name, the shape of one image, and the only batch size, None where it is free."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in constants]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        named = ", ".join(one.name for one in (*inputs, *model.graph.output))
        raise UsageError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs ({named}): an engine takes images "
            "and gives logits, one of each."
        )
    (value,) = inputs
    kind = value.type.tensor_type.elem_type
    if kind not in _FLOATS:
        found = TensorProto.DataType.Name(kind).lower() if kind else "no tensor"
        raise UsageError(
            f"{path} takes {found}: an engine takes normalised images as {', '.join(_FLOATS.values())}. Export it "
            "without the preprocessing."
        )
    shape = _dims(value)
    if len(shape) != 4 or any(size is None or size < 1 for size in shape[1:]):
        dimensions = ", ".join(
            str(one.dim_value) if one.HasField("dim_value") else one.dim_param or "?"
            for one in value.type.tensor_type.shape.dim
        )
        raise UsageError(
            f"{path} takes images of shape ({dimensions}): an engine takes (batch, C, H, W) with C, H and W fixed. "
            "Export it for one size of images."
        )
    return value.name, tuple(int(size or 0) for size in shape[1:]), shape[0] or None


def _output(model: onnx.ModelProto, path: Path) -> int:
    value = model.graph.output[0]
    shape = _dims(value)
    if len(shape) != 2 or not shape[1] or value.type.tensor_type.elem_type not in _FLOATS:
        shown = ", ".join("?" if size is None else str(size) for size in shape)
        raise UsageError(f"{path} gives an output of shape ({shown}): an engine gives logits (batch, classes).")
    return int(shape[1])

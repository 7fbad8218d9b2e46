"""What a graph has to be for TensorRT's parser, which takes no softmax in another type than its attention.

An fp16 or bf16 graph asks for softmax in fp32. TensorRT refuses that ("Setting softmax precision is
not supported in TensorRT Attention"), and without it an attention that has no fused kernel would
take its softmax in fp16. So such attentions are written out, with casts around the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper


def for_tensorrt(graph: Path) -> bytes:
    """An ONNX file's graph, its weights left in the external data beside it."""
    model = onnx.load(graph, load_external_data=False)
    write_out_attention(model)
    content: bytes = model.SerializeToString()
    return content


def write_out_attention(model: onnx.ModelProto) -> None:
    """Puts products, casts and a softmax in the place of every attention that asks for a softmax in another type.

    Raises:
        ValueError: an attention is causal, or has a cache or grouped heads.
    """
    widths = _last_dimensions(model)
    nodes: list[NodeProto] = []
    for number, node in enumerate(model.graph.node):
        precise = node.op_type == "Attention" and any(one.name == "softmax_precision" for one in node.attribute)
        nodes += _written_out(model, node, f"attention_{number}", widths) if precise else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _written_out(
    model: onnx.ModelProto, node: NodeProto, name: str, widths: dict[str, int]
) -> Iterator[NodeProto]:
    """Attention of queries, keys and values (B, H, N, D), with a mask to add or none.

    Raises:
        ValueError: it is causal, or has a cache or grouped heads, which no vision network here has.
    """
    known = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    precision = known.pop("softmax_precision")
    scale = known.pop("scale", 0.0) or 1 / math.sqrt(widths[node.input[0]])
    if any(known.values()) or len(node.output) > 1 or any(node.input[4:]):
        raise ValueError(f"the attention {node.name} has more than queries, keys, values and a mask ({known})")
    query, key, value = node.input[:3]
    half = TensorProto.FLOAT16 if _is_fp16(model) else TensorProto.BFLOAT16
    factor = numpy_helper.from_array(np.array(math.sqrt(scale), np.float32), f"{name}_scale")
    model.graph.initializer.append(factor)
    yield helper.make_node("Cast", [factor.name], [f"{name}_factor"], to=half)
    # each by the root, as the operator does: products of unscaled halves overflow
    yield helper.make_node("Mul", [query, f"{name}_factor"], [f"{name}_query"])
    yield helper.make_node("Mul", [key, f"{name}_factor"], [f"{name}_key"])
    yield helper.make_node("Transpose", [f"{name}_key"], [f"{name}_turned"], perm=[0, 1, 3, 2])
    yield helper.make_node("MatMul", [f"{name}_query", f"{name}_turned"], [f"{name}_products"])
    scores = f"{name}_products"
    if len(node.input) > 3 and node.input[3]:
        yield helper.make_node("Add", [scores, node.input[3]], [f"{name}_masked"])
        scores = f"{name}_masked"
    yield helper.make_node("Cast", [scores], [f"{name}_wide"], to=precision)
    yield helper.make_node("Softmax", [f"{name}_wide"], [f"{name}_shares"], axis=-1)
    yield helper.make_node("Cast", [f"{name}_shares"], [f"{name}_narrow"], to=half)
    yield helper.make_node("MatMul", [f"{name}_narrow", value], [node.output[0]])


def _last_dimensions(model: onnx.ModelProto) -> dict[str, int]:
    """Width of every tensor between nodes, where it is known."""
    found = onnx.shape_inference.infer_shapes(model).graph.value_info
    shapes = {one.name: one.type.tensor_type.shape.dim for one in found}
    return {name: dims[-1].dim_value for name, dims in shapes.items() if dims and dims[-1].dim_value}


def _is_fp16(model: onnx.ModelProto) -> bool:
    return any(one.data_type == TensorProto.FLOAT16 for one in model.graph.initializer)

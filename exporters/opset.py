"""Opsets: which ones graphs are translated to, and the one a graph is written in: the oldest that says the same.

A graph in an old opset is read by more programs: 18 by every onnxruntime since 1.14, by OpenVINO, by TensorRT 8.6 and
later. Opset 23 is the first with attention as one operator. Versions in between are needed by nothing that networks
here consist of; most of them changed only the types of operators, bfloat16 among them, which came with 22.

That is also a matter of speed: onnxruntime 1.31 has kernels for CUDA of MaxPool up to opset 21 only, and runs that
node of a newer graph on the CPU, with a copy to the host and one back.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

PORTABLE = 18
"""The opset that torch translates to without converting; attention is products and a softmax."""
FUSED = 23
"""The first opset with attention as one operator."""
_WITH_BFLOAT16 = 22


def settle_opset(model: onnx.ModelProto) -> None:
    """Writes a graph in the oldest opset from `PORTABLE` on in which it means the same, in place."""
    own = next((one for one in model.opset_import if one.domain in ("", "ai.onnx")), None)
    if own is not None and not model.functions:
        oldest = _WITH_BFLOAT16 if _has_bfloat16(model) else PORTABLE
        for version in range(oldest, max(own.version, oldest)):
            if all(_means_the_same(node, own.version, version) for node in _nodes(model.graph)):
                own.version = version
                break
        if own.version < oldest:
            own.version = oldest
    # the format of the file itself, which is older than what the library writes by default
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)


def _means_the_same(node: onnx.NodeProto, one: int, other: int) -> bool:
    """Whether an operator is in both opsets with the same inputs, outputs and attributes."""
    if node.domain not in ("", "ai.onnx"):
        return True
    try:
        older, newer = (onnx.defs.get_schema(node.op_type, version, "") for version in (one, other))
    except onnx.defs.SchemaError:
        return False
    same_ends = (len(older.inputs), len(older.outputs)) == (len(newer.inputs), len(newer.outputs))
    return same_ends and older.attributes.keys() == newer.attributes.keys()


def _has_bfloat16(model: onnx.ModelProto) -> bool:
    kind = onnx.TensorProto.BFLOAT16
    graph = model.graph
    ends = (value.type.tensor_type.elem_type for value in (*graph.input, *graph.output))
    casts = (
        attribute.i
        for node in _nodes(graph)
        for attribute in node.attribute
        if (node.op_type, attribute.name) == ("Cast", "to")
    )
    return kind in (*ends, *casts, *(one.data_type for one in graph.initializer))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)

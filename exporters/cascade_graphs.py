"""Cascades as ONNX graphs: of two engines, what both compute is computed once.

The engines of a package are cut, not exported anew: nodes of two graphs are the same where operator, attributes,
weights (their bytes, or their place in the weights file) and inputs are. What they have in common is computed by the
exit; the values of it that the rest of the second graph reads are the features.

    exit           images → logits of the first engine, features
    continuation   features → logits of the second engine

So a continuation cannot belong to other weights than its exit: engines that differ share nothing, and are refused.
Needs no torch. Graphs read the package's one weights file, as engines do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper, shape_inference

from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import ExportError
from klas_zoo.exporters.contract import stage

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


_FEATURES = "features_"


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """What one stage of a cascade executes.

    Attributes:
        model: its inputs and outputs in the order of the names here; weights lie where the engine's do.
        inputs: `images`, or features the stage before has left.
        outputs: logits, then features for the next stage.
        continues: whether it takes features.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    continues: bool


class NothingShared(ExportError):
    """A stage shall continue from one with which its engine has no computation in common."""


def cascade_graphs(cascade: Cascade, engines: Mapping[str, bytes]) -> list[StageGraph]:
    """The graph of every stage, cut out of the engines of its routes.

    Args:
        engines: contents of ONNX files of one package, by the route's name.

    Raises:
        NothingShared: a stage shall continue from one with which its engine has nothing in common.
        ExportError: an engine cannot be read.
    """
    models = []
    for route in cascade.routes:
        with stage("read", str(route)):
            models.append(onnx.load_model_from_string(engines[str(route)]))
    graphs: list[StageGraph] = []
    taken: list[str] = []  # values of this stage's own graph that the stage before gives
    for number, (one, model) in enumerate(zip(cascade.stages, models, strict=True)):
        after = cascade.stages[number + 1] if number + 1 < len(models) else None
        left: list[tuple[str, str]] = []
        if after is not None and after.shared:
            left = common_values(model, models[number + 1])
            if not left:
                raise NothingShared(
                    f"The engine {after.route} cannot continue from {one.route}: they have no computation in common, "
                    "so that it belongs to other weights. Write | for a stage that starts anew."
                )
        graphs.append(_cut(model, taken, [own for own, _ in left]))
        taken = [theirs for _, theirs in left]
    return graphs


def common_values(first: onnx.ModelProto, second: onnx.ModelProto) -> list[tuple[str, str]]:
    """The values that both graphs compute and the rest of the second one reads: their names in the first, the second.

    What has no row for every image, or no floating point, is computed again instead of being passed on: scales of
    dynamic quantisation, for example. Empty where the graphs have nothing in common but their inputs.
    """
    known = {digest: name for name, digest in _digests(first).items()}
    digests = _digests(second)
    computed = {name for node in second.graph.node for name in node.output}
    common = {name for name in computed if digests.get(name) in known}
    types = _types(second)
    images = second.graph.input[0].name
    while common:
        read = {
            name: None
            for node in second.graph.node
            if not set(node.output) <= common
            for name in node.input
            if name in common or name == images
        }
        if images in read:
            return []
        alone = {name for name in read if not _is_batch(types.get(name))}
        if not alone:
            return [(known[digests[name]], name) for name in read]
        common -= alone
    return []


def _types(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    inferred = shape_inference.infer_shapes(model).graph
    return {one.name: one for one in (*inferred.value_info, *inferred.output)}


def _digests(model: onnx.ModelProto) -> dict[str, bytes]:
    """What every value of a graph is computed from, as one hash. Names do not count."""
    found = {model.graph.input[0].name: b"images"}
    found |= {tensor.name: _digest(_tensor(tensor)) for tensor in model.graph.initializer}
    for node in model.graph.node:
        attributes = [one.SerializeToString(deterministic=True) for one in sorted(node.attribute, key=lambda a: a.name)]
        parts = [node.domain.encode(), node.op_type.encode(), *attributes, *(found.get(n, b"") for n in node.input)]
        for position, name in enumerate(node.output):
            found[name] = _digest([*parts, str(position).encode()])
    return found


def _tensor(tensor: TensorProto) -> Iterable[bytes]:
    unnamed = TensorProto()
    unnamed.CopyFrom(tensor)
    for field in ("name", "doc_string"):
        unnamed.ClearField(field)
    return [unnamed.SerializeToString(deterministic=True)]


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _cut(model: onnx.ModelProto, taken: Sequence[str], left: Sequence[str]) -> StageGraph:
    """A graph that starts at the values `taken`, the images where there are none, and also gives the values `left`."""
    graph, logits = model.graph, model.graph.output[0]
    if not taken and not left:  # as it is: a graph from elsewhere may have functions, and bodies that read its values
        weights = {one.name for one in graph.initializer}
        images = tuple(one.name for one in graph.input if one.name not in weights)
        return StageGraph(model=model, inputs=images, outputs=(logits.name,), continues=False)
    types = _types(model)
    renamed = {name: f"{_FEATURES}{number}" for number, name in enumerate(taken)}
    nodes: list[onnx.NodeProto] = []
    needed = {logits.name, *left}
    for node in reversed(graph.node):
        if needed & set(node.output) - set(taken):
            nodes.insert(0, node)
            needed |= set(node.input)
    outputs = [logits]
    for number, name in enumerate(left):
        # of another name than the value: a value that is passed on is no output of a node
        nodes.append(helper.make_node("Identity", [name], [f"next_{number}"]))
        outputs.append(_renamed(types[name], f"next_{number}"))
    inputs = [_renamed(types[name], renamed[name]) for name in taken] or [graph.input[0]]
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        copies.append(copy)
    used = {name for node in copies for name in node.input}
    found = helper.make_graph(
        copies, graph.name or "stage", inputs, outputs, [one for one in graph.initializer if one.name in used]
    )
    cut = helper.make_model(found, opset_imports=model.opset_import, ir_version=model.ir_version)
    return StageGraph(
        model=cut, inputs=tuple(one.name for one in inputs), outputs=tuple(one.name for one in outputs),
        continues=bool(taken),
    )  # fmt: skip


def _is_batch(value: onnx.ValueInfoProto | None) -> bool:
    """Whether it is a tensor of floating-point numbers with a row for every image."""
    kind = value.type.tensor_type if value is not None else None
    if kind is None or kind.elem_type not in _FLOATS or not kind.shape.dim:
        return False
    return not kind.shape.dim[0].HasField("dim_value")


def _renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    copy.metadata_props.clear()
    return copy

"""A cascade of two stages as one ONNX graph, for one image at a time: confidence and `If` are part of the graph.

    images (1, C, H, W) → logits (1, classes), exit (1,): 0 where the first stage has answered, else 1

Weights lie where the engines' do. For batches this is no form: an `If` decides once for all images. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import UsageError, VerificationError
from klas_zoo.exporters.cascade_graphs import StageGraph, cascade_graphs
from klas_zoo.exporters.cascade_runner import CascadeRunner
from klas_zoo.exporters.cascade_session import contents
from klas_zoo.exporters.package import Package
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.runtimes.ort import OnnxGraph

_PREFIX = "next/"
"""Of names of the second stage: both stages may use the same ones."""


def one_graph(cascade: Cascade, engines: Mapping[str, bytes]) -> onnx.ModelProto:
    """The graph of a cascade of two stages, cut out of the engines of its routes.

    Raises:
        UsageError: it has more stages.
        ExportError: as `cascade_graphs`.
    """
    if len(cascade.stages) != 2:
        raise UsageError(f"{cascade} has {len(cascade.stages)} stages: one graph with If is made of two.")
    first, second = cascade_graphs(cascade, engines)
    graph = first.model.graph
    logits, images = graph.output[0], graph.input[0]
    features = dict(zip(second.inputs, first.outputs[1:] if second.continues else (images.name,), strict=True))
    renamed = _second(second, features)
    dims = [one.dim_value for one in logits.type.tensor_type.shape.dim]
    nodes = [*graph.node, *_confidence(cascade, logits.name, dims[-1])]
    answer = helper.make_tensor_value_info("answer", logits.type.tensor_type.elem_type, [1, dims[-1]])
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [1])
    sure = helper.make_graph(
        [helper.make_node("Identity", [logits.name], ["answer"]), _constant("number", np.array([0]))],
        "sure", [], [answer, number],
    )  # fmt: skip
    unsure = helper.make_graph(
        [
            *renamed, helper.make_node("Identity", [_PREFIX + second.outputs[0]], ["answer"]),
            _constant("number", np.array([1])),
        ],
        "unsure", [], [answer, number],
    )  # fmt: skip
    nodes.append(helper.make_node("If", ["is_sure"], ["cascade_logits", "exit"], then_branch=sure, else_branch=unsure))
    outputs = [_renamed(answer, "cascade_logits"), _renamed(number, "exit")]
    own = [_renamed(one, _PREFIX + one.name) for one in second.model.graph.initializer]
    image = _renamed(images, images.name)
    image.type.tensor_type.shape.dim[0].dim_value = 1
    whole = helper.make_graph(nodes, "cascade", [image], outputs, [*graph.initializer, *own])
    return helper.make_model(whole, opset_imports=first.model.opset_import, ir_version=first.model.ir_version)


def refuse_unlike(package: Package) -> None:
    """Refuses a package whose graphs cannot be parts of one graph, as those of networks from elsewhere may be.

    Raises:
        UsageError: they use several opsets, or have functions or bodies of branches.
    """
    opsets: dict[tuple[tuple[str, int], ...], str] = {}
    for route in package.routes:
        model = onnx.load(str(package.engine(route)), load_external_data=False)
        opsets.setdefault(tuple(sorted((one.domain, one.version) for one in model.opset_import)), route.name)
        bodies = any(one.HasField("g") or one.graphs for node in model.graph.node for one in node.attribute)
        if model.functions or bodies:
            raise UsageError(f"{route.name} has functions or branches: --graphs takes graphs without.")
    if len(opsets) > 1:
        first, other, *_ = opsets.values()
        raise UsageError(f"{first} and {other} use other opsets of ONNX: --graphs takes graphs of one.")


def write_one_graph(package: Package, cascade: Cascade, folder: Path, name: str, threads: int | None = None) -> Path:
    """Writes the graph into a folder that holds the package's weights, and compares it with the cascade's stages.

    The graph has to give the same answers by the same exits on the package's references; another exit is allowed where
    the confidence lies within rounding of the threshold.

    Raises:
        VerificationError: it does not.
        UsageError, ExportError: as `one_graph`.
    """
    engines = contents(package, cascade)
    content = one_graph(cascade, engines).SerializeToString(deterministic=True)
    graph = OnnxGraph(content, folder, provider=CPU_PROVIDER, threads=threads)
    runner = CascadeRunner(cascade, engines, package.folder, threads=threads)
    stage = cascade.stages[0]
    for number, image in enumerate(package.references().images):
        logits, exits = graph.run([image[None]])
        expected, wanted = runner.run(image[None])
        if exits[0] != wanted[0]:
            sure = confidence(runner.path(image[None], 1), cascade.measure, stage.temperature)[0]
            if abs(sure - (stage.threshold or 0.0)) < 1e-5:
                continue
            raise VerificationError(f"The graph of {cascade} takes another exit than its stages on image {number}.")
        if not np.allclose(logits, expected, rtol=1e-4, atol=1e-4):
            raise VerificationError(f"The graph of {cascade} answers otherwise than its stages on image {number}.")
    (folder / name).write_bytes(content)
    return folder / name


def _second(second: StageGraph, features: Mapping[str, str]) -> list[onnx.NodeProto]:
    """The nodes of the second stage under names of their own, reading what the first one has left."""

    def name_of(name: str) -> str:
        return features.get(name) or (_PREFIX + name if name else "")

    nodes = []
    for node in second.model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = _PREFIX + node.name if node.name else ""
        copy.input[:] = [name_of(one) for one in node.input]
        copy.output[:] = [_PREFIX + one if one else "" for one in node.output]
        nodes.append(copy)
    return nodes


def _confidence(cascade: Cascade, logits: str, classes: int) -> list[onnx.NodeProto]:
    """Nodes that compute `is_sure`, a scalar, as `klas_zoo.cascades.calibration.confidence` does."""
    stage = cascade.stages[0]
    constants = {"T": np.float32(stage.temperature), "threshold": np.float32(stage.threshold), "one": np.float32(1),
                 "axes": np.array([1]), "two": np.array([2]), "scalar": np.array([], np.int64),
                 "tiny": np.finfo(np.float32).tiny, "most": np.float32(math.log(max(2, classes)))}  # fmt: skip
    nodes = [_constant(f"confidence/{name}", np.asarray(value)) for name, value in constants.items()]

    def add(kind: str, inputs: str, output: str, **attributes: Any) -> None:
        named = [f"confidence/{one}" if one != logits else one for one in inputs.split(" ")]
        outputs = [f"confidence/{one}" for one in output.split(" ")]
        nodes.append(helper.make_node(kind, named, outputs, **attributes))

    add("Cast", logits, "logits", to=TensorProto.FLOAT)
    add("Div", "logits T", "scaled")
    add("Softmax", "scaled", "shares", axis=1)
    if cascade.measure == "probability":
        add("ReduceMax", "shares axes", "found", keepdims=0)
    elif cascade.measure == "margin":
        add("TopK", "shares two", "largest places", axis=1)
        add("Split", "largest", "top second", axis=1, num_outputs=2)
        add("Sub", "top second", "found")
    else:
        add("Max", "shares tiny", "positive")
        add("Log", "positive", "logs")
        add("Mul", "shares logs", "parts")
        add("ReduceSum", "parts axes", "sum", keepdims=0)
        add("Div", "sum most", "negative")
        add("Add", "one negative", "found")
    add("Reshape", "found scalar", "value")
    nodes.append(helper.make_node("GreaterOrEqual", ["confidence/value", "confidence/threshold"], ["is_sure"]))
    return nodes


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def _renamed(value: Any, name: str) -> Any:
    copy = type(value)()
    copy.CopyFrom(value)
    copy.name = name
    return copy

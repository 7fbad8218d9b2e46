"""Small image classifiers as ONNX files, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE, CLASSES = (3, 8, 8), 3


def classifier(
    *,
    input_type: int = TensorProto.FLOAT,
    input_shape: tuple[Any, ...] = ("batch", *SHAPE),
    classes: int = CLASSES,
    more_inputs: int = 0,
    more_outputs: int = 0,
    domain: str = "",
    relu: str = "Relu",
    seed: int = 0,
) -> onnx.ModelProto:
    """Convolution, ReLU, mean over positions, linear layer: (B, 3, 8, 8) → (B, classes)."""
    draw = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(draw.standard_normal(shape, dtype=np.float32), name)

    first = "images"
    nodes = []
    if input_type != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT))
        first = "floats"
    nodes += [
        helper.make_node("Conv", [first, "kernel", "offset"], ["maps"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node(relu, ["maps"], ["active"], domain=domain),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["features"]),
        helper.make_node("Gemm", ["features", "matrix", "bias"], ["logits"], transB=1),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [input_shape[0], classes])]
    for number in range(more_outputs):
        nodes.append(helper.make_node("Identity", ["features"], [f"more{number}"]))
        outputs.append(helper.make_tensor_value_info(f"more{number}", TensorProto.FLOAT, [input_shape[0], 16]))
    inputs = [helper.make_tensor_value_info("images", input_type, list(input_shape))]
    for number in range(more_inputs):
        inputs.append(helper.make_tensor_value_info(f"other{number}", TensorProto.FLOAT, [1]))
        nodes.append(helper.make_node("Identity", [f"other{number}"], [f"unused{number}"]))
    graph = helper.make_graph(
        nodes, "classifier", inputs, outputs,
        [weights("kernel", 16, 3, 3, 3), weights("offset", 16), weights("matrix", classes, 16),
         weights("bias", classes)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def write(path: Path, **changes: Any) -> Path:
    """Writes a classifier, weights included."""
    onnx.save(classifier(**changes), path)
    return path


def logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """What the classifier computes, in numpy alone."""
    kernel, offset, matrix, bias = (numpy_helper.to_array(one).astype(np.float64) for one in model.graph.initializer)
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    maps = np.einsum("bchwij,ocij->bohw", windows, kernel) + offset[:, None, None]
    return np.maximum(maps, 0).mean(axis=(2, 3)) @ matrix.T + bias

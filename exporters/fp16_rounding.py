"""What an fp16 graph computes where every operator rounds to fp16, as on a GPU, found on a CPU.

onnxruntime's CPU kernels compute fp16 operators in fp32 and leave out the casts in between: what overflows fp16 on
a GPU is finite there, and what rounding spoils is exact. So an fp16 graph is rewritten: every operator computes in
fp32, and whatever it gives goes through a pair of casts to fp16 and back, which onnxruntime keeps. That is one
rounding for each operator, with sums in fp32, as matrix units of GPUs have it; beyond 65,504 a number becomes
infinite. Attention is written out, so that its products are rounded too, as in GPU kernels that are not fused.

Beside the logits, the largest magnitude of every fp16 tensor is measured, before it is rounded. It has to stay
`MARGIN` times below `LARGEST`, since other images and other kernels may go further. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from klas_zoo.errors import CannotRunHere
from klas_zoo.exporters.contract import Artifact, OpenedEngine, stage
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.limits import VerificationLimits
from klas_zoo.exporters.records import RESIDUAL_NOTE, Verification, explain
from klas_zoo.exporters.trt_graph import write_out_attention
from klas_zoo.exporters.verification import compare
from klas_zoo.runtimes import open_engine

LARGEST = 60_000
"""The largest magnitude of an fp16 tensor that is still safe; fp16 ends at 65,504."""
MARGIN = 4
"""How far below `LARGEST` the largest magnitude that was measured has to stay."""
IMAGES = 32
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
_EXACT = {
    "Abs", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Max", "MaxPool", "Min",
    "Neg", "Pad", "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    "Where",
}  # fmt: skip
"""Operators that give numbers they were given, so that nothing is rounded."""
_TYPES = ("to", "dtype", "softmax_precision")  # attributes that name a type


@dataclass(frozen=True, kw_only=True)
class RoundedRun:
    """A route's fp16 graph with every operator rounded to fp16, compared with torch on a few images.

    Attributes:
        largest: magnitude of any fp16 tensor, and in `tensor` the name of that one.
        fp32_residual: whether the graph keeps its residual stream in fp32.
    """

    verification: Verification
    largest: float
    tensor: str
    fp32_residual: bool = False

    @property
    def passed(self) -> bool:
        return self.verification.passed and self.largest * MARGIN <= LARGEST

    @property
    def reason(self) -> str:
        """Why it did not pass: one sentence."""
        if self.largest * MARGIN > LARGEST:
            return (
                f"In fp16 {self.tensor} reaches {self.largest:,.0f} on {self.verification.images} images; at most "
                f"{LARGEST // MARGIN:,} may be, a {MARGIN}th of where fp16 ends: use bf16 or fp32."
            )
        return f"Rounded to fp16 after every operator: {explain(self.verification)}"


def rounded_run(
    artifact: Artifact, reference: ReferenceLogits, limits: VerificationLimits, *, threads: int | None = None
) -> RoundedRun:
    """Runs an fp16 engine on at most `IMAGES` of the reference's images, as a GPU would round it.

    Args:
        artifact: an ONNX file, its weights in place.

    Raises:
        ExportError: the rewritten graph cannot be loaded.
        VerificationError: it does not run.
    """
    few = _spread(reference, artifact.route)
    found, largest, names = _run(artifact, few, limits, threads, rounding=True)
    worst = int(np.argmax(largest))
    return RoundedRun(
        verification=found, largest=float(largest[worst]), tensor=names[worst],
        fp32_residual=residual_is_fp32(artifact.path),
    )  # fmt: skip


def confirm_fp16(
    artifact: Artifact, threads: int | None, known: RoundedRun | None,
    found: Verification, reference: ReferenceLogits, limits: VerificationLimits,
) -> Verification:  # fmt: skip
    """`OpenedEngine.confirm` of an fp16 engine on a CPU; `known` where it was run with rounding before.

    Raises:
        CannotRunHere: as a GPU rounds, it misses its limits or comes near the end of fp16.
    """
    run = known or rounded_run(artifact, reference, limits, threads=threads)
    if not run.passed:
        raise CannotRunHere(run.reason)
    return replace(
        found, rounded_images=run.verification.images, rounded_difference=run.verification.max_abs_difference,
        largest_fp16=run.largest, residual="fp32" if run.fp32_residual else None,
    )  # fmt: skip


def magnitudes(
    artifact: Artifact, reference: ReferenceLogits, limits: VerificationLimits, *, threads: int | None = None
) -> Mapping[str, float]:
    """The largest magnitude of every fp16 tensor where nothing is rounded, and so nothing overflows.

    A tensor that was cast to fp16 goes by its name before the cast.
    """
    _, largest, names = _run(artifact, _spread(reference, artifact.route), limits, threads, rounding=False)
    found: dict[str, float] = {}
    for name, value in zip(names, largest, strict=True):
        found[name] = max(float(value), found.get(name, 0.0))
    return found


def residual_is_fp32(graph: Path) -> bool:
    """Whether a graph says that its residual stream was kept in fp32."""
    model = onnx.load(str(graph), load_external_data=False)
    return any((one.key, one.value) == RESIDUAL_NOTE for one in model.metadata_props)


def _spread(reference: ReferenceLogits, name: str) -> ReferenceLogits:
    images = reference.images
    count = min(IMAGES, len(images))
    chosen = [number * len(images) // count for number in range(count)]
    some = np.concatenate([images.read(one, one + 1) for one in chosen])
    return ReferenceLogits.of_arrays(some, {name: reference.logits[name][chosen]})


def _run(
    artifact: Artifact, reference: ReferenceLogits, limits: VerificationLimits, threads: int | None, *, rounding: bool
) -> tuple[Verification, np.ndarray, list[str]]:  # fmt: skip
    with stage("rewrite for fp16 rounding", artifact.route):
        rewritten = _Rewritten(artifact.path, rounding)
    folder = str(artifact.path.parent.absolute())
    session = open_engine(
        rewritten.model.SerializeToString(),
        threads=threads,
        options={"session.model_external_initializers_file_folder_path": folder},
    )
    classes = reference.logits[artifact.route].shape[1]
    largest = np.zeros(len(rewritten.names), np.float32)

    def outputs(images: np.ndarray) -> np.ndarray:
        both = session.run(images)
        np.maximum(largest, np.nan_to_num(both[0, classes:], nan=np.inf), out=largest)
        return both[:, :classes]

    sizes = () if session.largest_batch is None else (session.largest_batch,)
    with session:
        found = compare(artifact.route, OpenedEngine(outputs=outputs, batch_sizes=sizes), reference, limits)
    return found, largest, rewritten.names


class _Rewritten:
    """An fp16 graph in fp32, with its roundings; `names` are the tensors whose magnitudes follow the logits."""

    def __init__(self, path: Path, rounding: bool) -> None:
        self.rounding = rounding
        self.model = onnx.load(str(path), load_external_data=False)
        write_out_attention(self.model)
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        self.types = {one.name: one.type.tensor_type.elem_type for one in values}
        self.names: list[str] = []
        self._measured: list[str] = []
        graph = self.model.graph
        renamed = {one.name: f"{one.name}:fp32" for one in graph.initializer if one.data_type == HALF}
        nodes = [helper.make_node("Cast", [old], [new], to=FLOAT) for old, new in renamed.items()]
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            nodes += self._wide(node)
        nodes += self._largest(graph)
        del graph.node[:]
        graph.node.extend(nodes)
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == HALF:
                value.type.tensor_type.elem_type = FLOAT

    def _wide(self, node: NodeProto) -> Iterator[NodeProto]:
        """A node in fp32, followed by the rounding of what was fp16."""
        half = [name for name in node.output if self.types.get(name) == HALF]
        cast = node.op_type == "Cast"
        source = node.input[0] if cast else ""
        _widen_attributes(node)
        if not half or node.op_type in _EXACT or node.op_type == "Constant":
            yield node
            return
        for index, name in enumerate(node.output):
            if name in half:
                node.output[index] = f"{name}:wide"
        yield node
        for name in half:
            self.names.append(source or name)
            self._measured.append(f"{name}:wide")
            if self.rounding:
                yield helper.make_node("Cast", [f"{name}:wide"], [f"{name}:half"], to=HALF)
                yield helper.make_node("Cast", [f"{name}:half"], [name], to=FLOAT)
            else:
                yield helper.make_node("Identity", [f"{name}:wide"], [name])

    def _largest(self, graph: onnx.GraphProto) -> Iterator[NodeProto]:
        """The logits (B, classes) become (B, classes + magnitudes), the same magnitudes in every row."""
        one = numpy_helper.from_array(np.array([1], np.int64), "one")
        batch_and_one = numpy_helper.from_array(np.array([1, -1], np.int64), "row")
        graph.initializer.extend([one, batch_and_one])
        for name in self._measured:
            yield helper.make_node("Abs", [name], [f"{name}:abs"])
            yield helper.make_node("ReduceMax", [f"{name}:abs"], [f"{name}:max"], keepdims=0)
            yield helper.make_node("Reshape", [f"{name}:max", "one"], [f"{name}:largest"])
        logits = graph.output[0].name
        yield helper.make_node("Concat", [f"{name}:largest" for name in self._measured], ["all:largest"], axis=0)
        yield helper.make_node("Reshape", ["all:largest", "row"], ["row:largest"])
        yield helper.make_node("Shape", [logits], ["batch"], start=0, end=1)
        yield helper.make_node("Concat", ["batch", "one"], ["rows"], axis=0)
        yield helper.make_node("Expand", ["row:largest", "rows"], ["rows:largest"])
        yield helper.make_node("Concat", [logits, "rows:largest"], ["both"], axis=1)
        graph.output[0].name = "both"
        dims = graph.output[0].type.tensor_type.shape.dim
        dims[1].dim_value += len(self._measured)


def _widen_attributes(node: NodeProto) -> None:
    """What a node says of types itself."""
    for attribute in node.attribute:
        if attribute.name in _TYPES and attribute.i == HALF:
            attribute.i = FLOAT
        if attribute.name == "value" and attribute.t.data_type == HALF:
            wide = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))

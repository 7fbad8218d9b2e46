"""Graphs in fp16 or bf16, with what such numbers are too coarse for kept in fp32.

Kept are norms, softmax and other sums over many numbers, and everything from the last matrix product to the
logits. A kept operator reads and writes fp32, with casts around it, so that the graph says by its types
alone what is computed how: strongly typed runtimes (TensorRT) need no flags, and onnxruntime runs it as it
is. Attention of opset 23 is one operator; it is told to take its softmax in fp32 by its own attribute.

Some networks need more: where the sum of all branches grows beyond fp16 or branches are too small for its steps, the
residual stream is kept too (`Half.wide_residual`). `klas_zoo.exporters.fp16_graphs` finds out which do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from klas_zoo.exporters.records import RESIDUAL_NOTE

FULL = ir.DataType.FLOAT
_KEPT = {
    "BatchNormalization", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log",
    "LpNormalization", "Pow", "RMSNormalization", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "Softmax",
    "Sqrt",
}  # fmt: skip
_PRODUCTS = {"Conv", "Gemm", "MatMul"}
_CARRIERS = {
    "Add", "Concat", "Expand", "Gather", "Identity", "Mul", "Pad", "Relu", "Reshape", "Slice", "Squeeze", "Sum",
    "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that hand on what becomes part of a residual stream, or scale it."""
_STEPS = {ir.DataType.FLOAT16: 2**-10, ir.DataType.BFLOAT16: 2**-7}  # relative


class Half:
    """Turns fp32 graphs into those of a narrower type. Weights that graphs share are the same tensors again."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        # by id; the tensors are kept, or another could get theirs
        self._narrow: dict[int, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
        self._too_coarse: dict[int, tuple[ir.TensorProtocol, bool]] = {}

    def __call__(self, model: ir.Model, name: str) -> ir.Model:
        """The same graph, changed in place; its input and its output stay fp32."""
        _Conversion(model.graph, self.dtype, self.narrowed).run()
        return model

    def wide_residual(self, beyond: Collection[str] = ()) -> Callable[[ir.Model, str], ir.Model]:
        """The same with the residual stream in fp32: sums of two features, and the scales of what is added to it.

        So are products with weights that the type is too coarse for, or too narrow.

        Args:
            beyond: names of values that go beyond the type; what gives or takes one computes in fp32, too.
        """

        def convert(model: ir.Model, name: str) -> ir.Model:
            kept, coarse = _residual(model.graph), self._coarse(model.graph)
            for node in model.graph:
                ends = [value for value in (*node.inputs, *node.outputs) if value is not None]
                if any(value in coarse or (value.name in beyond and not value.is_initializer()) for value in ends):
                    kept.add(node)
            _Conversion(model.graph, self.dtype, self.narrowed, kept, coarse).run()
            model.metadata_props.update([RESIDUAL_NOTE])
            return model

        return convert

    def _coarse(self, graph: ir.Graph) -> set[ir.Value]:
        """Weights that are too large or too small for the type: rounding costs them more than its relative step."""
        return {
            value
            for value in graph.initializers.values()
            if value.dtype == FULL and value.const_value is not None and self._is_coarse(value.const_value)
        }

    def _is_coarse(self, tensor: ir.TensorProtocol) -> bool:
        known = self._too_coarse.get(id(tensor))
        if known is None:
            wide = tensor.numpy().astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                off = np.linalg.norm(wide - tensor.numpy().astype(self.dtype.numpy()).astype(np.float64))
            known = self._too_coarse[id(tensor)] = tensor, not off <= _STEPS[self.dtype] * np.linalg.norm(wide)
        return known[1]

    def narrowed(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        known = self._narrow.get(id(tensor))
        if known is None:
            known = self._narrow[id(tensor)] = tensor, _lazily(tensor, self.dtype)
        return known[1]


def _residual(graph: ir.Graph) -> set[ir.Node]:
    """Additions of two values that depend on the image, and what leads to them from the last product, norm or such."""
    features = {graph.inputs[0]}
    sums: list[ir.Node] = []
    for node in graph:
        inputs = [value for value in node.inputs if value in features]
        if inputs:
            features.update(node.outputs)
        if node.op_type in ("Add", "Sum") and len(inputs) > 1:
            sums.append(node)
    found: set[ir.Node] = set()
    while sums:
        node = sums.pop()
        if node not in found:
            found.add(node)
            before = (value.producer() for value in node.inputs if value is not None)
            sums += [one for one in before if one is not None and one.op_type in _CARRIERS]
    return found


def _lazily(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """Rounded when it is asked for and not kept: one tensor at a time is in memory twice."""

    def rounded() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # becomes infinite, which no verification passes
            return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)

    return ir.LazyTensor(rounded, dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


class _Conversion:
    """One graph's. `native` says in which type each fp32 value of the graph is computed now."""

    def __init__(
        self, graph: ir.Graph, half: ir.DataType, narrowed: Callable[[ir.TensorProtocol], ir.TensorProtocol],
        kept: Collection[ir.Node] = (), wide: Collection[ir.Value] = (),
    ) -> None:  # fmt: skip
        self.graph, self.half, self.narrowed, self.kept, self.wide = graph, half, narrowed, kept, wide
        self.native: dict[ir.Value, ir.DataType] = {graph.inputs[0]: FULL}
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        kept = self._towards_the_logits().union(self.kept)
        for node in list(self.graph):
            floats = [value for value in node.outputs if value.dtype == FULL]
            wanted = FULL if node in kept or node.op_type in _KEPT else self.half
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype is not None and (value in self.native or value.dtype == FULL):
                    node.replace_input_with(index, self._in_type(value, wanted))
            if wanted == self.half:
                self._narrow_attributes(node)
            for value in floats:
                self.native[value] = wanted
                value.type = ir.TensorType(wanted)  # not its dtype: clones of a graph share the type
        self._drop_unused()

    def _towards_the_logits(self) -> set[ir.Node]:
        """The last matrix product and what follows it."""
        found: set[ir.Node] = set()
        pending = [self.graph.outputs[0].producer()]
        while pending:
            node = pending.pop()
            if node is not None and node not in found:
                found.add(node)
                if node.op_type not in _PRODUCTS:
                    pending += [value.producer() for value in node.inputs if value is not None]
        return found

    def _in_type(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """A value in another type: a cast of it, or a weight that is stored so."""
        weight = value.const_value if value.is_initializer() else None
        if weight is not None:
            # vectors of norms stay as they are; matrices are stored narrow whatever they are used in
            small = len(weight.shape) < 2
            stored = value if wanted == FULL and (small or value in self.wide) else self._stored(value, weight)
            return stored if stored.dtype == wanted else self._cast(stored, wanted)
        return value if self.native[value] == wanted else self._cast(value, wanted)

    def _stored(self, value: ir.Value, weight: ir.TensorProtocol) -> ir.Value:
        known = self.casts.get((value, self.half))
        if known is None:
            known = ir.Value(
                name=f"{value.name}_half", shape=value.shape, type=ir.TensorType(self.half),
                const_value=self.narrowed(weight),
            )  # fmt: skip
            self.graph.register_initializer(known)
            self.casts[value, self.half] = known
        return known

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        known = self.casts.get((value, wanted))
        if known is None:
            node = ir.node("Cast", [value], {"to": int(wanted)})
            known = node.outputs[0]
            known.name = f"{value.name}_{wanted.name.lower()}"
            known.shape, known.type = value.shape, ir.TensorType(wanted)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
            self.casts[value, wanted] = known
        return known

    def _narrow_attributes(self, node: ir.Node) -> None:
        """What a node says of types itself."""
        if node.op_type == "Cast" and node.attributes["to"].as_int() == int(FULL):
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(FULL))
        value = node.attributes.get("value")
        if value is not None and value.type == ir.AttributeType.TENSOR and value.as_tensor().dtype == FULL:
            node.attributes["value"] = ir.AttrTensor("value", self.narrowed(value.as_tensor()))

    def _drop_unused(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if not value.uses():
                del self.graph.initializers[name]

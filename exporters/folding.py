"""Norms that are affine at inference, folded into the products beside them: no BatchNormalization is left in a graph.

onnxscript folds one that follows a convolution or a Gemm. What it leaves is here: one that follows a product of
matrices with a reshape in between (LeViT's Linear and BatchNorm1d, on tokens), one in front of a linear head, and any
other, which becomes a multiplication and an addition. onnxruntime folds convolutions only, and its kernel for
BatchNormalization on (N, C) is up to 20 times as slow as the product beside it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

_EPSILON = 1e-5  # ONNX's default


def fold_norms(model: ir.Model) -> None:
    """Folds every BatchNormalization of a graph, in place."""
    if not any(node.op_type == "BatchNormalization" for node in model.graph):
        return
    rules = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    rewrite(model, pattern_rewrite_rules=rules)
    for name, value in list(model.graph.initializers.items()):
        if name in before and value.const_value is not before[name]:
            value.name = f"{name}_folded"  # it is not the network's own tensor of that name any more
    for node in list(model.graph):
        if node.op_type == "BatchNormalization":
            _Affine(model.graph, node).fold()
    passes.RemoveUnusedNodesPass()(model)


class _Affine:
    """One BatchNormalization as y = x · scale + shift, along axis 1."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        gamma, beta, mean, variance = (_numbers(value) for value in node.inputs[1:5])
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else _EPSILON
        # in double precision: the product of three roundings would be larger than that of the kernel
        scale = gamma.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        self.scale = scale.astype(np.float32)
        self.shift = (beta.astype(np.float64) - mean.astype(np.float64) * scale).astype(np.float32)
        self._name = node.name or node.outputs[0].name or "norm"

    def fold(self) -> None:
        source, target = self._node.inputs[0], self._node.outputs[0]
        assert source is not None
        linear = self._linear_before(source)
        if linear is not None:
            for node, index in linear:  # the product's matrix, and what is added to it
                own = node.inputs[index]
                assert own is not None
                node.replace_input_with(index, self._constant(f"{own.name}_{self._name}", _numbers(own) * self.scale))
            self._replaced(source)
            self._add_after(linear[0][0].outputs[0])  # what the reshapes, if any, read
        elif not self._into_head_behind(target):
            self._written_out(source)

    def _linear_before(self, value: ir.Value) -> list[tuple[ir.Node, int]] | None:
        """The nodes of a linear layer and which of their inputs is constant: those whose last axis is the channels.

        The last of them is the product by a matrix. Reshapes that keep the channels may be in between.
        """
        if value.shape is None or len(value.shape) != 2:  # axis 1 is then not the last one
            return None
        found: list[tuple[ir.Node, int]] = []
        while (node := value.producer()) is not None:
            if len(value.uses()) != 1 or value.is_graph_output():
                return None
            index = self._constant_input(node)
            if node.op_type == "MatMul":
                return [*found, (node, 1)] if index == 1 else None
            if node.op_type == "Add" and index is not None:
                found.append((node, index))
                following = node.inputs[1 - index]
            elif node.op_type == "Reshape":
                following = node.inputs[0]
            else:
                return None
            if following is None or following.shape is None or following.shape[-1] != len(self.scale):
                return None
            value = following
        return None

    def _constant_input(self, node: ir.Node) -> int | None:
        """Which of two inputs is constant and has as many columns as there are channels."""
        for index, one in enumerate(node.inputs[:2]):
            constant = None if one is None else one.const_value
            if constant is not None and tuple(constant.shape)[-1:] == (len(self.scale),):
                return index
        return None

    def _add_after(self, value: ir.Value) -> None:
        shift = self._constant(f"{self._name}_shift", self.shift)
        added = ir.node("Add", [value, shift])
        out = added.outputs[0]
        out.name, out.shape, out.type = f"{value.name}_{self._name}", value.shape, value.type
        ir.convenience.replace_all_uses_with(value, out)
        added.replace_input_with(0, value)
        producer = value.producer()
        assert producer is not None
        self._graph.insert_after(producer, added)

    def _into_head_behind(self, value: ir.Value) -> bool:
        """Into the Gemm that alone reads it: (x · s + t) Wᵀ + b = x (W · s)ᵀ + (W t + b)."""
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].idx != 0 or uses[0].node.op_type != "Gemm" or value.is_graph_output():
            return False
        gemm = uses[0].node
        known = {name: one.value for name, one in gemm.attributes.items()}
        constants = [one for one in gemm.inputs[1:] if one is not None]
        plain = not known.get("transA") and known.get("alpha", 1.0) == known.get("beta", 1.0) == 1.0
        if not plain or any(one.const_value is None for one in constants):
            return False
        weight = _numbers(constants[0])
        turned = weight.T if known.get("transB") else weight  # (in, out)
        bias = self.shift @ turned + (_numbers(constants[1]) if len(constants) > 1 else 0)
        scaled = turned * self.scale[:, None]
        scaled = np.ascontiguousarray(scaled.T if known.get("transB") else scaled)
        gemm.replace_input_with(1, self._constant(f"{constants[0].name}_{self._name}", scaled))
        shifted = self._constant(f"{gemm.outputs[0].name}_{self._name}_bias", bias.astype(np.float32))
        if len(gemm.inputs) > 2:
            gemm.replace_input_with(2, shifted)
        else:
            gemm.resize_inputs(3)
            gemm.replace_input_with(2, shifted)
        source = self._node.inputs[0]
        assert source is not None
        self._replaced(source)
        return True

    def _written_out(self, source: ir.Value) -> None:
        rank = 4 if source.shape is None else len(source.shape)
        form = (-1, *(1,) * (rank - 2))
        scaled = ir.node("Mul", [source, self._constant(f"{self._name}_scale", self.scale.reshape(form))])
        shifted = ir.node("Add", [scaled.outputs[0], self._constant(f"{self._name}_shift", self.shift.reshape(form))])
        target = self._node.outputs[0]
        for number, one in enumerate((scaled, shifted)):
            one.outputs[0].name = f"{self._name}_affine_{number}"
            one.outputs[0].shape, one.outputs[0].type = target.shape, target.type
        self._graph.insert_after(self._node, [scaled, shifted])
        self._replaced(shifted.outputs[0])

    def _replaced(self, value: ir.Value) -> ir.Value:
        """Has everything that read the norm read another value."""
        ir.convenience.replace_all_uses_with(self._node.outputs[0], value, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)
        return value

    def _constant(self, name: str, numbers: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(numbers, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _numbers(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    found: np.ndarray = value.const_value.numpy()
    return found

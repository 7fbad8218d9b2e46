"""Networks and routes as ONNX files.

Translating is what takes time: 5 s of processor time for a network of eight blocks. So a
supernet is translated once, every chain and stitching layer in one graph, and a route is cut
out of a copy in 0.1 s: what reads the target's features at a seam is made to read the stitching
layer instead, the last anchor's logits become the only output, and what nothing reads is dropped.

Graphs are written for as many readers as possible (`exporters.opset`): in opset 18 with attention as products and a
softmax, unless attention is asked for as the one operator of opset 23; norms that are affine are folded into products.
onnxruntime 1.24 ran that operator on the CPU whatever the provider (its issue 28025); 1.31 has it for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import optimize
from torch import Tensor, nn

from klas_zoo.chains import Shape, evaluating
from klas_zoo.errors import ExportError
from klas_zoo.exporters.capturing import BATCH, capture
from klas_zoo.exporters.contract import stage
from klas_zoo.exporters.folding import fold_norms
from klas_zoo.exporters.opset import PORTABLE, settle_opset
from klas_zoo.files import replacing
from klas_zoo.route_tensors import graph_name
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

Convert = Callable[[ir.Model, str], ir.Model]
"""The graph of a route, which it may change, and the route's name → the graph to be written."""
INPUT, OUTPUT = "images", "logits"
MOST_BYTES = 2**31 - 1  # of one protobuf message


def export(
    module: nn.Module, input_shape: Shape, path: Path, *, metadata: Mapping[str, str], opset: int = PORTABLE
) -> None:
    """Writes a network as one ONNX file that takes batches of any size.

    The same weights give the same bytes.

    Args:
        module: images (B, C, H, W) → logits (B, classes).
        input_shape: (C, H, W) of one image.
        metadata: written into the file, for programs that read it.
        opset: the newest whose operators may be used; the file is in the oldest that has them.

    Raises:
        ExportError: names the stage that failed: capture, translate, check, or the file's size.
        OSError: the file cannot be written.
    """
    _write(_translate(module, input_shape, [OUTPUT], path.name, opset), path, metadata)


class RouteExporter:
    """Writes routes of one supernet, whose weights must not change any more.

    Args:
        supernet: its anchors and stitching layers are translated here, once.
        input_shape: (C, H, W) of one image.
        convert: turns the graph of a route and its name into the graph to be written, as in another precision;
            may change the graph in place. Default: as it is.
        routes: those of the supernet that will be asked for. Default: all.
        opset: the newest whose operators may be used.

    Raises:
        ExportError: as `export`.
    """

    def __init__(
        self,
        supernet: Supernet,
        input_shape: Shape,
        convert: Convert = lambda model, name: model,
        routes: Iterable[Route] | None = None,
        opset: int = PORTABLE,
    ) -> None:
        self.opset = opset
        self._supernet, self._input_shape, self._convert = supernet, input_shape, convert
        everything = _Everything(supernet, supernet.routes if routes is None else routes)
        self._model = _translate(everything, input_shape, everything.names, "the supernet", opset)
        # by the name of a weight: its transposed forms in the graph, and their axes
        self._turned: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, value in self._model.graph.initializers.items():
            if isinstance(value.const_value, _Turned):
                self._turned.setdefault(value.const_value.source, {})[name] = value.const_value.axes

    def export(self, route: Route, path: Path, *, metadata: Mapping[str, str]) -> None:
        """Writes a route as `export` would.

        Raises:
            ExportError: names the stage that failed.
            OSError: the file cannot be written.
        """
        _write(self.model(route), path, metadata)

    def model(self, route: Route, convert: Convert | None = None) -> ir.Model:
        """A route as a graph of its own, whose weights are those of the supernet and of every other route.

        Args:
            convert: as for the exporter, for this graph.

        Raises:
            ExportError: names the stage that failed.
        """
        convert = convert or self._convert
        own = self._own_tensors(route)
        if own is None or len({segment.anchor for segment in route.segments}) < len(route.segments):
            # the shared graph has not the route's own operators, and no anchor at two places of one route
            network = self._supernet.network(route)
            model = _translate(network, self._input_shape, [OUTPUT], str(route), self.opset)
            return convert(model, str(route))
        model = self._model.clone()
        values = ir.convenience.create_value_mapping(model.graph)
        model.graph.outputs[:] = [values[_logits(route.segments[-1].anchor)]]
        for seam in route.seams:
            features = values[_features(seam.target, seam.j)]
            ir.convenience.replace_all_uses_with(features, values[str(seam)])
        passes.RemoveUnusedNodesPass()(model)
        model.graph.sort()
        for name, tensor in own.items():
            model.graph.initializers[name].const_value = ir.tensor(tensor.detach().cpu().numpy(), name=name)
        return convert(model, str(route))

    def _own_tensors(self, route: Route) -> dict[str, Tensor] | None:
        """A route's own tensors by the names of the shared ones in the graph; None where they are no such tensors.

        All weights of an anchor that runs with those from before tuning are its own.
        """
        chain = f"anchor_{route.segments[-1].anchor}"
        tensors: Mapping[str, Tensor] = {}
        if route.is_anchor and chain in self._supernet.originals:
            tensors = self._supernet.originals[chain].state_dict()
        elif (found := self._supernet.own_tensors(route)) is not None:
            tensors = {graph_name(name): tensor for name, tensor in found.values.items()}
        initializers, named = self._model.graph.initializers, dict[str, Tensor]()
        for name, tensor in tensors.items():
            shared = f"supernet.chains.{chain}.{name}"
            places = {shared: tensor} if shared in initializers else {}
            places |= {turned: tensor.permute(*axes) for turned, axes in self._turned.get(shared, {}).items()}
            if not places:
                return None  # the graph holds what was computed from it
            named |= places
        return named


class _Everything(nn.Module):
    """All chains and stitching layers of some routes at once: (B, C, H, W) → tensors called `names`.

    They are the logits of every anchor, the features in front of which a stitching layer can sit,
    and the output of every stitching layer.
    """

    def __init__(self, supernet: Supernet, routes: Iterable[Route]) -> None:
        super().__init__()
        self.supernet = supernet
        wanted = tuple(routes)
        self.anchors = sorted({segment.anchor for route in wanted for segment in route.segments})
        self.seams = sorted({seam for route in wanted for seam in route.seams})
        features = sorted({(seam.target, seam.j) for seam in self.seams})
        self.names = [
            *map(_logits, self.anchors),
            *(_features(*position) for position in features),
            *map(str, self.seams),
        ]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        for anchor in self.anchors:
            chain = self.supernet.chain(anchor)
            for position, features in enumerate(chain.walk(images)):
                found[_features(anchor, position)] = features
            found[_logits(anchor)] = chain.head(features)
        for seam in self.seams:
            found[str(seam)] = self.supernet.stitch(seam)(found[_features(seam.source, seam.i)])
        return tuple(found[name] for name in self.names)


# torch calls its own values by Python identifiers, which these can never be
def _features(anchor: str, position: int) -> str:
    return f"{anchor}:{position}"


def _logits(anchor: str) -> str:
    return f"{anchor}:{OUTPUT}"


def _translate(module: nn.Module, input_shape: Shape, outputs: Sequence[str], what: str, opset: int) -> ir.Model:
    """A network as an ONNX graph, optimised, with nothing in it but what computes."""
    with evaluating(module), torch.no_grad():
        with stage("capture", what):
            program = capture(module, input_shape, opset)
        with stage("translate", what):
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=outputs,
                optimize=False,
                verbose=False,
            )
    assert translated is not None
    model = translated.model
    weights = list(model.graph.initializers.values())
    with stage("optimise", what):
        _transpose_weights(model)
        optimize(model)
        fold_norms(model)
    first, model = model, model.clone()
    # modules of torch and onnxscript remember parts of what they translated, and with them all weights
    for value in (*weights, *first.graph.initializers.values()):
        value.const_value = None
    # stack traces and module names of every node: ten times the graph itself
    passes.ClearMetadataAndDocStringPass()(model)
    return model


def _transpose_weights(model: ir.Model) -> None:
    """Takes the place of every Transpose of a weight by the transposed weight, which is computed when it is written.

    The optimiser would do it at once, and hold a second copy of nearly all weights.
    """
    for node in list(model.graph):
        weight = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if weight is None or "perm" not in node.attributes:
            continue
        source = str(node.inputs[0].name)  # type: ignore[union-attr]
        turned = _Turned(source, weight, tuple(node.attributes["perm"].as_ints()))
        name = f"{source}_transposed_{node.outputs[0].name}"
        value = ir.Value(name=name, shape=turned.shape, type=ir.TensorType(turned.dtype), const_value=turned)
        model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        model.graph.remove(node, safe=True)
    passes.RemoveUnusedNodesPass()(model)


class _Turned(ir.LazyTensor):
    """A weight with its axes in another order.

    Attributes:
        source: the weight's name in the graph.
        axes: axis k of this one is axis `axes[k]` of the weight.
    """

    def __init__(self, source: str, weight: ir.TensorProtocol, axes: tuple[int, ...]) -> None:
        def turn() -> ir.TensorProtocol:
            return ir.Tensor(np.ascontiguousarray(weight.numpy().transpose(axes)), dtype=weight.dtype)

        super().__init__(turn, weight.dtype, ir.Shape([weight.shape.numpy()[axis] for axis in axes]))
        self.source, self.axes = source, axes


def finish(model: ir.Model, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """A graph as it is written: its own names and shapes at both ends, and nothing in between that follows."""
    graph = model.graph
    graph.outputs[0].name = OUTPUT
    for value in (graph.inputs[0], graph.outputs[0]):
        assert value.shape is not None
        value.shape = ir.Shape([BATCH, *value.shape[1:]])
        value.metadata_props.clear()
    model.metadata_props.update(sorted(metadata.items()))
    proto = ir.to_proto(model)
    # shapes in between: every reader infers them again
    del proto.graph.value_info[:]
    settle_opset(proto)
    return proto


def _write(model: ir.Model, path: Path, metadata: Mapping[str, str]) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > MOST_BYTES:
        raise ExportError(
            f"Cannot export {path.name}: its weights take {size / 1e9:.1f} GB, and one ONNX file holds at "
            f"most {MOST_BYTES / 1e9:.1f} GB."
        )
    proto = finish(model, metadata)
    with stage("check", path.name):
        onnx.checker.check_model(proto, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))

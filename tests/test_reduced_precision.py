"""Graphs in narrow types: the same function but for rounding, with norms, softmax and logits in fp32."""

from __future__ import annotations

import numpy as np
import onnx
import packages
import pytest
from onnx import TensorProto

from klas_zoo.exporters.package import Package

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=sorted(TYPES))
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("half") / request.param, precision=request.param)


def inferred(package: Package, name: str) -> onnx.ModelProto:
    """A graph with the type of every value."""
    model = onnx.load(str(package.folder / f"{name}.onnx"))
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def types(model: onnx.ModelProto) -> dict[str, int]:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


@pytest.mark.parametrize("route", list(map(str, packages.ROUTES)))
def test_products_are_narrow_and_what_is_sensitive_is_not(package: Package, route: str) -> None:
    half = TYPES[package.manifest.precision]
    model = inferred(package, route)
    of = types(model)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    for node in products[:-1]:
        assert {of[name] for name in node.input} == {half}, node.name
    assert {of[name] for name in (*products[-1].input, *products[-1].output)} == {TensorProto.FLOAT}
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    blocks = sum(segment.last - segment.first + 1 for segment in package.route(route).route.segments)
    assert len(norms) == 2 * blocks + 1
    assert {of[name] for node in norms for name in (*node.input, node.output[0])} == {TensorProto.FLOAT}
    for node in model.graph.node:
        if node.op_type == "Attention":
            said = {attribute.name: attribute.i for attribute in node.attribute}
            assert said["softmax_precision"] == TensorProto.FLOAT
    assert [of[value.name] for value in (*model.graph.input, *model.graph.output)] == [TensorProto.FLOAT] * 2


def test_matrices_are_stored_narrow_and_shared_between_routes(package: Package) -> None:
    places = {}
    for route in map(str, packages.ROUTES):
        tensors = onnx.load(str(package.folder / f"{route}.onnx"), load_external_data=False).graph.initializer
        assert all(len(t.dims) < 2 or t.data_type != TensorProto.FLOAT for t in tensors)
        places[route] = {entry.value for t in tensors for entry in t.external_data if entry.key == "offset"}
    stitch, wide = str(packages.STITCH), str(packages.WIDE)
    assert len(places[stitch] & places[wide]) >= 8  # blocks 2 and 3 of wide


def test_what_narrow_types_compute_is_near_fp32(package: Package) -> None:
    for one in package.routes:
        if package.manifest.precision == "bf16":
            assert one.status == "built, not run"
            continue
        assert one.verification is not None
        assert 1e-6 < one.verification.max_abs_difference <= one.verification.tolerance
        assert one.verification.top1_agreement == 1.0


def test_onnx_s_own_evaluator_agrees(package: Package) -> None:
    """The graphs as the standard defines them, which is all there is for bf16 without a GPU."""
    from onnx.reference import ReferenceEvaluator

    references = package.references()
    evaluator = ReferenceEvaluator(onnx.load(str(package.folder / f"{packages.STITCH}.onnx")))
    (found,) = evaluator.run(None, {"images": references.images[:2]})
    wanted = references.logits[str(packages.STITCH)][:2]
    spread = references.logits[str(packages.STITCH)].std()
    limit = {"fp16": 0.02, "bf16": 0.2}[package.manifest.precision]
    assert np.abs(found - wanted).max() <= limit * spread

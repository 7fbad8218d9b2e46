"""Graphs in int8: what is quantised, what stays, and weights that no processor overflows on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import packages
import pytest
import torch
from onnx import numpy_helper

from klas_zoo.exporters import int8
from klas_zoo.exporters.package import Package

ROUTES = list(map(str, packages.ROUTES))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("int8") / "package", precision="int8")


@pytest.mark.parametrize("route", ROUTES)
def test_products_read_int8_but_the_last(package: Package, route: str) -> None:
    graph = onnx.load(str(package.folder / f"{route}.onnx")).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) > 4
    for node in products[:-1]:
        assert [makers.get(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2, node.name
    assert "DequantizeLinear" not in {makers.get(name) for name in products[-1].input}


@pytest.mark.parametrize("route", ROUTES)
def test_two_products_of_a_weight_and_an_unsigned_byte_fit_in_16_bits(package: Package, route: str) -> None:
    """Processors without VNNI add two before they widen, and cut off what does not fit."""
    tensors = onnx.load(str(package.folder / f"{route}.onnx")).graph.initializer
    weights = [numpy_helper.to_array(one) for one in tensors if one.data_type == onnx.TensorProto.INT8 and one.dims]
    largest = max(int(np.abs(weight.astype(np.int64)).max()) for weight in weights if weight.ndim == 2)
    assert largest >= 48
    assert 2 * 255 * largest <= np.iinfo(np.int16).max


def test_quantised_weights_are_shared_between_routes(package: Package) -> None:
    places = {}
    for route in map(str, (packages.STITCH, packages.WIDE)):
        tensors = onnx.load(str(package.folder / f"{route}.onnx"), load_external_data=False).graph.initializer
        places[route] = {
            entry.value
            for one in tensors
            if one.data_type == onnx.TensorProto.INT8
            for entry in one.external_data
            if entry.key == "offset"
        }
    stitch, wide = places.values()
    assert stitch & wide
    assert stitch - wide


def test_what_is_computed_is_near_fp32(package: Package) -> None:
    for one in package.routes:
        assert one.verification is not None
        assert one.verification.passed
        assert one.verification.cosine > 0.99


def test_the_file_of_weights_is_smaller(package: Package, tmp_path: Path) -> None:
    full = packages.write_package(tmp_path / "fp32")
    sizes = [(one.folder / "weights.bin").stat().st_size for one in (package, full)]
    assert sizes[0] < sizes[1]


def test_the_calibrator_sees_few_images_at_once_and_every_image() -> None:
    """It keeps all activations of a batch: 2 GB of the largest deit-micro at 100 images."""
    images = torch.arange(23.0).view(23, 1, 1, 1)
    reader = int8._Reader(lambda: [(images[:17], None), (images[17:], None)])
    for _ in range(2):
        batches = list(iter(reader.get_next, None))
        assert max(len(one["images"]) for one in batches) <= 10
        assert np.array_equal(np.concatenate([one["images"] for one in batches]), images.numpy())
        reader.rewind()

"""fp16 on a machine without a GPU: what rounding spoils is found, mended by fp32 where it is needed, or said."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import packages
import pytest
import torch
from onnx import TensorProto
from timm.models.vision_transformer import Block
from torch import nn

from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.fp16_rounding import LARGEST, MARGIN, rounded_run
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.onnx_session import verify_onnx
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.precision import converter
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.routes import Route
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.supernet import Supernet

SLIM = str(packages.SLIM)


def changed(change: Callable[[Supernet], None]) -> Callable[[Sequence[Route]], Supernet]:
    def load(routes: Sequence[Route]) -> Supernet:
        supernet = packages.supernet()
        with torch.no_grad():
            change(supernet)
        return supernet

    return load


def blocks(supernet: Supernet) -> list[Block]:
    found = [one for one in supernet.chain("slim").modules() if isinstance(one, Block)]
    assert len(found) == packages.DEPTH
    return found


def growing(supernet: Supernet) -> None:
    """A residual stream of 100,000 and more; norms in front of products keep them as they were."""
    for block in blocks(supernet):
        block.mlp.fc2.weight.mul_(30_000)
        block.mlp.fc2.bias.mul_(30_000)


def shrinking(supernet: Supernet) -> None:
    """A residual stream of which fp16 has but a few steps, and norms that enlarge it."""
    chain = supernet.chain("slim")
    branches = [layer for block in blocks(supernet) for layer in (block.attn.proj, block.mlp.fc2)]
    for parameter in (*chain.stem.parameters(), *(one for layer in branches for one in layer.parameters())):
        parameter.mul_(1e-6)
    for module in chain.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-16


def drowning(supernet: Supernet) -> None:
    """A number in every feature that norms take away again, so large that fp16 loses what it is added to."""
    for block in blocks(supernet):
        block.mlp.fc2.bias.fill_(1024)


def large_weight(supernet: Supernet) -> None:
    blocks(supernet)[2].mlp.fc1.weight[0, 0] = 1e6


def graph(package: Package, name: str = SLIM) -> onnx.ModelProto:
    return onnx.load(str(package.folder / f"{name}.onnx"))


def written(supernet: Supernet, folder: Path, convert: object | None = None) -> tuple[Artifact, ReferenceLogits]:
    """A route's graph in fp16 as the plain conversion makes it, and what torch answers."""
    exporter = RouteExporter(supernet, packages.SHAPE, converter("fp16", list), [packages.SLIM])
    artifact = Artifact(route=SLIM, format="onnx", precision="fp16", path=folder / "slim.onnx")
    exporter.export(packages.SLIM, artifact.path, metadata={})
    images = torch.cat([batch for batch, _ in packages.batches()])
    with torch.no_grad():
        logits = supernet(images, packages.SLIM).numpy()
    return artifact, ReferenceLogits.of_arrays(images.numpy(), {SLIM: logits})


def verdict(artifact: Artifact, reference: ReferenceLogits) -> Verdict:
    (found,) = verify_onnx([artifact], reference, "pretrained", provider=CPU_PROVIDER, threads=1)
    return found


def test_rounding_is_what_the_standard_computes(tmp_path: Path) -> None:
    """onnx's own evaluator computes in fp16 itself, sums included: the two differ by as much as each from torch."""
    from onnx.reference import ReferenceEvaluator

    supernet = packages.supernet()
    artifact, reference = written(supernet, tmp_path)
    images = reference.images.read(0, 8)
    (standard,) = ReferenceEvaluator(onnx.load(str(artifact.path))).run(None, {"images": images})
    few = ReferenceLogits.of_arrays(images, {SLIM: reference.logits[SLIM][:8]})
    against_torch = rounded_run(artifact, few, limits_for("fp16", "pretrained"), threads=1).verification
    to_standard = ReferenceLogits.of_arrays(images, {SLIM: np.asarray(standard, np.float32)})
    against_standard = rounded_run(artifact, to_standard, limits_for("fp16", "pretrained"), threads=1).verification
    off = float(np.abs(standard - few.logits[SLIM]).max())
    assert against_torch.max_abs_difference == pytest.approx(off, rel=1)  # between nothing and twice as much
    assert against_torch.max_abs_difference > 0.2 * off
    assert against_standard.max_abs_difference < 1.5 * off  # sums are of fp32 in one, of fp16 in the other


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (growing, r"In fp16 \w+ reaches .*; at most 15,000 may be, a 4th of where fp16 ends: use bf16 or fp32\."),
        (drowning, r"Rounded to fp16 after every operator: The engine does not compute what torch computes: on 24 "),
    ],
)
def test_an_engine_that_only_a_gpu_would_spoil_is_not_verified_by_a_cpu(
    change: Callable[[Supernet], None], says: str, tmp_path: Path
) -> None:
    supernet = packages.supernet()
    with torch.no_grad():
        change(supernet)
    found = verdict(*written(supernet, tmp_path))
    assert found.status == "built, not run"
    assert re.match(says, found.reason), found.reason


@pytest.mark.parametrize("change", [growing, shrinking, drowning])
def test_a_residual_stream_that_fp16_does_not_carry_is_kept_in_fp32(
    change: Callable[[Supernet], None], tmp_path: Path
) -> None:
    package = packages.write_package(tmp_path / "p", precision="fp16", load=changed(change))
    assert [one.status for one in package.routes] == ["verified"] * 3
    found = package.route(SLIM).verification
    assert found is not None
    assert found.residual == "fp32"
    assert found.rounded_images == 24
    assert found.rounded_difference is not None and found.rounded_difference <= found.tolerance
    assert found.largest_fp16 is not None and found.largest_fp16 * MARGIN <= LARGEST
    model = onnx.shape_inference.infer_shapes(graph(package), data_prop=True)
    types = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    types |= {one.name: one.data_type for one in model.graph.initializer}
    features = [
        node
        for node in model.graph.node
        if node.op_type == "Add" and not any(one.name in node.input for one in model.graph.initializer)
    ]
    assert len(features) >= 2 * packages.DEPTH
    assert {types[node.output[0]] for node in features} == {TensorProto.FLOAT}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    narrow = [node for node in products if types[node.output[0]] == TensorProto.FLOAT16]
    assert len(narrow) >= len(products) / 2


def test_only_routes_that_need_it_are_kept_in_fp32(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "p", precision="fp16", load=changed(growing))
    kept = {one.name: one.verification.residual for one in package.routes if one.verification is not None}
    assert (kept[SLIM], kept[str(packages.WIDE)]) == ("fp32", None)
    plain = packages.write_package(tmp_path / "plain", precision="fp16")
    assert all(one.verification is not None and one.verification.residual is None for one in plain.routes)


def test_a_weight_beyond_fp16_stays_in_fp32_with_its_product(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "p", precision="fp16", load=changed(large_weight))
    assert [one.status for one in package.routes] == ["verified"] * 3
    wide = [one for one in graph(package).graph.initializer if one.data_type == TensorProto.FLOAT and len(one.dims) > 1]
    assert len(wide) == 1
    assert float(np.abs(onnx.numpy_helper.to_array(wide[0])).max()) == 1e6


def test_verifying_a_package_again_rounds_again(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "p", precision="fp16")
    for found in verify_package(package.folder, threads=1):
        assert found.status == "verified"
        assert found.verification is not None
        assert found.verification.rounded_images == found.verification.images
        assert found.verification.rounded_difference is not None
        assert found.verification.rounded_difference > 0


def test_other_precisions_have_no_such_figures(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "p")
    assert all(one.verification is not None and one.verification.rounded_images is None for one in package.routes)

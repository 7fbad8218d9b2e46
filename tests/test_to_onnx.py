"""Networks and routes as ONNX files: the same function, alone in the file, for batches of any size."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from engine_comparison import compare_network
from small_models import small_chain
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.errors import ExportError
from klas_zoo.exporters import to_onnx
from klas_zoo.exporters.to_onnx import RouteExporter, export
from klas_zoo.memory import give_back
from klas_zoo.profiles.macs import count_parameters
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

SHAPE = (3, 16, 16)
DEPTH = 3
WHOLE = Route.anchor("wide", DEPTH)
STITCH = Route.stitch("slim", 2, "wide", 1, DEPTH)
FROM_THE_STEM = Route.stitch("slim", 3, "wide", 0, DEPTH)
TWO_SEAMS = Route.from_json([["slim", 1, 1], ["middle", 2, 2], ["wide", 3, 3]])
THERE_AND_BACK = Route.from_json([["slim", 1, 2], ["wide", 2, 2], ["slim", 3, 3]])
ROUTES = [WHOLE, STITCH, FROM_THE_STEM, TWO_SEAMS, THERE_AND_BACK]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    chains = {
        name: Chain.of(
            VisionTransformer(img_size=16, patch_size=8, embed_dim=width, depth=DEPTH, num_heads=2, num_classes=5),
            SHAPE,
        )
        for name, width in (("slim", 8), ("middle", 12), ("wide", 16))
    }
    supernet = Supernet(chains, ROUTES)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.normal_(0, 0.3)  # no two tensors are equal
    return supernet


@pytest.fixture(scope="module")
def exporter(supernet: Supernet) -> RouteExporter:
    return RouteExporter(supernet, SHAPE)


@pytest.fixture(scope="module")
def alone(supernet: Supernet, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The stitched network exported by itself."""
    file = tmp_path_factory.mktemp("alone") / "stitch.onnx"
    export(supernet.network(STITCH), SHAPE, file, metadata={})
    return file.read_bytes()


@pytest.fixture(scope="module")
def model(alone: bytes) -> onnx.ModelProto:
    return onnx.load_from_string(alone)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_route_is_the_same_function_for_every_batch_size(
    route: Route, exporter: RouteExporter, supernet: Supernet, tmp_path: Path
) -> None:
    file = tmp_path / f"{route}.onnx"
    exporter.export(route, file, metadata={})
    batches = [torch.randn(size, *SHAPE) for size in (1, 2, 7)]
    found = compare_network(file, supernet.network(route), batches)
    assert found.passed, found


def test_the_file_of_a_route_holds_its_own_weights_and_no_others(
    exporter: RouteExporter, supernet: Supernet, tmp_path: Path
) -> None:
    for route in (WHOLE, STITCH, TWO_SEAMS):
        exporter.export(route, tmp_path / "route.onnx", metadata={})
        graph = onnx.load(tmp_path / "route.onnx").graph
        numbers = sum(math.prod(w.dims) for w in graph.initializer if w.dims and w.data_type == onnx.TensorProto.FLOAT)
        assert numbers == count_parameters(supernet.network(route))


def test_a_route_cut_from_the_supernet_is_the_graph_of_its_network_alone(
    exporter: RouteExporter, model: onnx.ModelProto, tmp_path: Path
) -> None:
    exporter.export(STITCH, tmp_path / "route.onnx", metadata={})
    cut = onnx.load(tmp_path / "route.onnx")
    operators = [Counter(node.op_type for node in one.graph.node) for one in (cut, model)]
    assert operators[0] == operators[1]


def test_a_graph_is_in_the_oldest_opset_and_format_with_attention_as_products(model: onnx.ModelProto) -> None:
    operators = Counter(node.op_type for node in model.graph.node)
    blocks = 4  # two of the source, two of the target
    assert operators["Softmax"] == operators["Erf"] == blocks
    assert operators["MatMul"] == 6 * blocks + 1  # and one of the stitching layer
    assert operators["LayerNormalization"] == 2 * blocks + 1
    # nothing computes shapes but of the batch, once in each stem
    assert operators["Shape"] <= 2
    assert not operators.keys() & {"Slice", "Squeeze", "ReduceMean", "Sqrt", "Constant", "Identity"}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert model.ir_version == 8


def test_attention_activation_and_norm_are_one_operator_each_where_the_opset_has_them(
    supernet: Supernet, tmp_path: Path
) -> None:
    export(supernet.network(STITCH), SHAPE, tmp_path / "fused.onnx", metadata={}, opset=23)
    model = onnx.load(tmp_path / "fused.onnx")
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Attention"] == operators["Gelu"] == 4
    assert not operators.keys() & {"Softmax", "Erf"}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    found = compare_network(tmp_path / "fused.onnx", supernet.network(STITCH), [torch.randn(3, *SHAPE)])
    assert found.passed, found


def test_a_newer_opset_is_used_only_where_the_graph_needs_it(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    export(network, SHAPE, tmp_path / "network.onnx", metadata={}, opset=23)
    model = onnx.load(tmp_path / "network.onnx")
    assert (model.opset_import[0].version, model.ir_version) == (18, 8)


def test_input_and_output_are_named_and_take_any_batch(model: onnx.ModelProto) -> None:
    def described(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
        return value.name, [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert [described(value) for value in model.graph.input] == [("images", ["batch", *SHAPE])]
    assert [described(value) for value in model.graph.output] == [("logits", ["batch", 5])]


def test_nothing_is_in_the_file_but_what_computes(model: onnx.ModelProto) -> None:
    assert not model.graph.value_info
    assert not model.functions
    noted = [*model.graph.node, *model.graph.input, *model.graph.output, model.graph]
    assert not any(part.doc_string or part.metadata_props for part in noted)
    assert all(weights.data_location == onnx.TensorProto.DEFAULT for weights in model.graph.initializer)


def test_metadata_is_written_into_the_file(exporter: RouteExporter, tmp_path: Path) -> None:
    facts = {"route": str(STITCH), "family": "made-up", "klas_zoo": "9.9"}
    exporter.export(STITCH, tmp_path / "route.onnx", metadata=facts)
    model = onnx.load(tmp_path / "route.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == facts
    # and does not stick to what is exported next
    exporter.export(STITCH, tmp_path / "next.onnx", metadata={"route": "other"})
    assert len(onnx.load(tmp_path / "next.onnx").metadata_props) == 1


def test_the_same_weights_give_the_same_bytes(
    exporter: RouteExporter, supernet: Supernet, alone: bytes, tmp_path: Path
) -> None:
    export(supernet.network(STITCH), SHAPE, tmp_path / "again.onnx", metadata={})
    assert (tmp_path / "again.onnx").read_bytes() == alone
    exporter.export(TWO_SEAMS, tmp_path / "cut.onnx", metadata={"a": "1", "b": "2"})
    exporter.export(STITCH, tmp_path / "other.onnx", metadata={})
    exporter.export(TWO_SEAMS, tmp_path / "again.onnx", metadata={"b": "2", "a": "1"})
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "cut.onnx").read_bytes()


def test_nobody_holds_the_weights_of_what_was_exported() -> None:
    chain = small_chain("deit")
    supernet = Supernet({"deit": chain}, [Route.anchor("deit", chain.depth)])
    weights = [weakref.ref(weight) for weight in supernet.parameters()]
    RouteExporter(supernet, chain.input_shape).model(supernet.routes[0])
    del chain, supernet
    give_back()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_exporting_leaves_the_mode_of_every_part_alone(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    network[1].eval()
    modes = [module.training for module in network.modules()]
    export(network, SHAPE, tmp_path / "network.onnx", metadata={})
    assert [module.training for module in network.modules()] == modes
    assert "Dropout" not in {node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node}


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Untranslatable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images).abs().flatten(1)


@pytest.mark.parametrize(("module", "stage"), [(Branching(), "capture"), (Untranslatable(), "translate")])
def test_an_export_that_fails_names_its_stage_and_writes_nothing(module: nn.Module, stage: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^Cannot export odd\.onnx: it failed to {stage} \(.+\)\.$"):
        export(module, SHAPE, tmp_path / "odd.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_a_graph_that_the_checker_refuses_is_not_written(
    exporter: RouteExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a name that stands for two values is what the checker is there for
    monkeypatch.setattr(to_onnx, "OUTPUT", to_onnx.INPUT)
    monkeypatch.setattr(to_onnx, "_logits", lambda anchor: f"{anchor}:logits")
    with pytest.raises(ExportError, match=r"^Cannot export route\.onnx: it failed to check \(.*images"):
        exporter.export(STITCH, tmp_path / "route.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_weights_that_one_file_cannot_hold_are_refused(
    exporter: RouteExporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "MOST_BYTES", 1000)
    with pytest.raises(ExportError, match=r"Cannot export route\.onnx: its weights take .* GB, and one ONNX file"):
        exporter.export(STITCH, tmp_path / "route.onnx", metadata={})
    assert not list(tmp_path.iterdir())

"""Norms folded into products: none is left, and the function is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import small_models
import torch
from engine_comparison import compare_network
from small_models import small_chain
from torch import Tensor, nn

from klas_zoo.exporters.to_onnx import RouteExporter, export
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

SHAPE = (3, 8, 8)


class Tokens(nn.Module):
    """LeViT's linear layer on tokens: (B, N, C), with the norm on (B · N, C)."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 5, bias=bias), nn.BatchNorm1d(5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.linear(images.flatten(2).transpose(1, 2))
        return self.norm(tokens.flatten(0, 1)).reshape_as(tokens).mean(1)


class Shared(nn.Module):
    """What the norm reads is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        return (self.norm(features) + features).mean((2, 3))


class Twice(nn.Module):
    """One convolution in front of two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(images)))).mean((2, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), {"Conv"}),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.Flatten()), {"Conv"}),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)), {"Gemm"}),
    "head": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 5)), {"Gemm"}),
    "tokens": (lambda: Tokens(bias=False), {"MatMul", "Add"}),
    "tokens with a bias": (lambda: Tokens(bias=True), {"MatMul", "Add"}),
    "in front of a padded convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()), {"Mul", "Add", "Conv"},
    ),
    "shared": (Shared, {"Mul", "Add", "Conv"}),
    "twice": (Twice, {"Conv"}),
}  # fmt: skip


def with_statistics(module: nn.Module) -> nn.Module:
    """Norms that are no identity."""
    torch.manual_seed(0)
    for one in module.modules():
        if isinstance(one, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for tensor, low, high in ((one.running_mean, -1, 1), (one.running_var, 0.2, 2), (one.weight, -2, 2)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
            nn.init.uniform_(one.bias, -1, 1)
    return module.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_is_left_and_the_function_is_the_same(name: str, tmp_path: Path) -> None:
    make, operators = NETWORKS[name]
    network = with_statistics(make())
    export(network, SHAPE, tmp_path / "network.onnx", metadata={})
    graph = onnx.load(tmp_path / "network.onnx").graph
    found = Counter(node.op_type for node in graph.node)
    assert not found["BatchNormalization"] and operators <= found.keys()
    used = {value for node in graph.node for value in node.input}
    assert {one.name for one in graph.initializer} <= used
    compared = compare_network(tmp_path / "network.onnx", network, [torch.randn(size, *SHAPE) for size in (1, 2, 5)])
    assert compared.passed, compared


@pytest.mark.parametrize("name", ["levit", "resnet", "mobilenetv3"])
def test_routes_of_one_supernet_share_folded_weights(name: str, tmp_path: Path) -> None:
    chain = small_chain(name)
    for part in (chain.stem, *chain.blocks, chain.head):
        with_statistics(part)
    whole = Route.anchor(name, chain.depth)
    supernet = Supernet({name: chain}, [whole]).eval()
    exporter = RouteExporter(supernet, small_models.SHAPE)
    first, second = exporter.model(whole), exporter.model(whole)
    assert "BatchNormalization" not in {node.op_type for node in first.graph}
    for key, value in first.graph.initializers.items():
        assert second.graph.initializers[key].const_value is value.const_value
    exporter.export(whole, tmp_path / "route.onnx", metadata={})
    found = compare_network(
        tmp_path / "route.onnx", supernet.network(whole), [torch.randn(2, *small_models.SHAPE)]
    )
    assert found.passed, found

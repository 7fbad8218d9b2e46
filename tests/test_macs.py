"""Multiply-adds against formulas worked out by hand and against published numbers."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from small_models import SHAPE, small_chain
from torch import Tensor, nn
from torch.nn import functional as F

import klas_zoo.families.micro  # noqa: F401  registers its models with timm
from klas_zoo.chains import Chain, Layout, can_stitch
from klas_zoo.errors import CountingError
from klas_zoo.profiles import macs
from klas_zoo.profiles.macs import (
    COUNTED,
    FREE,
    ChainCost,
    RouteCost,
    chain_cost,
    count_macs,
    count_parameters,
    route_cost,
    seam_cost,
)
from klas_zoo.routes import Route, Seam, Segment
from klas_zoo.supernet import StitchingLayer, Supernet

LAYER_NORM = 5  # fvcore's number for each element of a layer norm with weights


def deit_macs(width: int, tokens: int = 197, depth: int = 12, classes: int = 1000) -> int:
    """DeiT on one image of 224×224, by hand."""
    n, d = tokens, width
    patches = 14 * 14 * (16 * 16 * 3) * d
    projections = n * d * (3 * d) + n * d * d + 2 * n * d * (4 * d)  # qkv, output, MLP: 12 N D²
    attention = 2 * n * n * d  # scores and their sums over values
    block = projections + attention + 2 * LAYER_NORM * n * d
    return patches + depth * block + LAYER_NORM * n * d + d * classes


@pytest.fixture(scope="module")
def deit_tiny() -> nn.Module:
    return timm.create_model("deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("model", "width", "published"),
    [
        ("deit_tiny_patch16_224", 192, 1.26),
        ("deit_small_patch16_224", 384, 4.61),
        ("deit_base_patch16_224", 768, 17.58),
    ],
)
def test_deit_costs_what_the_formula_says_and_what_was_published(model: str, width: int, published: float) -> None:
    found = count_macs(timm.create_model(model), torch.zeros(1, 3, 224, 224))
    assert found == deit_macs(width)
    assert round(found / 1e9, 2) == published


def test_fused_and_unfused_attention_cost_the_same(deit_tiny: nn.Module) -> None:
    attention = deit_tiny.blocks[0].attn
    tokens = torch.zeros(1, 197, 192)
    found = {}
    for fused in (True, False):
        attention.fused_attn = fused
        found[fused] = count_macs(attention, tokens)
    attention.fused_attn = True
    assert found[True] == found[False] == 4 * 197 * 192**2 + 2 * 197**2 * 192


def test_attention_counts_when_keys_are_longer_than_queries_and_values_wider() -> None:
    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 11)
    assert count_macs(Attend(), q, k, v) == 2 * 3 * (5 * 7 * 8 + 5 * 7 * 11)


def test_a_batch_costs_as_much_as_its_images() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, groups=1)
    one = count_macs(layer, torch.zeros(1, 3, 16, 16))
    assert one == 16 * 16 * 8 * 3 * 9
    assert count_macs(layer, torch.zeros(4, 3, 16, 16)) == 4 * one


def test_the_parts_of_a_chain_cost_what_the_whole_model_costs(deit_tiny: nn.Module) -> None:
    cost = chain_cost(Chain.of(deit_tiny, (3, 224, 224)), (3, 224, 224))
    assert cost.total == RouteCost(macs=deit_macs(192), parameters=5_717_416)
    assert cost.stem_macs == 14 * 14 * 768 * 192
    assert cost.head_macs == LAYER_NORM * 197 * 192 + 192 * 1000
    assert len(cost.block_macs) == len(cost.block_parameters) == 12
    assert len(set(cost.block_macs)) == 1


def micro_chains() -> dict[str, Chain]:
    shape = (3, 32, 32)
    return {name: Chain.of(timm.create_model(f"deit_micro_{name}"), shape) for name in ("tiny", "small", "base")}


def map_chains() -> dict[str, Chain]:
    """Feature maps, normalised after the stem."""

    def chain(width: int) -> Chain:
        stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in range(8)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
        return Chain(stem, blocks, head, input_shape=(3, 32, 32))

    return {"tiny": chain(4), "small": chain(8), "base": chain(16)}


ROUTES = [
    Route.anchor("base", 8),
    Route.stitch("tiny", 3, "base", 5, 8),
    Route.stitch("tiny", 8, "small", 0, 8),
    Route.from_json([["tiny", 1, 2], ["small", 3, 3], ["base", 7, 8]]),
    Route.from_json([["tiny", 1, 2], ["base", 3, 4], ["tiny", 5, 8]]),
    Route.from_json([["tiny", 1, 4], ["base", 3, 3], ["tiny", 3, 4], ["base", 3, 8]]),  # some of it twice
]


@pytest.mark.parametrize("make_chains", [micro_chains, map_chains])
def test_a_route_costs_what_its_whole_network_costs(make_chains) -> None:  # type: ignore[no-untyped-def]
    chains: dict[str, Chain] = make_chains()
    supernet = Supernet(chains, ROUTES)
    costs = {name: chain_cost(chain, (3, 32, 32)) for name, chain in chains.items()}

    def of_seam(seam: Seam) -> RouteCost:
        return seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])

    for route in ROUTES:
        network = supernet.network(route)
        expected = RouteCost(macs=count_macs(network, torch.zeros(1, 3, 32, 32)), parameters=count_parameters(network))
        assert route_cost(route, costs, of_seam) == expected, route


ACROSS = [
    ("deit", "deit3", 2, 1),
    ("swin", "swinv2", 5, 4),
    ("swinv2", "swin", 2, 2),
    ("levit", "levit-undistilled", 3, 4),
    ("levit-conv", "levit", 1, 2),
    ("resnet", "resnet-bottleneck", 2, 3),
    ("convnext", "convnextv2", 2, 3),
    ("efficientnet", "mobilenetv3", 3, 3),
    ("mobilenetv2", "mobilenetv3", 9, 5),
    ("resnet", "swin", 4, 4),
    ("swin", "resnet", 5, 4),
    ("levit", "convnext", 2, 4),
    ("vit", "efficientnet", 2, 5),
]


@pytest.mark.parametrize(("source", "target", "i", "j"), ACROSS)
def test_a_route_of_any_architecture_costs_what_its_whole_network_costs(
    source: str, target: str, i: int, j: int
) -> None:
    chains = {source: small_chain(source), target: small_chain(target)}
    depth = chains[target].depth
    there = Route.stitch(source, i, target, j, depth)
    back = Route((Segment(source, 1, i), Segment(target, j + 1, j + 1), Segment(source, i + 1, chains[source].depth)))
    routes = [Route.anchor(target, depth), there]
    # a target block that shrinks the grid has no way back
    if can_stitch(chains[target], j + 1, chains[source], i):
        routes.append(back)
    supernet = Supernet(chains, routes)
    costs = {name: chain_cost(chain, SHAPE) for name, chain in chains.items()}

    def of_seam(seam: Seam) -> RouteCost:
        return seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])

    for route in routes:
        network = supernet.network(route)
        expected = RouteCost(macs=count_macs(network, torch.zeros(1, *SHAPE)), parameters=count_parameters(network))
        assert route_cost(route, costs, of_seam) == expected, route


def test_a_route_is_summed_over_its_segments() -> None:
    def cost(unit: int) -> ChainCost:
        return ChainCost(
            stem_macs=1 * unit,
            block_macs=(2 * unit, 3 * unit, 4 * unit),
            head_macs=5 * unit,
            stem_parameters=6 * unit,
            block_parameters=(7 * unit, 8 * unit, 9 * unit),
            head_parameters=10 * unit,
        )

    route = Route.stitch("a", 2, "b", 1, 3)
    seams = {Seam("a", 2, "b", 1): RouteCost(macs=10_000, parameters=20_000)}
    found = route_cost(route, {"a": cost(1), "b": cost(100)}, seams.__getitem__)
    assert found.macs == (1 + 2 + 3) + 10_000 + (300 + 400 + 500)
    assert found.parameters == (6 + 7 + 8) + 20_000 + (800 + 900 + 1000)


@pytest.mark.parametrize(
    ("source", "target", "vectors"),
    [
        (Layout(kind="tokens", width=40, grid=(16,)), Layout(kind="tokens", width=160, grid=(4, 4)), 16),
        (
            Layout(kind="tokens", width=40, grid=(4, 4), prefix=2),
            Layout(kind="tokens", width=160, grid=(4, 4), prefix=2),
            18,
        ),
        (Layout(kind="maps", width=40, grid=(7, 5)), Layout(kind="maps", width=160, grid=(7, 5)), 35),
        (Layout(kind="maps", width=40, grid=(7, 5)), Layout(kind="nhwc", width=160, grid=(7, 5)), 35),
        (Layout(kind="nhwc", width=40, grid=(7, 5)), Layout(kind="tokens", width=160, grid=(7, 5)), 35),
        (Layout(kind="tokens", width=40, grid=(7, 5)), Layout(kind="maps", width=160, grid=(7, 5)), 35),
    ],
    ids=str,
)
def test_a_stitching_layer_costs_what_its_formula_says(source: Layout, target: Layout, vectors: int) -> None:
    expected = RouteCost(macs=vectors * 40 * 160, parameters=40 * 160 + 160)
    assert seam_cost(source, target) == expected
    layer = StitchingLayer(source, target)
    assert count_macs(layer, torch.zeros(1, *source.shape)) == expected.macs
    assert count_parameters(layer) == expected.parameters


def test_features_of_other_grids_have_no_stitching_layer() -> None:
    source, target = Layout(kind="maps", width=8, grid=(7, 7)), Layout(kind="maps", width=8, grid=(8, 5))
    with pytest.raises(ValueError, match=r"no linear map joins the two: features 7×7 of width 8 and 8×5"):
        seam_cost(source, target)


def test_a_norm_of_vectors_costs_one_multiply_add_an_element() -> None:
    class Normalise(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.normalize(tokens, dim=-1)

    assert count_macs(Normalise(), torch.zeros(2, 5, 7)) == 2 * 5 * 7


class Mixer(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.cumprod(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mixer = Mixer()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mixer(self.linear(tokens))


def test_an_operator_nobody_can_count_is_an_error_that_names_it_and_its_module() -> None:
    with pytest.raises(CountingError, match=r"operator aten::cumprod in 0\.mixer \(Mixer\) cannot be counted"):
        count_macs(nn.Sequential(Block(), Block()), torch.zeros(1, 3, 4))
    with pytest.raises(CountingError, match=r"aten::cumprod in Mixer cannot"):
        count_macs(Mixer(), torch.zeros(1, 3, 4))


def test_position_embeddings_that_are_resized_for_every_image_are_an_error_that_says_what_to_state() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, dynamic_img_size=True, depth=1)
    with pytest.raises(CountingError, match="state img_size among the arguments in the family file, and leave out dyn"):
        count_macs(model.eval(), torch.zeros(1, 3, 48, 48))


def test_a_function_with_its_own_derivative_cannot_be_counted() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(context: object, tokens: Tensor) -> Tensor:
            return tokens @ tokens

    class Doubling(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return Double.apply(tokens)

    with pytest.raises(CountingError, match=r"prim::PythonOp\.Double in Doubling"):
        count_macs(Doubling(), torch.zeros(3, 3))


def test_nothing_that_fvcore_counts_is_free() -> None:
    by_fvcore = macs.FlopCountAnalysis(nn.Identity(), torch.zeros(1))._op_handles
    assert "aten::linear" in by_fvcore
    assert not FREE.keys() & (by_fvcore.keys() | COUNTED.keys())
    assert all(FREE.values())


def test_counting_leaves_modes_statistics_and_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Unchanged(nn.Module):  # what leaves no trace looks unused
        def forward(self, features: Tensor) -> Tensor:
            return features

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Unchanged(), nn.GELU(), nn.Dropout())
    network[1].eval()
    modes = [module.training for module in network.modules()]
    with caplog.at_level(logging.DEBUG):
        count_macs(network, torch.randn(2, 3, 8, 8))
    assert [module.training for module in network.modules()] == modes
    assert network[1].running_mean.count_nonzero() == 0
    assert not caplog.records


def test_an_lstm_costs_its_matrices_for_every_token_of_every_layer_and_direction() -> None:
    lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
    first, second = 4 * 5 * (8 + 5), 4 * 5 * (2 * 5 + 5)  # four gates; the second layer reads both directions
    assert count_macs(lstm, torch.zeros(3, 7, 8)) == 3 * 7 * 2 * (first + second)

"""Tensors that go side by side between blocks: one seam when they lie on one grid, refused when they do not."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional as F

from klas_zoo.chains import Chain
from klas_zoo.errors import FamilyError
from klas_zoo.exporters.to_onnx import export
from klas_zoo.profiles.macs import chain_cost, count_macs
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

IMAGE = (3, 16, 16)
CLASSES = 5
DENSE = {"growth_rate": 16, "block_config": (3, 4, 5, 3), "num_classes": CLASSES}


class Pair(nn.Module):
    """(slow, fast) maps (B, D, H, W) → the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slow, self.fast = (
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)),
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)),
        )

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slow, fast = pair
        return slow + self.slow(fast), fast + self.fast(F.relu(slow))


class UnequalPair(Pair):
    """The second maps have half the sides of the first."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slow, fast = pair
        wide = F.interpolate(fast, scale_factor=2.0)
        return slow + self.slow(wide), fast + self.fast(F.avg_pool2d(slow, 2))


class TwoStreams(nn.Module):
    """A network of somebody's own whose blocks hand a pair of maps on to each other."""

    def __init__(self, kind: type[Pair], stride: int, *, depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, width, 4, 4), nn.Conv2d(3, width, 4, 4 * stride)
        self.blocks = nn.ModuleList(kind(width) for _ in range(depth))
        self.classifier = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        pair = (self.stem(images), self.other(images))
        for block in self.blocks:
            pair = block(pair)
        return self.classifier(torch.cat([one.mean((2, 3)) for one in pair], 1))


def drawn(build: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def test_a_pair_that_blocks_hand_on_is_one_seam_of_both_widths() -> None:
    model = drawn(lambda: TwoStreams(Pair, 1))
    chain = Chain.of(model, IMAGE)
    assert chain.depth >= 3
    assert {str(layout) for layout in chain.layouts} == {"4×4 of width 12"}
    images = torch.randn(3, *IMAGE)
    with torch.inference_mode():
        assert torch.equal(chain(images), model(images))
        # what passes at a seam is what the network's own blocks hand on
        pair = (model.stem(images), model.other(images))
        for block, features in zip(model.blocks, chain.walk(images), strict=False):
            assert torch.equal(features, torch.cat(pair, 1))
            pair = block(pair)
    # images, classes and weights are the network's own
    assert {id(p) for p in chain.parameters()} == {id(p) for p in model.parameters()}


def test_networks_with_pairs_are_stitched() -> None:
    chains = {
        "small": Chain.of(drawn(lambda: TwoStreams(Pair, 1)), IMAGE),
        "large": Chain.of(drawn(lambda: TwoStreams(Pair, 1, width=10)), IMAGE),
    }
    net = Supernet(chains, [Route.stitch("small", 1, "large", 1, chains["large"].depth)]).eval()
    assert net(torch.randn(2, *IMAGE), net.routes[0]).shape == (2, CLASSES)


def test_a_stitch_of_networks_with_bundles_is_exported_and_computes_the_same(tmp_path: Path) -> None:
    shape = (3, 64, 64)
    chains = {
        "dense": Chain.of(drawn(lambda: timm.create_model("densenet121", **DENSE)), shape),
        "pair": Chain.of(drawn(lambda: TwoStreams(Pair, 1)), shape),
    }
    net = Supernet(chains, [Route.stitch("dense", 2, "pair", 1, chains["pair"].depth)]).eval()
    file = tmp_path / "route.onnx"
    export(net.network(net.routes[0]), shape, file, metadata={})
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, *shape)
        with torch.inference_mode():
            expected = net(images, net.routes[0])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert found.shape == (batch, CLASSES)
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)


def test_a_pair_on_two_grids_is_refused_with_a_way_out() -> None:
    sentence = (
        r"^TwoStreams cannot be cut into blocks: up to \d tensors go from one layer to the next, and a seam is one "
        r"tensor of tokens \(B, N, D\) or maps\. Concatenate them between blocks, or build "
        r"klas_zoo\.Chain\(stem, blocks, head, input_shape=…\) from its modules\.$"
    )
    with pytest.raises(FamilyError, match=sentence):
        Chain.of(drawn(lambda: TwoStreams(UnequalPair, 2)), IMAGE)


@pytest.mark.parametrize(
    "build",
    [lambda: timm.create_model("densenet121", **DENSE), lambda: torchvision.models.DenseNet(**DENSE)],
    ids=["timm", "torchvision"],
)
def test_a_layer_of_densenet_is_a_block_and_copies_nothing_twice(build: Any) -> None:
    model = drawn(build)
    shape = (3, 64, 64)
    chain = Chain.of(model, shape)
    assert chain.depth == 15
    # features grow by each layer's maps, and shrink with the grid between stages
    for before, after in pairwise(chain.layouts):
        assert after.width == before.width + 16 or after.grid < before.grid
    images = torch.randn(2, *shape)
    with torch.inference_mode():
        assert torch.equal(chain(images), model(images))
    assert chain_cost(chain, shape).total.macs == count_macs(model, images[:1])
    graphs = [block.graph for block in chain.blocks if isinstance(block, fx.GraphModule)]
    assert len(graphs) == 15
    assert all(sum(node.target is torch.cat for node in graph.nodes) == 1 for graph in graphs)


def test_blocks_beside_a_waiting_branch_are_blocks() -> None:
    model = drawn(lambda: timm.create_model("cs3darknet_focus_s", num_classes=CLASSES))
    chain = Chain.of(model, (3, 64, 64))
    halves = [layout for layout in chain.layouts if layout.grid == (4, 4)]
    assert chain.depth > 12 and len(halves) > 3  # five stages of 1, 2, 3 and 1 blocks
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(chain(images), model(images))


def test_a_shortcut_is_no_bundle() -> None:
    chain = Chain.of(drawn(lambda: timm.create_model("resnet26d", num_classes=CLASSES)), (3, 64, 64))
    assert chain.depth == 8
    assert [layout.width for layout in chain.layouts] == [64, 256, 256, 512, 512, 1024, 1024, 2048, 2048]

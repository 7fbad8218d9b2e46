"""Chains: networks as stem, blocks and head."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from toys import CLASSES, IMAGE, MeanHead, Patches, map_chain, same_state, snapshot, token_chain

from klas_zoo.chains import Chain, can_stitch, first_token, grid, mean_pool
from klas_zoo.errors import FamilyError
from klas_zoo.modes import evaluating


class Reshape(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, features: Tensor) -> Tensor:
        return features.reshape(len(features), *self.shape)


def test_a_chain_of_any_modules_is_the_network_they_make() -> None:
    stem, blocks, head = nn.Conv2d(3, 4, 3), [nn.Conv2d(4, 6, 3), nn.ReLU()], MeanHead(6)
    chain = Chain(stem, blocks, head, input_shape=IMAGE)
    images = torch.randn(3, *IMAGE)
    assert torch.equal(chain(images), head(blocks[1](blocks[0](stem(images)))))
    assert (chain.depth, chain.classes, chain.input_shape) == (2, CLASSES, IMAGE)
    assert chain.shapes == ((4, 6, 6), (6, 4, 4), (6, 4, 4))


def test_walking_a_chain_gives_features_after_the_stem_and_after_each_block() -> None:
    chain = token_chain((4, 5, 6))
    images = torch.randn(2, *IMAGE)
    features = list(chain.walk(images))
    assert [tuple(one.shape[1:]) for one in features] == list(chain.shapes) == [(4, 4), (4, 5), (4, 6)]
    assert torch.equal(features[0], chain.stem(images))
    assert all(torch.equal(block(a), b) for block, (a, b) in zip(chain.blocks, pairwise(features), strict=True))
    assert torch.equal(chain.head(features[-1]), chain(images))


@pytest.mark.parametrize(
    ("chain", "widths", "grids"),
    [
        (token_chain((4, 5, 6)), [4, 5, 6], [(4,), (4,), (4,)]),
        (map_chain((4, 5, 6)), [4, 5, 6], [(8, 8), (8, 8), (4, 4)]),
    ],
    ids=["tokens", "maps"],
)
def test_the_width_is_the_channels_and_the_grid_is_the_rest(chain: Chain, widths: list[int], grids: list[int]) -> None:
    assert [chain.width(position) for position in range(chain.depth + 1)] == widths
    assert [grid(shape) for shape in chain.shapes] == grids


def test_a_seam_needs_the_same_grid_on_both_sides_whatever_the_widths() -> None:
    maps, tokens = map_chain((4, 5, 6, 7)), token_chain((4, 5))
    assert can_stitch(maps, 1, map_chain((9, 9, 9, 9)), 1)
    assert can_stitch(maps, 3, map_chain((9, 9, 9, 9)), 2)
    assert not can_stitch(maps, 1, maps, 2)
    assert not can_stitch(tokens, 1, maps, 3)
    sixteen = Chain(nn.Unflatten(1, (16, -1)), [nn.Identity()], MeanHead(3), input_shape=(16 * 3,))
    assert not can_stitch(sixteen, 1, maps, 3)  # 16 tokens are not 4×4 pixels


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), [[2.0, 4.0]]),
        (torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]]]), [[3.0, 1.0]]),
    ],
    ids=["tokens", "maps"],
)
def test_a_probe_reads_the_mean_unless_told_otherwise(features: Tensor, expected: list[list[float]]) -> None:
    assert mean_pool(features).tolist() == expected
    assert token_chain().pool is mean_pool


def test_the_class_token_is_the_first_one() -> None:
    assert first_token(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("blocks", "head", "sentence"),
    [
        ([], MeanHead(4), "at least one block"),
        ([nn.Flatten()], nn.Linear(16, 2), r"tokens \(N, D\) or maps \(D, H, W\), not \[\(4, 4\), \(16,\)\]"),
        ([Reshape(1, 2, 2, 4)], nn.Identity(), r"tokens \(N, D\) or maps"),
        ([nn.Identity()], nn.Linear(4, 2), r"logits \(classes,\) for an image, not \(4, 2\)"),
    ],
    ids=["no blocks", "flat features", "features of four dimensions", "logits for every token"],
)
def test_what_is_no_chain_is_refused(blocks: list[nn.Module], head: nn.Module, sentence: str) -> None:
    with pytest.raises(FamilyError, match=sentence):
        Chain(Patches(4), blocks, head, input_shape=IMAGE)


def test_building_a_chain_leaves_modes_and_statistics_alone() -> None:
    norm = nn.BatchNorm2d(4)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3), norm), nn.Dropout(0.5).eval()]
    before = snapshot(norm)
    chain = Chain(nn.Conv2d(3, 4, 3), blocks, MeanHead(4), input_shape=IMAGE)
    assert same_state(norm, before)
    assert chain.training and norm.training and not blocks[1].training


def test_evaluation_mode_ends_where_it_began_even_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).eval())
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise ZeroDivisionError
    assert [part.training for part in module.modules()] == [True, True, False]

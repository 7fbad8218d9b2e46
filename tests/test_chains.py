"""Chains: networks as stem, blocks and head."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from toys import CLASSES, IMAGE, MeanHead, Patches, map_chain, same_state, snapshot, token_chain

from klas_zoo.chains import Chain, Layout, can_stitch, evaluating, first_token, mean_pool, mismatch
from klas_zoo.errors import FamilyError


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
    assert [layout.grid for layout in chain.layouts] == grids
    assert [layout.shape for layout in chain.layouts] == list(chain.shapes)


def test_a_seam_needs_the_same_grid_on_both_sides_whatever_the_widths() -> None:
    maps, tokens = map_chain((4, 5, 6, 7)), token_chain((4, 5))
    assert can_stitch(maps, 1, map_chain((9, 9, 9, 9)), 1)
    assert can_stitch(maps, 3, map_chain((9, 9, 9, 9)), 2)
    assert not can_stitch(maps, 1, maps, 2)
    assert not can_stitch(tokens, 1, maps, 3)
    sixteen = Chain(nn.Unflatten(1, (16, -1)), [nn.Identity()], MeanHead(3), input_shape=(16 * 3,))
    assert not can_stitch(sixteen, 1, maps, 3)  # 16 tokens are not 4×4 pixels


def tokens(width: int, *grid: int, prefix: int = 0) -> Layout:
    return Layout(kind="tokens", width=width, grid=grid, prefix=prefix)


def maps(width: int, *grid: int) -> Layout:
    return Layout(kind="maps", width=width, grid=grid)


def nhwc(width: int, *grid: int) -> Layout:
    return Layout(kind="nhwc", width=width, grid=grid)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (tokens(4, 16), tokens(9, 16)),
        (tokens(4, 16), tokens(4, 4, 4)),
        (tokens(4, 2, 8), tokens(4, 16)),
        (tokens(4, 14, 14, prefix=2), tokens(8, 14, 14, prefix=2)),
        (tokens(4, 196, prefix=1), tokens(8, 14, 14, prefix=1)),
        (tokens(4, 4, 4), maps(4, 4, 4)),
        (maps(4, 4, 4), nhwc(7, 4, 4)),
        (nhwc(4, 3, 5), tokens(7, 3, 5)),
    ],
    ids=str,
)
def test_a_seam_needs_one_grid_and_one_number_of_prefix_tokens(source: Layout, target: Layout) -> None:
    assert mismatch(source, target) == mismatch(target, source) == ""


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (tokens(4, 16), tokens(4, 17), "features 16 of width 4 and 17 of width 4 do not lie on one grid"),
        (tokens(4, 4, 4), tokens(9, 2, 8), "features 4×4 of width 4 and 2×8 of width 9 do not lie on one grid"),
        (tokens(4, 16), maps(4, 4, 4), "features 16 of width 4 and 4×4 of width 4 do not lie on one grid"),
        (maps(4, 7, 7), nhwc(4, 14, 14), "features 7×7 of width 4 and 14×14 of width 4 do not lie on one grid"),
        (
            tokens(4, 14, 14, prefix=1),
            maps(4, 14, 14),
            "prefix tokens (class, distillation, registers) cannot go from 1 to 0",
        ),
        (
            tokens(4, 195, prefix=2),
            tokens(4, 196, prefix=1),
            "prefix tokens (class, distillation, registers) cannot go from 2 to 1",
        ),
    ],
    ids=str,
)
def test_what_no_stitching_layer_can_join_is_told_with_the_reason(source: Layout, target: Layout, reason: str) -> None:
    assert mismatch(source, target) == reason
    assert mismatch(target, source)


LAYOUTS = [tokens(6, 3, 5), maps(6, 3, 5), nhwc(6, 3, 5)]


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: layout.kind)
@pytest.mark.parametrize("target", LAYOUTS, ids=lambda layout: layout.kind)
def test_features_go_from_every_layout_to_every_other_and_back(source: Layout, target: Layout) -> None:
    features = torch.randn(2, *source.shape)
    there = target.arrange(source.channels_last(features))
    assert there.shape[1:] == target.shape
    assert there.is_contiguous() or target.kind != "maps"
    assert torch.equal(source.arrange(target.channels_last(there)), features)
    # the vector in row 1, column 2 is the same in both
    assert torch.equal(at(source, features, 1, 2), at(target, there, 1, 2))


def at(layout: Layout, features: Tensor, row: int, column: int) -> Tensor:
    """The vectors (B, D) at one place of the grid 3×5, by indices alone."""
    if layout.kind == "tokens":
        return features[:, row * 5 + column]
    return features[:, :, row, column] if layout.kind == "maps" else features[:, row, column]


@pytest.mark.parametrize(
    ("layout", "features", "expected"),
    [
        (tokens(2, 2), [[[1.0, 2.0], [3.0, 6.0]]], [[2.0, 4.0]]),
        (tokens(2, 2, prefix=1), [[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]], [[2.0, 4.0]]),
        (maps(2, 2, 2), [[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]]], [[3.0, 1.0]]),
        (nhwc(2, 2, 2), [[[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [6.0, 4.0]]]], [[3.0, 1.0]]),
    ],
    ids=["tokens", "tokens after a prefix", "maps", "maps, channels last"],
)
def test_a_probe_reads_the_mean_of_all_but_the_prefix_unless_told_otherwise(
    layout: Layout, features: list[object], expected: list[list[float]]
) -> None:
    assert mean_pool(torch.tensor(features), layout).tolist() == expected
    assert token_chain().pool is mean_pool


def test_the_class_token_is_the_first_one() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert first_token(features, tokens(2, 1, prefix=1)).tolist() == [[1.0, 2.0]]


def test_a_layout_that_does_not_describe_the_features_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"shape \(4, 4\) are not laid out as tokens, 3×3 of width 4\."):
        Chain(Patches(4), [nn.Identity()], MeanHead(4), input_shape=IMAGE, layout=lambda shape: tokens(4, 3, 3))


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

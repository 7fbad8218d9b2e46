"""SN-Net's windows: the published counts, and lists written down by hand."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from toys import map_chain, staged_chain, token_chain

from klas_zoo.chains import Chain
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Route
from klas_zoo.selection import Selection, select
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.snnet import NetworkStage, paired, stages, unpaired, window_seams


def chosen(chains: dict[str, Chain], **settings: Any) -> Selection:
    """The selection of `snnet`; every block of the k-th anchor costs 10 to the power of k."""
    price = {name: 10.0**k for k, name in enumerate(chains)}

    def cost(route: Route) -> float:
        return sum(price[s.anchor] * (s.last - s.first + 1) for s in route.segments)

    return select(chains, Measurements(), cost, SelectionSettings(selector="snnet", **settings))


def vit(depth: int) -> Chain:
    return token_chain((3,) * (depth + 1))


LEVIT = (8, 4, 2)
PUBLISHED = {
    "DeiT Ti/S/B": (lambda: (vit(12), vit(12), vit(12)), 68),
    "Swin Ti/S/B": (lambda: tuple(map(staged_chain, ((2, 2, 6, 2), (2, 2, 18, 2), (2, 2, 18, 2)))), 38),
    "LeViT 192/256": (lambda: (staged_chain((4, 4, 4), sizes=LEVIT), staged_chain((4, 4, 4), sizes=LEVIT)), 6),
    "ResNet 18/50": (
        lambda: (staged_chain((2, 2, 2, 2), convolutional=True), staged_chain((3, 4, 6, 3), convolutional=True)), 8
    ),
    "ResNet-18 to Swin-Ti": (
        lambda: (staged_chain((2, 2, 2, 2), convolutional=True), staged_chain((2, 2, 6, 2))), 6
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "count"), PUBLISHED.values(), ids=PUBLISHED)
def test_there_are_as_many_stitches_as_were_published(make: object, count: int) -> None:
    chains = dict(zip(("first", "second", "third"), make(), strict=False))  # type: ignore[operator]
    selection = chosen(chains)
    assert len(selection.routes) == len(set(selection.routes)) == count
    assert selection.pairs == tuple(pairwise(chains))


def test_paired_windows_hold_every_block_with_itself_and_its_neighbours() -> None:
    assert set(paired(3, diagonal=True)) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    assert paired(3, diagonal=False) == [(0, 1), (1, 2)]
    assert paired(1, diagonal=True) == [(0, 0)]


def test_unpaired_blocks_are_entered_from_the_nearest_block_before_them() -> None:
    # blocks 0 and 1 of four lie on block 0 of two, 2 and 3 on block 1
    assert unpaired(2, 4) == [(0, 1), (1, 2), (1, 3)]
    assert unpaired(2, 3) == [(0, 1), (1, 2)]
    assert unpaired(6, 18)[:4] == [(0, 1), (0, 2), (1, 3), (1, 4)]
    assert len(unpaired(12, 24)) == 23


def test_stitches_of_two_plain_transformers_are_those_written_by_hand() -> None:
    # SN-Net's (a, b) is our (a + 1, b): b = 0 goes into the target's first block
    assert set(window_seams(vit(3), vit(3))) == {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2)}
    assert window_seams(vit(2), vit(4)) == [(1, 1), (2, 2), (2, 3)]


def test_stitches_of_networks_of_stages_are_those_written_by_hand() -> None:
    source, target = staged_chain((2, 2, 2, 2)), staged_chain((2, 2, 6, 2))
    assert window_seams(source, target) == [
        (1, 1),  # blocks 1 and 2 of both: stage 1
        (3, 3),  # blocks 3 and 4 of both: stage 2
        (5, 5), (5, 6), (6, 7), (6, 8), (6, 9),  # blocks 5 and 6; blocks 5 to 10: stage 3
    ]  # fmt: skip
    convolutional = staged_chain((2, 2, 2, 2), convolutional=True)
    assert window_seams(convolutional, target) == [(3, 3), (5, 5), (5, 6), (6, 7), (6, 8), (6, 9)]


def test_stages_are_blocks_on_one_grid() -> None:
    assert stages(staged_chain((3, 1, 2))) == [
        NetworkStage(grid=(8, 8), before=0, depth=3), NetworkStage(grid=(4, 4), before=3, depth=1),
        NetworkStage(grid=(2, 2), before=4, depth=2),
    ]  # fmt: skip
    assert stages(vit(5)) == [NetworkStage(grid=(4,), before=0, depth=5)]


def test_only_neighbours_are_stitched_unless_other_pairs_are_named() -> None:
    chains = {"tiny": vit(3), "small": vit(3), "base": vit(3)}
    assert chosen(chains).pairs == (("tiny", "small"), ("small", "base"))
    named = chosen(chains, pairs=(("tiny", "base"),))
    assert {(c.source, c.target) for c in named.chosen} == {("tiny", "base")}


def test_windows_go_both_ways_when_asked() -> None:
    chains = {"tiny": vit(3), "base": vit(3)}
    up, down, both = (chosen(chains, direction=way).routes for way in ("up", "down", "both"))
    assert {(c.source, c.target) for c in chosen(chains, direction="down").chosen} == {("base", "tiny")}
    assert both == (*up, *down) and len(up) == len(down) == 7


def test_between_unequal_depths_windows_only_lead_into_the_deeper_network() -> None:
    chains = {"tiny": vit(3), "base": vit(6)}
    assert chosen(chains, direction="both").routes == chosen(chains, direction="up").routes
    with pytest.raises(SelectionError, match="windows hold no stitch of base and tiny: their stages have 6 and 3"):
        chosen(chains, direction="down")


def test_stitches_larger_than_the_target_are_kept_in_the_last_bucket() -> None:
    selection = chosen({"tiny": vit(3), "base": vit(3)})
    large = [c for c in selection.chosen if c.cost >= 30]
    assert {(c.i, c.j) for c in large} == {(1, 0), (2, 0)}
    assert {c.bucket for c in large} == {19}
    assert Counter(c.reason for c in selection.candidates) == {"window": 7}


def test_chains_without_a_window_are_told_with_their_depths() -> None:
    # the last stage is left out, and the first of a convolutional source
    with pytest.raises(SelectionError) as caught:
        chosen({"tiny": map_chain(), "small": map_chain((5, 5, 9, 9))})
    assert str(caught.value) == (
        "SN-Net's windows hold no stitch of tiny and small: their stages have 1, 2 and 1, 2 blocks."
    )


def test_neighbours_without_a_common_grid_are_told() -> None:
    chains = {"tiny": vit(3), "maps": map_chain(), "base": vit(3)}
    with pytest.raises(SelectionError, match=r"No two anchors next to each other in cost \(tiny < maps < base\)"):
        chosen(chains)

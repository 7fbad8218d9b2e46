"""Multiply-adds of whole networks and of stitches against the figures their authors printed."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import timm
from snnet import PUBLISHED, deit_routes, levit_routes, resnet_routes, resnet_swin_routes, swin_routes

from klas_zoo.chains import Chain, can_stitch
from klas_zoo.families.specs import builtin_families
from klas_zoo.profiles.macs import ChainCost, RouteCost, chain_cost, route_cost, seam_cost
from klas_zoo.routes import Route, Seam
from klas_zoo.selection.snnet import window_seams

pytestmark = pytest.mark.slow

FAMILIES = builtin_families()
ROUTES = {
    "deit": deit_routes(),
    "swin": swin_routes(),
    "levit": levit_routes(),
    "resnet": resnet_routes(),
    "resnet-swin": resnet_swin_routes(),
}


class Priced(NamedTuple):
    """An anchor that has let go of its weights, up to 350 MB, and what timm says about them."""

    chain: Chain
    cost: ChainCost
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]]
    pretrained_classes: int


@cache
def priced(model: str, side: int) -> Priced:
    chain = Chain.of(timm.create_model(model), (3, side, side))
    settings = timm.get_pretrained_cfg(model)
    cost = chain_cost(chain, (3, side, side))
    return Priced(chain.to("meta"), cost, (settings.mean, settings.std), settings.num_classes)


def anchors(family: str) -> dict[str, Priced]:
    spec = FAMILIES[family]
    return {anchor.name: priced(anchor.model, spec.input_shape[1]) for anchor in spec.anchors}


def macs(family: str, route: Route) -> int:
    found = anchors(family)

    def of_seam(seam: Seam) -> RouteCost:
        return seam_cost(found[seam.source].chain.layouts[seam.i], found[seam.target].chain.layouts[seam.j])

    return route_cost(route, {name: anchor.cost for name, anchor in found.items()}, of_seam).macs


def macs_of_anchors(family: str) -> list[int]:
    return [macs(family, Route.anchor(name, anchor.chain.depth)) for name, anchor in anchors(family).items()]


@pytest.mark.parametrize(
    ("family", "count"), [("deit", 71), ("swin", 41), ("levit", 8), ("resnet", 10), ("resnet-swin", 8)]
)
def test_every_route_of_sn_net_exists_and_costs_what_was_published(family: str, count: int) -> None:
    routes, published = ROUTES[family], PUBLISHED[family]
    assert len(set(routes)) == len(published) == count
    found = anchors(family)
    for route, expected in zip(routes, published, strict=True):
        if family == "deit" and not route.is_anchor:
            # their DeiT stitches leave out the last norm: 5 for each of 197 tokens and each channel
            norm = 5 * 197 * found[route.segments[-1].anchor].chain.width(12)
            assert macs(family, route) == pytest.approx(expected, rel=0.005)
            expected += norm
        assert macs(family, route) == expected, route


@pytest.mark.parametrize("family", ROUTES)
def test_the_windows_of_real_networks_are_the_published_routes(family: str) -> None:
    published = {segment.anchor for route in ROUTES[family] for segment in route.segments}
    names = [name for name in anchors(family) if name in published]
    found = {
        Seam(source, i, target, j)
        for source, target in pairwise(names)
        for i, j in window_seams(anchors(family)[source].chain, anchors(family)[target].chain)
    }
    assert found == {seam for route in ROUTES[family] for seam in route.seams}


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("deit", [1.26, 4.61, 17.58]),
        ("deit3", [4.6, 8.0, 17.5]),
        ("swin", [4.5, 8.7, 15.4]),
        ("swinv2", [5.9, 11.5, 20.3]),
        ("levit", [0.305, 0.406, 0.66, 1.13, 2.35]),
        ("resnet", [1.8, 4.1]),
        ("resnet-swin", [1.8, 4.5]),
        ("convnext", [4.5, 8.7, 15.4]),
        ("caformer", [4.1, 8.0, 13.2, 23.2]),
    ],
)
def test_anchors_cost_what_their_papers_say(family: str, published: list[float]) -> None:
    found = [count / 1e9 for count in macs_of_anchors(family)]
    # papers print two or three digits
    assert found == pytest.approx(published, rel=0.015, abs=0.05)


def test_tiny_vits_cost_what_their_paper_says_in_two_digits() -> None:
    assert [round(count / 1e9, 1) for count in macs_of_anchors("tiny-vit")] == [1.3, 2.0, 4.3]


def test_mobilenet_and_efficientnet_cost_what_their_papers_say_and_a_few_per_cent_for_norms() -> None:
    found = [count / 1e9 for count in macs_of_anchors("efficientnet")]
    assert found[:2] == pytest.approx([0.219, 0.39], rel=0.03)


@pytest.mark.parametrize("family", [name for name, spec in FAMILIES.items() if spec.sample is None])
def test_anchors_are_ordered_by_cost_and_every_neighbour_can_be_stitched(family: str) -> None:
    found = list(anchors(family).values())
    costs = macs_of_anchors(family)
    assert costs == sorted(set(costs))
    for source, target in pairwise(found):
        seams = [(i, j) for i in range(1, source.chain.depth + 1) for j in range(1, target.chain.depth)]
        assert any(can_stitch(source.chain, i, target.chain, j) for i, j in seams)
    # one image goes through several anchors, and their own weights are for a thousand classes
    assert len({anchor.mean_and_std for anchor in found}) == 1
    assert {anchor.pretrained_classes for anchor in found} == {FAMILIES[family].num_classes}

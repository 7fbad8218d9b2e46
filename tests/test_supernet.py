"""The supernet: routes executed one by one, all together, and as networks of their own."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import (
    IMAGE,
    MeanHead,
    calls,
    forget_calls,
    map_chain,
    random_batches,
    same_state,
    snapshot,
    three_chains,
    token_chain,
)

from klas_zoo.chains import Chain, Layout
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Route, Seam, Segment
from klas_zoo.supernet import RouteStep, StitchingLayer, Supernet, steps_of

TWO_SEAMS = Route((Segment("tiny", 1, 2), Segment("small", 2, 3), Segment("base", 4, 5)))
BACK = Route((Segment("base", 1, 1), Segment("tiny", 2, 3)))
ROUTES = [
    Route.anchor("tiny", 3),
    Route.anchor("small", 4),
    Route.anchor("base", 5),
    Route.stitch("tiny", 2, "small", 1, 4),
    Route.stitch("tiny", 2, "base", 2, 5),
    Route.stitch("tiny", 3, "base", 4, 5),
    Route.stitch("small", 4, "base", 0, 5),
    TWO_SEAMS,
    BACK,
]
MAP_ROUTES = [
    Route.anchor("small", 3),
    Route.stitch("tiny", 1, "small", 1, 3),
    Route.stitch("tiny", 3, "small", 2, 3),
    Route.stitch("tiny", 2, "small", 2, 3),
]


def tokens() -> Supernet:
    torch.manual_seed(1)
    return Supernet(three_chains(), ROUTES).eval()


def maps() -> Supernet:
    torch.manual_seed(1)
    return Supernet({"tiny": map_chain(norm=True), "small": map_chain((5, 5, 9, 9), seed=1)}, MAP_ROUTES).eval()


IMAGES = random_batches((3,))[0][0]


def by_hand(net: Supernet, route: Route) -> torch.Tensor:
    """Stem, blocks, linear maps between segments, head: written out without steps."""
    features = net.chain(route.segments[0].anchor).stem(IMAGES)
    before: Segment | None = None
    for segment in route.segments:
        if before is not None:
            layer = net.stitch(Seam(before.anchor, before.last, segment.anchor, segment.first - 1))
            features = layer(features)
        for block in net.chain(segment.anchor).blocks[segment.first - 1 : segment.last]:
            features = block(features)
        before = segment
    return net.chain(route.segments[-1].anchor).head(features)


@pytest.mark.parametrize("make", [tokens, maps])
def test_a_route_is_its_segments_with_stitching_layers_between(make: Callable[[], Supernet]) -> None:
    net = make()
    with torch.inference_mode():
        for route in net.routes:
            assert torch.equal(net(IMAGES, route), by_hand(net, route))
            if route.is_anchor:
                assert torch.equal(net(IMAGES, route), net.chain(str(route))(IMAGES))


@pytest.mark.parametrize("make", [tokens, maps])
def test_all_routes_at_once_give_bit_for_bit_what_each_gives_alone(make: Callable[[], Supernet]) -> None:
    net = make()
    with torch.inference_mode():
        found = dict(net.forward_all(IMAGES, net.routes))
        assert found.keys() == set(net.routes)
        assert all(torch.equal(found[route], net(IMAGES, route)) for route in net.routes)
    assert len({tuple(logits.flatten().tolist()) for logits in found.values()}) == len(found)


@pytest.mark.parametrize("first", [2, 1], ids=["going on", "running a block again"])
def test_a_route_goes_there_and_back(first: int) -> None:
    there_and_back = Route((Segment("tiny", 1, 1), Segment("base", 3, 4), Segment("tiny", first, 3)))
    torch.manual_seed(1)
    net = Supernet(three_chains(), [there_and_back, Route.anchor("tiny", 3)]).eval()
    with torch.inference_mode():
        expected = by_hand(net, there_and_back)
        assert torch.equal(net(IMAGES, there_and_back), expected)
        assert torch.equal(net.network(there_and_back)(IMAGES), expected)
        assert torch.equal(dict(net.forward_all(IMAGES, net.routes))[there_and_back], expected)


def test_some_routes_at_once_are_only_those() -> None:
    net = tokens()
    assert [route for route, _ in net.forward_all(IMAGES, [TWO_SEAMS])] == [TWO_SEAMS]
    assert list(net.forward_all(IMAGES, [])) == []


def test_all_routes_at_once_compute_every_shared_beginning_once() -> None:
    net = tokens()
    for name in ("tiny", "small", "base"):
        forget_calls(net.chain(name))
    list(net.forward_all(IMAGES, net.routes))
    # a beginning is the blocks executed so far; every one of them is executed once
    beginnings = set()
    for route in ROUTES:
        blocks = [(s.anchor, k) for s in route.segments for k in range(s.first, s.last + 1)]
        beginnings |= {tuple(blocks[: index + 1]) for index in range(len(blocks))}
    expected = Counter(beginning[-1] for beginning in beginnings)
    for name in ("tiny", "small", "base"):
        chain = net.chain(name)
        assert calls(chain) == [expected[name, block] for block in range(1, chain.depth + 1)]
    assert calls(net.chain("tiny"))[:2] == [1, 2]  # six routes run block 1, one comes back to block 2


def alive_at_most(net: Supernet, routes: list[Route]) -> int:
    """The largest number of features that were alive when a block began."""
    features: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal most
        most = max(most, sum(one() is not None for one in features))

    def remember(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        features.append(weakref.ref(output))

    for name in ("tiny", "small", "base"):
        for block in net.chain(name).blocks:
            block.register_forward_pre_hook(count)
            block.register_forward_hook(remember)
    with torch.inference_mode():
        for _ in net.forward_all(IMAGES, routes):
            pass
    return most


def test_features_live_no_longer_than_some_route_needs_them() -> None:
    assert alive_at_most(tokens(), [Route.anchor("base", 5)]) == 1
    one_branching = [Route.anchor("tiny", 3), Route.stitch("tiny", 1, "base", 0, 5)]
    net = Supernet(three_chains(), one_branching).eval()
    assert alive_at_most(net, one_branching) == 2


@pytest.mark.parametrize("make", [tokens, maps])
def test_a_route_as_a_network_shares_the_supernets_weights(make: Callable[[], Supernet]) -> None:
    net = make()
    for route in net.routes:
        network = net.network(route)
        assert torch.equal(network(IMAGES), net(IMAGES, route))
        own = {id(p) for p in net.parameters()}
        assert {id(p) for p in network.parameters()} <= own
    network = net.network(net.routes[1])
    before = network(IMAGES)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    assert not torch.equal(network(IMAGES), before)


def test_a_supernet_shares_the_anchors_modules_and_has_a_layer_for_every_seam() -> None:
    chains = three_chains()
    net = Supernet(chains, ROUTES)
    assert all(net.chain(name) is chain for name, chain in chains.items())
    assert net.seams == tuple(sorted({seam for route in ROUTES for seam in route.seams}))
    assert len(net.seams) == 6
    for seam in net.seams:
        linear = net.stitch(seam).linear
        assert linear.weight.shape == (chains[seam.target].width(seam.j), chains[seam.source].width(seam.i))
        assert linear.bias is not None
    held = sum(p.numel() for p in net.parameters())
    anchors = sum(p.numel() for chain in chains.values() for p in chain.parameters())
    assert held == anchors + sum(p.numel() for seam in net.seams for p in net.stitch(seam).parameters())


def test_a_narrowed_supernet_shares_the_modules_its_routes_need_and_has_no_others() -> None:
    net, wanted = tokens(), [ROUTES[5], ROUTES[6]]
    fewer = net.narrowed(wanted)
    assert fewer.routes == tuple(wanted) and set(fewer.chains) == {"anchor_tiny", "anchor_small", "anchor_base"}
    assert all(fewer.stitch(seam) is net.stitch(seam) for seam in fewer.seams)
    assert fewer.seams == tuple(sorted(seam for route in wanted for seam in route.seams))
    assert set(net.narrowed([BACK]).chains) == {"anchor_base", "anchor_tiny"}
    assert torch.equal(fewer(IMAGES, wanted[0]), net(IMAGES, wanted[0]))


def test_routes_of_one_seam_share_its_layer_and_equal_routes_are_one() -> None:
    again = Route((*TWO_SEAMS.segments[:2], Segment("base", 4, 4)))
    net = Supernet(three_chains(), [TWO_SEAMS, TWO_SEAMS, again])
    assert net.routes == (TWO_SEAMS, again)
    assert net.seams == (Seam("small", 3, "base", 3), Seam("tiny", 2, "small", 1))


def test_the_order_of_routes_does_not_change_what_a_file_of_weights_means() -> None:
    one, other = Supernet(three_chains(), ROUTES), Supernet(three_chains(), ROUTES[::-1])
    assert one.seams == other.seams
    other.load_state_dict(one.state_dict())
    with torch.inference_mode():
        assert torch.equal(one.eval()(IMAGES, TWO_SEAMS), other.eval()(IMAGES, TWO_SEAMS))


def test_the_steps_of_a_route_are_stem_blocks_seams_and_head() -> None:
    assert steps_of(TWO_SEAMS) == (
        RouteStep("stem", "tiny"),
        RouteStep("block", "tiny", 1),
        RouteStep("block", "tiny", 2),
        RouteStep("seam", seam=Seam("tiny", 2, "small", 1)),
        RouteStep("block", "small", 2),
        RouteStep("block", "small", 3),
        RouteStep("seam", seam=Seam("small", 3, "base", 3)),
        RouteStep("block", "base", 4),
        RouteStep("block", "base", 5),
        RouteStep("head", "base"),
    )


@pytest.mark.parametrize("names", [("half", "train"), ("float", "routes"), ("stitches", "forward")])
def test_anchors_may_be_named_like_attributes_of_modules(names: tuple[str, str]) -> None:
    first, second = names
    route = Route.stitch(first, 1, second, 1, 2)
    net = Supernet({first: token_chain((4, 4)), second: token_chain((5, 5, 5))}, [route]).train().half().float().eval()
    assert net(IMAGES, route).shape == (3, 5)


LAYOUTS = [
    Layout(kind="tokens", width=4, grid=(3, 5)),
    Layout(kind="maps", width=4, grid=(3, 5)),
    Layout(kind="nhwc", width=4, grid=(3, 5)),
]


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: layout.kind)
@pytest.mark.parametrize("target", LAYOUTS, ids=lambda layout: layout.kind)
def test_a_stitching_layer_is_the_same_linear_map_everywhere(source: Layout, target: Layout) -> None:
    layer = StitchingLayer(source, replace(target, width=6))
    weight, bias = layer.linear.weight, layer.linear.bias
    features = torch.randn(2, 4, 3, 5)
    expected = F.conv2d(features, weight[:, :, None, None], bias)
    given = {"tokens": features.flatten(2).mT, "maps": features, "nhwc": features.permute(0, 2, 3, 1)}
    wanted = {"tokens": expected.flatten(2).mT, "maps": expected, "nhwc": expected.permute(0, 2, 3, 1)}
    assert torch.allclose(layer(given[source.kind]), wanted[target.kind], atol=1e-6)


def test_prefix_tokens_pass_the_same_linear_map() -> None:
    layout = Layout(kind="tokens", width=4, grid=(3,), prefix=2)
    layer = StitchingLayer(layout, layout)
    tokens = torch.randn(2, 5, 4)
    assert torch.equal(layer(tokens), layer.linear(tokens))


def test_a_route_with_a_seam_between_different_grids_is_refused_with_the_reason() -> None:
    with pytest.raises(SelectionError) as caught:
        Supernet({"tiny": map_chain(), "small": map_chain()}, [Route.stitch("tiny", 1, "small", 2, 3)])
    assert str(caught.value) == (
        "There is no seam tiny.1+small.2: features 8×8 of width 4 and 4×4 of width 8 do not lie on one grid."
    )


def test_frozen_statistics_do_not_move_in_training() -> None:
    norms = [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4)]
    chain = Chain(nn.Conv2d(3, 4, 1), [*norms[:2], nn.Dropout()], MeanHead(4), input_shape=IMAGE)
    net = Supernet({"it": chain}, [Route.anchor("it", 3)]).train()
    net.add_module("other", norms[2])
    net.freeze_statistics()
    assert not any(norm.training for norm in norms)
    assert net.training and chain.blocks[2].training
    before = snapshot(nn.ModuleList(norms))
    net(torch.randn(4, *IMAGE), net.routes[0]).sum().backward()
    assert same_state(nn.ModuleList(norms), before)
    assert norms[0].weight.grad is not None

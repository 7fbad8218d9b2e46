"""Tensors that a route has for itself behind its last seam."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from small_models import MODELS, SHAPE, build
from torch import nn
from toys import IMAGE, map_chain, three_chains

from klas_zoo.chains import Chain
from klas_zoo.exporters import to_onnx
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.profiles.macs import count_macs
from klas_zoo.route_tensors import LowRankLinear, OwnTensors
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet, steps_of

STITCH = Route.stitch("tiny", 2, "small", 1, 4)
OTHER = Route.stitch("tiny", 3, "small", 2, 4)
ANCHOR = Route.anchor("small", 4)
IMAGES = torch.randn(3, *IMAGE, generator=torch.Generator().manual_seed(5))


def toys(own: OwnTensors | None = None) -> Supernet:
    torch.manual_seed(1)
    return Supernet(three_chains(), [Route.anchor("tiny", 3), ANCHOR, STITCH, OTHER], own).eval()


def vits(own: OwnTensors | None = None) -> Supernet:
    torch.manual_seed(1)
    chains = {name: Chain.of(build(*MODELS["deit"], seed=seed), SHAPE).eval() for name, seed in (("a", 1), ("b", 2))}
    return Supernet(chains, [Route.anchor("b", 4), Route.stitch("a", 2, "b", 1, 4)], own).eval()


def disturb(supernet: Supernet, route: Route) -> None:
    tensors = supernet.own_tensors(route)
    assert tensors is not None
    with torch.no_grad():
        for value in tensors.parameters():
            value.add_(0.3)


@pytest.mark.parametrize("own", [OwnTensors(norms=True), OwnTensors(rank=2), OwnTensors(norms=True, rank=2, blocks=1)])
@pytest.mark.parametrize("make", [toys, vits])
def test_new_tensors_change_no_output(make, own: OwnTensors) -> None:  # type: ignore[no-untyped-def]
    shared, mine = make(), make(own)
    images = torch.randn(2, *next(iter(shared.chains.values())).input_shape)
    for route in shared.routes:
        assert torch.equal(mine(images, route), shared(images, route)), route


def test_a_routes_tensors_change_that_route_alone_and_only_behind_its_seam() -> None:
    net = toys(OwnTensors(rank=2))
    before = dict(net.forward_all(IMAGES, net.routes))
    disturb(net, STITCH)
    after = dict(net.forward_all(IMAGES, net.routes))
    changed = [route for route in net.routes if not torch.equal(before[route], after[route])]
    assert changed == [STITCH]
    assert net.steps(STITCH)[:4] == steps_of(STITCH)[:4]  # stem, two blocks, the stitching layer


def test_a_network_of_its_own_and_all_together_give_the_same_logits() -> None:
    net = toys(OwnTensors(rank=2))
    disturb(net, STITCH)
    together = dict(net.forward_all(IMAGES, net.routes))
    for route in net.routes:
        assert torch.equal(net.network(route)(IMAGES), together[route])
        assert torch.equal(net.narrowed([route])(IMAGES, route), together[route])


def test_norms_are_copied_and_everything_else_is_shared() -> None:
    net = vits(OwnTensors(norms=True))
    tensors = net.own_tensors(net.routes[1])
    assert tensors is not None
    assert set(tensors.values) == {
        f"{norm}/{name}"
        for norm in ("2/norm1", "2/norm2", "3/norm1", "3/norm2", "4/norm1", "4/norm2", "head/norm")
        for name in ("weight", "bias")
    }
    block = net.module(net.steps(net.routes[1])[4])
    shared = {id(p) for p in net.chain("b").parameters()}
    own = [name for name, p in block.named_parameters() if id(p) not in shared]
    assert own == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]


def test_updates_are_in_the_first_blocks_behind_the_seam_only() -> None:
    net = vits(OwnTensors(rank=3, blocks=2))
    tensors = net.own_tensors(net.routes[1])
    assert tensors is not None
    assert {name.partition("/")[0] for name in tensors.values} == {"2", "3"}
    qkv = tensors.values["2/attn/qkv/down"]
    assert qkv.shape == (3, 24)
    assert tensors.values["2/attn/qkv/up"].shape == (72, 3)


def test_an_update_is_counted_in_multiply_adds() -> None:
    shared = nn.Linear(6, 8)
    low = LowRankLinear(shared, nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2)))
    tokens = torch.randn(1, 5, 6)
    assert count_macs(low, tokens) == count_macs(shared, tokens) + 5 * 2 * (6 + 8)
    net = toys(OwnTensors(rank=2, blocks=1))
    tensors = net.own_tensors(STITCH)
    assert tensors is not None
    assert tensors.macs_per_vector == 2 * (6 + 6)


def test_a_state_brings_back_tensors_and_outputs() -> None:
    net = toys(OwnTensors(rank=2, blocks=1))
    disturb(net, STITCH)
    state = net.state_dict()
    again = Supernet.of_state(three_chains(), net.routes, state)
    again.load_state_dict(state)
    for route in net.routes:
        assert torch.equal(again.eval()(IMAGES, route), net(IMAGES, route))
    assert list(again.state_dict()) == list(state)


def test_views_follow_tensors_that_are_replaced_and_modes_that_change() -> None:
    net = toys(OwnTensors(rank=2))
    net(IMAGES, STITCH)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    expected = other(IMAGES, STITCH)
    net.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(net(IMAGES, STITCH), expected)
    net.double()
    assert torch.allclose(net(IMAGES.double(), STITCH), expected.double(), atol=1e-6)
    net.train()
    block = net.module(net.steps(STITCH)[4])
    assert all(part.training for part in block.modules())


def test_statistics_of_normalisations_stay_shared() -> None:
    chains = {"tiny": map_chain(norm=True), "small": map_chain((5, 5, 9, 9), seed=1, norm=True)}
    route = Route.stitch("tiny", 2, "small", 2, 3)
    net = Supernet(chains, [route], OwnTensors(norms=True)).train()
    net.freeze_statistics()
    view = net.module(net.steps(route)[-2])
    (norm,) = [part for part in view.modules() if isinstance(part, nn.BatchNorm2d)]
    (shared,) = [part for part in chains["small"].blocks[2].modules() if isinstance(part, nn.BatchNorm2d)]
    assert norm.running_mean is shared.running_mean
    assert norm.weight is not shared.weight
    assert not norm.training


def test_an_anchor_can_keep_its_weights_while_stitches_use_the_tuned_ones() -> None:
    net = toys()
    original = copy.deepcopy(net.chain("small"))
    before = net(IMAGES, ANCHOR)
    with torch.no_grad():
        for parameter in net.chain("small").parameters():
            parameter.mul_(1.5)
    stitched = net(IMAGES, STITCH)
    net.keep_original("small", original)
    assert torch.equal(net(IMAGES, ANCHOR), before)
    assert torch.equal(net(IMAGES, STITCH), stitched)
    state = net.state_dict()
    again = Supernet.of_state(three_chains(), net.routes, state)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(IMAGES, ANCHOR), before)
    assert torch.equal(net.narrowed([ANCHOR])(IMAGES, ANCHOR), before)
    assert torch.equal(net.network(ANCHOR)(IMAGES), before)


@pytest.mark.parametrize("own", [OwnTensors(norms=True), OwnTensors(rank=2)])
def test_an_exported_route_has_its_own_tensors_and_an_anchor_its_original_weights(
    tmp_path: Path, own: OwnTensors
) -> None:
    net = vits(own)
    disturb(net, net.routes[1])
    net.keep_original("b", Chain.of(build(*MODELS["deit"], seed=9), SHAPE).eval())
    exporter = RouteExporter(net, SHAPE)
    images = torch.randn(2, *SHAPE)
    for index, route in enumerate(net.routes):
        file = tmp_path / f"{index}.onnx"
        exporter.export(route, file, metadata={})
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(logits), net(images, route), atol=1e-4), route


@pytest.mark.parametrize(("model", "translations"), [("deit", 1), ("resnet", 2)])
def test_an_original_anchor_shares_the_graph_unless_weights_were_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, translations: int
) -> None:
    """The weights of convolutions are multiplied by those of the batch normalisations behind them."""
    chain, original = (Chain.of(build(*MODELS[model], seed=seed), SHAPE).eval() for seed in (1, 2))
    route = Route.anchor("a", chain.depth)
    net = Supernet({"a": chain}, [route]).eval()
    net.keep_original("a", original)
    translated: list[str] = []
    translate = to_onnx._translate

    def counted(module: nn.Module, *arguments: Any) -> Any:
        translated.append("one")
        return translate(module, *arguments)

    monkeypatch.setattr(to_onnx, "_translate", counted)
    RouteExporter(net, SHAPE).export(route, tmp_path / "a.onnx", metadata={})
    assert len(translated) == translations
    images = torch.randn(2, *SHAPE)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(logits), original(images), atol=1e-4)
        assert not torch.allclose(torch.from_numpy(logits), chain(images), atol=1e-2)

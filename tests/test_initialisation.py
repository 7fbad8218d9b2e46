"""Stitching layers by least squares, against torch's own solver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_models import SHAPE, small_chain
from torch import Tensor, nn
from toys import (
    IMAGE,
    MeanHead,
    Patches,
    map_chain,
    random_batches,
    rebatched,
    same_state,
    snapshot,
    three_chains,
    token_chain,
)

from klas_zoo.chains import Chain
from klas_zoo.errors import SelectionError
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route, Seam
from klas_zoo.supernet import Supernet

BATCHES = random_batches((16, 16, 8))
TOKENS = [
    Route.stitch("tiny", 2, "small", 1, 4),
    Route.stitch("tiny", 3, "base", 4, 5),
    Route.stitch("small", 1, "base", 0, 5),
]
MAPS = [Route.stitch("tiny", 1, "small", 1, 3), Route.stitch("tiny", 3, "small", 2, 3)]


def tokens() -> Supernet:
    return Supernet(three_chains(), TOKENS).eval()


def maps() -> Supernet:
    """Seams on 8×8 and on 4×4 maps."""
    return Supernet({"tiny": map_chain(norm=True), "small": map_chain((5, 5, 9, 9), seed=1)}, MAPS).eval()


def rows(chain: Chain, position: int) -> Tensor:
    """Features after a block for all images, every token or pixel a row, in float64."""
    images = torch.cat([images for images, _ in BATCHES])
    with torch.no_grad():
        features = list(chain.walk(images))[position].double()
    return features.flatten(0, 1) if features.ndim == 3 else features.movedim(1, -1).flatten(0, 2)


def solved(net: Supernet, seam: Seam) -> tuple[Tensor, Tensor, float]:
    """Weight and bias of the least-squares fit, and the share of variance it leaves."""
    x, y = rows(net.chain(seam.source), seam.i), rows(net.chain(seam.target), seam.j)
    with_one = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(with_one, y).solution
    left = (y - with_one @ solution).square().sum() / (y - y.mean(0)).square().sum()
    return solution[:-1].T, solution[-1], left.item()


@pytest.mark.parametrize("make", [tokens, maps])
def test_with_hardly_any_ridge_a_layer_is_the_least_squares_fit(make: Callable[[], Supernet]) -> None:
    net = make()
    left = initialise_stitches(net, BATCHES, ridge=1e-9)
    assert left.keys() == set(net.seams)
    for seam in net.seams:
        weight, bias, expected = solved(net, seam)
        linear = net.stitch(seam).linear
        assert torch.allclose(linear.weight.double(), weight, rtol=1e-3, atol=1e-4), seam
        assert torch.allclose(linear.bias.double(), bias, rtol=1e-3, atol=1e-4), seam
        assert left[seam] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert 0.01 < expected < 0.99


@pytest.mark.parametrize(
    ("source", "target", "i", "j"), [("resnet", "swin", 2, 3), ("swin", "vit", 5, 2), ("levit", "resnet", 1, 5)]
)
def test_a_fit_across_layouts_pairs_the_vectors_that_lie_at_the_same_place(
    source: str, target: str, i: int, j: int
) -> None:
    chains = {source: small_chain(source), target: small_chain(target)}
    net = Supernet(chains, [Route.stitch(source, i, target, j, chains[target].depth)]).eval()
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    initialise_stitches(net, [(images, torch.zeros(8))], ridge=1e-9)
    with torch.no_grad():
        x, y = (
            by_place(list(chains[name].walk(images))[position], chains[name].layouts[position].kind).double()
            for name, position in ((source, i), (target, j))
        )
        found = by_place(net.stitch(net.seams[0])(list(chains[source].walk(images))[i]), chains[target].layouts[j].kind)
    with_one = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = with_one @ torch.linalg.lstsq(with_one, y).solution
    error, least = (found - y).square().sum(), (fitted - y).square().sum()
    assert error.item() == pytest.approx(least.item(), rel=1e-3)
    assert least < 0.97 * (y - y.mean(0)).square().sum()


def by_place(features: Tensor, kind: str) -> Tensor:
    """A vector for every place of every image, places row by row."""
    if kind == "maps":
        features = features.movedim(1, -1)
    return features.reshape(-1, features.shape[-1])


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_the_ridge_is_a_share_of_the_mean_eigenvalue_of_the_covariance(ridge: float) -> None:
    net = tokens()
    seam = net.seams[0]
    left = initialise_stitches(net, BATCHES, ridge=ridge)[seam]
    x, y = rows(net.chain(seam.source), seam.i), rows(net.chain(seam.target), seam.j)
    # ridge regression as least squares on rows of its own: ‖Xw − y‖²/n + λ‖w‖² with centred rows
    centred, wanted = x - x.mean(0), y - y.mean(0)
    strength = ridge * torch.linalg.eigvalsh(centred.T @ centred / len(x)).mean()
    extended = torch.cat([centred / len(x) ** 0.5, strength.sqrt() * torch.eye(x.shape[1]).double()])
    zeros = torch.zeros(x.shape[1], y.shape[1])
    weight = torch.linalg.lstsq(extended, torch.cat([wanted / len(x) ** 0.5, zeros])).solution
    linear = net.stitch(seam).linear
    assert torch.allclose(linear.weight.double(), weight.T, atol=1e-5)
    assert torch.allclose(linear.bias.double(), y.mean(0) - x.mean(0) @ weight, atol=1e-5)
    assert left == pytest.approx(((wanted - centred @ weight).square().sum() / wanted.square().sum()).item(), abs=1e-5)


@pytest.mark.parametrize("make", [tokens, maps])
def test_what_is_left_is_what_the_layer_itself_leaves(make: Callable[[], Supernet]) -> None:
    net = make()
    left = initialise_stitches(net, BATCHES)
    for seam in net.seams:
        linear = net.stitch(seam).linear
        x, y = rows(net.chain(seam.source), seam.i), rows(net.chain(seam.target), seam.j)
        with torch.no_grad():
            error = (y - (x @ linear.weight.double().T + linear.bias.double())).square().sum()
        assert left[seam] == pytest.approx((error / (y - y.mean(0)).square().sum()).item(), abs=1e-5)


@pytest.mark.parametrize("make", [lambda: token_chain((6,) * 4), lambda: map_chain((4, 4, 6, 6))])
def test_a_stitch_of_an_anchor_with_itself_is_the_identity(make: Callable[[], Chain]) -> None:
    routes = [Route.stitch("it", i, "it", i, 3) for i in (1, 2)]
    net = Supernet({"it": make()}, routes).eval()
    left = initialise_stitches(net, BATCHES, ridge=1e-9)
    images = BATCHES[0][0]
    for route in routes:
        linear = net.stitch(route.seams[0]).linear
        assert torch.allclose(linear.weight, torch.eye(len(linear.weight)), atol=1e-3)
        assert torch.allclose(net(images, route), net.chain("it")(images), atol=1e-4)
        assert left[route.seams[0]] < 1e-5


def test_before_the_first_block_stands_the_targets_stem() -> None:
    net = tokens()
    seam = Seam("small", 1, "base", 0)
    initialise_stitches(net, BATCHES, ridge=1e-9)
    images = torch.cat([images for images, _ in BATCHES])
    with torch.no_grad():
        x = net.chain("small").blocks[0](net.chain("small").stem(images)).flatten(0, 1)
        y = net.chain("base").stem(images).flatten(0, 1)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    assert torch.allclose(net.stitch(seam).linear.weight, solution[:-1].T, atol=1e-3)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_the_size_of_batches_does_not_matter(size: int) -> None:
    one, other = maps(), maps()
    left = initialise_stitches(one, BATCHES)
    told: list[int] = []
    again = initialise_stitches(other, rebatched(BATCHES, size), on_batch=told.append)
    assert sum(told) == 40 and max(told) == size
    for seam in one.seams:
        assert torch.allclose(one.stitch(seam).linear.weight, other.stitch(seam).linear.weight, atol=1e-4)
        assert torch.allclose(one.stitch(seam).linear.bias, other.stitch(seam).linear.bias, atol=1e-4)
        assert left[seam] == pytest.approx(again[seam], abs=1e-5)


class Shifted(nn.Module):
    """Features far from zero, as in channels of large Vision Transformers."""

    def forward(self, features: Tensor) -> Tensor:
        return features + 300.0


def test_features_far_from_zero_are_fitted_as_well_as_others() -> None:
    source = Chain(Patches(6), [Shifted()], MeanHead(6), input_shape=IMAGE).eval()
    target = Chain(source.stem, [nn.Linear(6, 7), nn.Identity()], MeanHead(7), input_shape=IMAGE).eval()
    net = Supernet({"tiny": source, "base": target}, [Route.stitch("tiny", 1, "base", 1, 2)]).eval()
    left = initialise_stitches(net, BATCHES, ridge=1e-9)[net.seams[0]]
    assert left < 1e-6
    assert torch.allclose(net.stitch(net.seams[0]).linear.weight, target.blocks[0].weight, atol=1e-4)


def test_features_that_never_change_leave_nothing_and_need_only_the_bias() -> None:
    class Constant(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.ones_like(features)

    chain = token_chain((6, 6, 6))
    chain.blocks[0] = Constant()
    net = Supernet({"tiny": chain, "base": token_chain((5, 5, 5))}, [Route.stitch("tiny", 1, "base", 1, 2)]).eval()
    assert initialise_stitches(net, BATCHES)[net.seams[0]] == pytest.approx(1.0)
    linear = net.stitch(net.seams[0]).linear
    assert torch.allclose(linear.weight, torch.zeros(5, 6))
    assert torch.allclose(linear.bias.double(), rows(net.chain("base"), 1).mean(0), atol=1e-5)
    other = Supernet({"tiny": token_chain((5, 5, 5)), "base": chain}, [Route.stitch("tiny", 1, "base", 1, 2)]).eval()
    assert initialise_stitches(other, BATCHES)[other.seams[0]] == 0.0


@pytest.mark.parametrize("training", [False, True])
def test_only_stitching_layers_change_and_anchors_run_in_evaluation_mode(training: bool) -> None:
    net = maps().train(training)
    before = {name: snapshot(chain) for name, chain in net.chains.items()}
    stitches = snapshot(net.stitches)
    initialise_stitches(net, BATCHES)
    assert all(same_state(chain, before[name]) for name, chain in net.chains.items())
    assert not same_state(net.stitches, stitches)
    assert all(part.training is training for part in net.modules())
    assert net.chain("tiny").blocks[0][-1].training_seen == {False}
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in net.parameters())


@pytest.mark.parametrize(
    ("anchor", "block", "named"),
    [("tiny", 2, "block 2 of tiny"), ("small", 1, "block 1 of small"), ("base", 0, "block 0 of base")],
)
def test_activations_that_are_not_finite_name_their_block(anchor: str, block: int, named: str) -> None:
    net = tokens()
    chain = net.chain(anchor)
    bias = chain.stem.convolution.bias if block == 0 else chain.blocks[block - 1][0].bias
    nn.init.constant_(bias, float("nan"))
    with pytest.raises(SelectionError, match=rf"^Activations after {named} are not finite\.$"):
        initialise_stitches(net, BATCHES)


def test_no_images_is_an_error_unless_there_is_nothing_to_fit() -> None:
    with pytest.raises(SelectionError, match="There are no images to fit the stitching layers to"):
        initialise_stitches(tokens(), [])
    assert initialise_stitches(Supernet(three_chains(), [Route.anchor("tiny", 3)]), []) == {}
    assert initialise_stitches(Supernet(three_chains(), [Route.anchor("tiny", 3)]), BATCHES) == {}

"""Top-1 of all routes in one pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import calls, forget_calls, map_chain, random_batches, rebatched, same_state, snapshot, three_chains

from klas_zoo.chains import Chain
from klas_zoo.errors import DataError
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate

ROUTES = [
    Route.anchor("tiny", 3),
    Route.anchor("base", 5),
    Route.stitch("tiny", 2, "small", 1, 4),
    Route.stitch("tiny", 2, "base", 2, 5),
]
BATCHES = random_batches((30, 30, 7))


@pytest.fixture
def net() -> Supernet:
    torch.manual_seed(3)
    return Supernet(three_chains(), ROUTES)


@pytest.mark.parametrize("size", [67, 10, 1])
def test_the_accuracy_of_a_route_is_the_share_of_images_it_gets_right(net: Supernet, size: int) -> None:
    told: list[int] = []
    found = evaluate(net, net.routes, rebatched(BATCHES, size), on_batch=told.append)
    assert list(found) == ROUTES
    assert sum(told) == 67
    for route in ROUTES:
        right = 0
        for images, labels in BATCHES:
            for image, label in zip(images, labels, strict=True):
                right += net.network(route)(image[None]).argmax().item() == label.item()
        assert found[route] == pytest.approx(100 * right / 67)
    assert len(set(found.values())) > 1


def test_every_shared_beginning_is_computed_once_a_batch(net: Supernet) -> None:
    for name in ("tiny", "small", "base"):
        forget_calls(net.chain(name))
    evaluate(net, net.routes, BATCHES)
    assert calls(net.chain("tiny")) == [3, 3, 3]
    assert calls(net.chain("small")) == [0, 3, 3, 3]
    assert calls(net.chain("base")) == [3, 3, 6, 6, 6]


def test_a_route_asked_for_twice_is_counted_once(net: Supernet) -> None:
    once = evaluate(net, ROUTES[:1], BATCHES)
    assert evaluate(net, ROUTES[:1] * 2, BATCHES) == once


def test_all_right_is_100_and_all_wrong_0() -> None:
    chain = Chain(nn.Identity(), [nn.Identity()], FirstClass(), input_shape=(4, 6))
    net = Supernet({"it": chain}, [Route.anchor("it", 1)])
    images = torch.zeros(3, 4, 6)
    assert evaluate(net, net.routes, [(images, torch.tensor([0, 0, 0]))]) == {net.routes[0]: 100.0}
    assert evaluate(net, net.routes, [(images, torch.tensor([1, 2, 1]))]) == {net.routes[0]: 0.0}


class FirstClass(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.eye(3)[[0] * len(features)]


def test_evaluation_is_in_evaluation_mode_and_changes_no_weight() -> None:
    chain = map_chain(norm=True).train()
    net = Supernet({"it": chain}, [Route.anchor("it", 3)]).train()
    before = snapshot(net)
    evaluate(net, net.routes, BATCHES)
    assert same_state(net, before)
    assert chain.blocks[0][-1].training_seen == {False}
    assert not net.training


def test_no_images_is_an_error(net: Supernet) -> None:
    with pytest.raises(DataError, match="There are no images to evaluate on"):
        evaluate(net, net.routes, [])

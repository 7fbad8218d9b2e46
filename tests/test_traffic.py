"""Memory traffic against numbers worked out by hand, and multiply-adds against fvcore's."""

from __future__ import annotations

import pytest
import torch
from small_models import SHAPE, small_chain
from torch import Tensor, nn
from torch.nn import functional as F

from klas_zoo.profiles.macs import chain_cost, count_macs, count_parameters
from klas_zoo.profiles.traffic import chain_traffic, observe


def seen(module: nn.Module, features: Tensor) -> tuple[int, int, int, int]:
    """Multiply-adds, activations, weights and the peak."""
    with torch.no_grad():
        traffic, output = observe(module.eval(), features)
        assert torch.equal(output, module(features))
    macs, activations, weights = (
        sum(getattr(one, name) for one in traffic.operations) for name in ("macs", "activations", "weights")
    )
    return macs, activations, weights, traffic.peak_activations


def test_a_linear_layer_reads_its_input_and_weights_and_writes_its_output() -> None:
    # 5 tokens of 8 numbers → 5 of 3
    assert seen(nn.Linear(8, 3), torch.zeros(1, 5, 8)) == (5 * 8 * 3, 5 * 8 + 5 * 3, 8 * 3 + 3, 5 * 8 + 5 * 3)


def test_a_convolution_counts_like_one() -> None:
    found = seen(nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.zeros(1, 3, 6, 6))
    assert found == (6 * 6 * 4 * 3 * 9, 3 * 36 + 4 * 36, 4 * 3 * 9, 3 * 36 + 4 * 36)


def test_attention_is_one_operator_with_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    macs, activations, _, _ = seen(Attention(), torch.randn(1, 2, 7, 4))
    assert macs == 2 * (2 * 7 * 7 * 4)
    assert activations == 2 * 7 * 4 + 2 * 7 * 4 + 2 * 7  # q, k and v are one; output, and a sum for every row


def test_views_move_nothing_and_what_is_freed_is_not_alive() -> None:
    class Views(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).unflatten(1, (2, -1)).flatten(1, 2)

    assert seen(Views(), torch.zeros(1, 5, 8)) == (0, 0, 0, 40)
    # each ReLU frees the input of the one before, the first one's input stays with the caller
    relus = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    assert seen(relus, torch.zeros(1, 5, 8)) == (0, 6 * 40, 0, 3 * 40)
    in_place = nn.Sequential(nn.ReLU(), nn.ReLU(inplace=True))
    assert seen(in_place, torch.zeros(1, 5, 8))[3] == 2 * 40


@pytest.mark.parametrize("name", ["deit", "swin", "resnet", "convnext", "levit", "efficientnet"])
def test_products_are_those_fvcore_counts_and_weights_are_read_once(name: str) -> None:
    chain = small_chain(name)
    traffic, cost = chain_traffic(chain, SHAPE), chain_cost(chain, SHAPE)
    assert len(traffic.parts) == len(chain.blocks) + 2
    products = sum(one.macs for part in traffic.parts for one in part.operations)
    # fvcore adds a few multiply-adds an element for norms, a tenth of so small a network
    assert 0.75 * cost.total.macs < products <= cost.total.macs
    weights = sum(one.weights for part in traffic.parts for one in part.operations)
    assert weights >= count_parameters(chain) * 0.95
    assert all(part.peak_activations > 0 for part in traffic.parts)


def test_activations_grow_with_the_batch_and_the_precision_and_weights_only_with_the_latter() -> None:
    with torch.no_grad():
        traffic, _ = observe(nn.Linear(8, 3), torch.zeros(1, 5, 8))
    activations, weights = 55, 27
    assert traffic.bytes_moved() == 4 * (activations + weights)
    assert traffic.bytes_moved(batch=10, bytes_each=2) == 2 * (10 * activations + weights)
    assert traffic.peak_activation_bytes(batch=10, bytes_each=2) == 2 * 10 * activations


def test_an_lstm_does_as_many_multiply_adds_as_fvcore_counts_with_our_formula() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lstm(tokens)[0]

    network, tokens = Recurrent().eval(), torch.zeros(1, 7, 8)
    assert seen(network, tokens)[0] == count_macs(network, tokens)

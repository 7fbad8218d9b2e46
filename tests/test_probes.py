"""Linear probes on the blocks of frozen anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from small_models import SHAPE, small_chain
from torch import Tensor, nn
from toys import (
    CLASSES,
    IMAGE,
    MeanHead,
    calls,
    map_chain,
    random_batches,
    same_state,
    snapshot,
    three_chains,
    token_chain,
)

from klas_zoo.chains import Chain, first_token
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.selection.pooled_features import walk_pooled
from klas_zoo.selection.probes import Probes, ProbeSettings, log_probabilities, train_probes


def separable(count: int, *, seed: int, offset: float = 0.0) -> Batch:
    """Images whose mean colour alone tells three classes apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = 0.3 * torch.randn(count, *IMAGE, generator=generator) + offset
    images += F.one_hot(labels, 3)[:, :, None, None]
    return images, labels


def epochs_of(batches: list[Batch], epochs: int) -> Iterator[Iterator[Batch]]:
    return (iter(batches) for _ in range(epochs))


def accuracies(chain: Chain, probes: Probes, batch: Batch) -> list[float]:
    """Top-1 of each probe and of the anchor, 0..1."""
    with torch.no_grad():
        best = log_probabilities(chain, probes, batch[0]).argmax(-1)
    return (best == batch[1]).double().mean(1).tolist()


@pytest.mark.parametrize("steps", [6, 60])
@pytest.mark.parametrize("offset", [0.0, 20.0], ids=["centred", "far from zero"])
def test_probes_learn_what_a_linear_map_can_tell_apart(steps: int, offset: float) -> None:
    identity = Chain(nn.Identity(), [nn.Identity(), nn.Identity()], MeanHead(3, 3), input_shape=IMAGE).eval()
    batches = [separable(32, seed=seed, offset=offset) for seed in range(steps)]
    probes = train_probes({"it": identity}, epochs_of(batches, 1), ProbeSettings(epochs=1, learning_rate=0.1))["it"]
    assert min(accuracies(identity, probes, separable(200, seed=99, offset=offset))[:2]) > 0.97
    assert not probes.training


def test_a_probe_of_features_that_say_nothing_learns_nothing() -> None:
    class Blind(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return 0 * features

    chain = Chain(nn.Identity(), [nn.Identity(), Blind()], MeanHead(3, 3), input_shape=IMAGE).eval()
    batches = [separable(32, seed=seed) for seed in range(20)]
    probes = train_probes({"it": chain}, epochs_of(batches, 1), ProbeSettings(epochs=1, learning_rate=0.1))["it"]
    seeing, blind, _ = accuracies(chain, probes, separable(300, seed=99))
    assert seeing > 0.97 > 0.5 > blind


def test_every_anchor_runs_once_per_batch_for_all_of_its_probes() -> None:
    chains = three_chains()
    before = {name: calls(chain) for name, chain in chains.items()}
    told: list[int] = []
    train_probes(chains, epochs_of(random_batches((4, 4, 3)), 2), ProbeSettings(epochs=2), on_batch=told.append)
    assert told == [4, 4, 3] * 2
    for name, chain in chains.items():
        assert [now - then for now, then in zip(calls(chain), before[name], strict=True)] == [6] * chain.depth


@pytest.mark.parametrize("training", [False, True], ids=["evaluation mode", "training mode"])
def test_anchors_stay_as_they_were(training: bool) -> None:
    chain = map_chain(norm=True).train(training)
    before = snapshot(chain)
    train_probes({"it": chain}, epochs_of(random_batches(), 2), ProbeSettings(epochs=2))
    assert same_state(chain, before)
    assert all(p.grad is None and p.requires_grad for p in chain.parameters())
    assert all(part.training is training for part in chain.modules())
    assert chain.blocks[0][-1].training_seen == {False}


def test_probes_of_one_training_do_not_depend_on_the_anchors_beside_them() -> None:
    chains = three_chains()
    batches = random_batches((8, 8, 8))
    settings = ProbeSettings(epochs=2)
    together = train_probes(chains, epochs_of(batches, 2), settings)
    for name, chain in chains.items():
        alone = train_probes({name: chain}, epochs_of(batches, 2), settings)[name]
        for key, tensor in alone.state_dict().items():
            assert torch.allclose(tensor, together[name].state_dict()[key], atol=1e-6)


def test_a_step_is_that_of_adamw_on_the_sum_of_cross_entropies() -> None:
    """Against a module written the plain way: one Linear for each block, one after the other."""
    chain = token_chain((4, 5, 6, 5))
    # every class in every batch: Adam makes whole steps of gradients that are zero but for rounding
    batches = [(images, torch.arange(len(images)) % CLASSES) for images, _ in random_batches((8, 6, 8))]
    settings = ProbeSettings(epochs=3, learning_rate=0.02, weight_decay=0.1)
    probes = train_probes({"it": chain}, epochs_of(batches, 3), settings)["it"]

    linears = [nn.Linear(width, CLASSES) for width in (5, 6, 5)]
    for parameter in (p for linear in linears for p in linear.parameters()):
        nn.init.zeros_(parameter)
    optimiser = torch.optim.AdamW([p for linear in linears for p in linear.parameters()], weight_decay=0.1)
    for rate in (0.02, 0.02 * 0.55, 0.02 * 0.1):
        optimiser.param_groups[0]["lr"] = rate
        for images, labels in batches:
            loss = torch.zeros(())
            for linear, features in zip(linears, list(chain.walk(images))[1:], strict=True):
                pooled = features.mean(1).detach()
                standard = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-6).sqrt()
                loss = loss + F.cross_entropy(linear(standard), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert torch.allclose(probes.weights["5"][0], linears[0].weight.T, atol=1e-5)
    assert torch.allclose(probes.weights["6"][0], linears[1].weight.T, atol=1e-5)
    assert torch.allclose(probes.weights["5"][1], linears[2].weight.T, atol=1e-5)
    assert torch.allclose(probes.biases["6"][0, 0], linears[1].bias, atol=1e-5)


def test_statistics_are_the_means_over_all_batches() -> None:
    chain = token_chain((4, 5, 6, 5))
    batches = random_batches((8, 8, 8, 8, 8))
    probes = train_probes({"it": chain}, epochs_of(batches, 1), ProbeSettings(epochs=1))["it"]
    pooled = [walk_pooled(chain, images)[0][2] for images, _ in batches]  # block 3, the second of width 5
    means = torch.stack([one.mean(0) for one in pooled]).mean(0)
    variances = torch.stack([one.var(0, correction=0) for one in pooled]).mean(0)
    assert torch.allclose(probes.norms["5"].mean[1, 0], means, atol=1e-5)
    assert torch.allclose(probes.norms["5"].variance[1, 0], variances, atol=1e-5)


def test_blocks_of_several_widths_keep_their_order() -> None:
    """Weights drawn at random, answers computed block by block."""
    chain = token_chain((4, 5, 6, 5, 6, 7))
    probes = Probes(chain).eval()
    with torch.no_grad():
        for tensor in (*probes.parameters(), *probes.buffers()):
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    pooled, _ = walk_pooled(chain, random_batches((3,))[0][0])
    place = {1: ("5", 0), 2: ("6", 0), 3: ("5", 1), 4: ("6", 1), 5: ("7", 0)}
    answers = probes(pooled)
    assert answers.shape == (5, 3, CLASSES)
    for block, (width, index) in place.items():
        norm = probes.norms[width]
        standard = (pooled[block - 1] - norm.mean[index]) / (norm.variance[index] + 1e-6).sqrt()
        expected = standard @ probes.weights[width][index] + probes.biases[width][index]
        assert torch.allclose(answers[block - 1], expected, atol=1e-5)


def test_the_anchors_own_answer_is_the_last() -> None:
    chain = token_chain((4, 5, 6))
    images = random_batches((3,))[0][0]
    logs = log_probabilities(chain, Probes(chain).eval(), images)
    assert logs.shape == (3, 3, CLASSES)
    assert torch.allclose(logs[2], F.log_softmax(chain(images), 1))
    assert torch.allclose(logs.exp().sum(-1), torch.ones(3, 3))
    assert torch.allclose(logs[:2].exp(), torch.full((2, 3, CLASSES), 1 / CLASSES))  # an untrained probe


def test_pooling_is_the_chains_own() -> None:
    chain = token_chain((4, 5, 6))
    images = random_batches((3,))[0][0]
    features = list(chain.walk(images))
    assert torch.equal(walk_pooled(chain, images)[0][1], features[2].mean(1))
    chain.pool = first_token
    assert torch.equal(walk_pooled(chain, images)[0][1], features[2][:, 0])
    maps = map_chain()
    assert torch.allclose(walk_pooled(maps, images)[0][0], list(maps.walk(images))[1].flatten(2).mean(2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("swin", lambda features: features.mean((1, 2))),
        ("resnet", lambda features: features.mean((2, 3))),
        ("levit", lambda features: features.mean(1)),
        ("deit", lambda features: features[:, 0]),
        ("registers-without-class", lambda features: features[:, 3:].mean(1)),
    ],
)
def test_probes_read_every_architecture_by_its_layout(name: str, expected: Callable[[Tensor], Tensor]) -> None:
    chain = small_chain(name)
    images = torch.randn(2, *SHAPE)
    with torch.no_grad():
        pooled, _ = walk_pooled(chain, images)
        features = list(chain.walk(images))
    assert all(torch.allclose(a, expected(b), atol=1e-6) for a, b in zip(pooled, features[1:], strict=True))
    assert [one.shape for one in pooled] == [(2, chain.width(k)) for k in range(1, chain.depth + 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", [1, 3])
def test_activations_that_are_not_finite_name_their_block(block: int, value: float) -> None:
    chains = three_chains()
    nn.init.constant_(chains["small"].blocks[block - 1][0].bias, value)
    chains["small"].blocks[block - 1][1] = nn.Identity()  # a tanh would tame the infinite
    for later in range(block, 4):
        chains["small"].blocks[later] = nn.Identity()
    with pytest.raises(SelectionError) as caught:
        train_probes(chains, epochs_of(random_batches(), 1), ProbeSettings(epochs=1))
    assert str(caught.value) == (
        f"The probe after block {block} of small has no finite loss: its activations overflow or the checkpoint "
        "is damaged."
    )

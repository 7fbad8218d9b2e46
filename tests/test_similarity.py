"""Θ between blocks, against loops over single images."""

from __future__ import annotations

import math
import weakref
from itertools import combinations, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import CLASSES, calls, forget_calls, map_chain, random_batches, rebatched, same_state, snapshot, three_chains

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.selection.probes import Probes, log_probabilities
from klas_zoo.selection.similarity import Similarities, measure_outputs, measure_similarities

PAIRS = list(product(("tiny", "small", "base"), repeat=2))


def drawn_probes(chains: dict[str, Chain]) -> dict[str, Probes]:
    """Probes whose answers are far from equal."""
    generator = torch.Generator().manual_seed(0)
    probes = {name: Probes(chain).eval() for name, chain in chains.items()}
    with torch.no_grad():
        for probe in probes.values():
            for parameter in probe.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return probes


@pytest.fixture
def chains() -> dict[str, Chain]:
    return three_chains()


@pytest.fixture
def probes(chains: dict[str, Chain]) -> dict[str, Probes]:
    return drawn_probes(chains)


BATCHES = random_batches((7, 7, 5))


def test_theta_is_the_mean_over_images_of_the_divergence(chains: dict[str, Chain], probes: dict[str, Probes]) -> None:
    found = measure_similarities(chains, probes, BATCHES)
    assert list(found.between) == PAIRS
    assert found.images == 19
    logs = {
        name: [log_probabilities(chain, probes[name], image[None])[:, 0] for images, _ in BATCHES for image in images]
        for name, chain in chains.items()
    }
    for f, g in PAIRS:
        expected = np.zeros((chains[f].depth + 1, chains[g].depth + 1))
        for i, j in np.ndindex(expected.shape):
            for p, q in zip(logs[f], logs[g], strict=True):
                # torch: input is log Q, target is log P, the sum is KL(P ‖ Q) in nats
                divergence = F.kl_div(q[j].double(), p[i].double(), log_target=True, reduction="sum")
                expected[i, j] += divergence.item() / 19
        assert np.allclose(found.between[f, g], expected, rtol=1e-6, atol=1e-9), (f, g)
        assert expected.std() > 0.1


def test_theta_counts_blocks_from_one_and_the_output_is_last() -> None:
    table = np.arange(12.0).reshape(3, 4)
    found = Similarities(between={("a", "b"): table}, probe_accuracy={}, images=1)
    assert found.theta("a", 1, "b", 1) == 0.0
    assert found.theta("a", 2, "b", 3) == 6.0
    assert found.of_outputs("a", "b") == 11.0


def test_theta_is_in_nats_source_first() -> None:
    """Two blocks that answer (¾, ¼) and (½, ½) for every image, worked out by hand."""
    chain = Chain(nn.Identity(), [nn.Identity(), nn.Identity()], TwoClasses(), input_shape=(4, 6))
    probes = Probes(chain).eval()
    with torch.no_grad():
        probes.biases["6"][0, 0] = torch.tensor([math.log(3.0), 0.0])
    found = measure_similarities({"it": chain}, {"it": probes}, [(torch.randn(5, 4, 6), torch.zeros(5).long())])
    assert found.theta("it", 1, "it", 2) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found.theta("it", 2, "it", 1) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert found.probe_accuracy["it"].tolist() == [100.0, 100.0, 100.0]


class TwoClasses(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(features), 2)


def test_theta_is_zero_on_the_diagonal_positive_beside_it_and_not_symmetric(
    chains: dict[str, Chain], probes: dict[str, Probes]
) -> None:
    found = measure_similarities(chains, probes, BATCHES)
    for name in chains:
        table = found.between[name, name]
        assert np.allclose(table.diagonal(), 0, atol=1e-12)
        beside = table[~np.eye(len(table), dtype=bool)]
        assert (beside > 1e-3).all()
        assert not np.allclose(table, table.T, rtol=0.05)


@pytest.mark.parametrize("size", [1, 4, 19])
def test_the_size_of_batches_does_not_matter(chains: dict[str, Chain], probes: dict[str, Probes], size: int) -> None:
    found = measure_similarities(chains, probes, BATCHES)
    other = measure_similarities(chains, probes, rebatched(BATCHES, size))
    for pair in PAIRS:
        assert np.allclose(found.between[pair], other.between[pair], atol=1e-6)
    for name in chains:
        assert np.allclose(found.probe_accuracy[name], other.probe_accuracy[name])
    assert other.images == 19


def test_the_accuracy_of_probes_is_in_per_cent_with_the_anchors_own_last(
    chains: dict[str, Chain], probes: dict[str, Probes]
) -> None:
    found = measure_similarities(chains, probes, BATCHES)
    images, labels = rebatched(BATCHES, 19)[0]
    for name, chain in chains.items():
        best = log_probabilities(chain, probes[name], images).argmax(-1)
        assert found.probe_accuracy[name].tolist() == pytest.approx(
            [100 * (one == labels).sum().item() / 19 for one in best]
        )
        assert found.probe_accuracy[name][-1] == pytest.approx(
            100 * (chain(images).argmax(1) == labels).sum().item() / 19
        )


def test_every_anchor_runs_once_per_batch(chains: dict[str, Chain], probes: dict[str, Probes]) -> None:
    for chain in chains.values():
        forget_calls(chain)
    told: list[int] = []
    measure_similarities(chains, probes, BATCHES, on_batch=told.append)
    assert told == [7, 7, 5]
    assert all(calls(chain) == [3] * chain.depth for chain in chains.values())


def test_memory_does_not_grow_with_the_number_of_images(
    chains: dict[str, Chain], probes: dict[str, Probes], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(chain: Chain, probe: Probes, images: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        logs = log_probabilities(chain, probe, images)
        alive.append(weakref.ref(logs))
        return logs

    monkeypatch.setattr("klas_zoo.selection.similarity.log_probabilities", watched)
    before = {pair: table.nbytes for pair, table in measure_similarities(chains, probes, BATCHES).between.items()}
    after = measure_similarities(chains, probes, BATCHES * 3)
    assert {pair: table.nbytes for pair, table in after.between.items()} == before
    assert len(alive) == 3 * (3 + 9)
    assert most <= 3  # one batch's, of three anchors


@pytest.mark.parametrize("training", [False, True])
def test_anchors_stay_as_they_were(training: bool) -> None:
    chain = map_chain(norm=True).train(training)
    before = snapshot(chain)
    measure_similarities({"it": chain}, drawn_probes({"it": chain}), BATCHES)
    assert same_state(chain, before)
    assert all(part.training is training for part in chain.modules())
    assert chain.blocks[0][-1].training_seen == {False}


def test_no_images_is_an_error(chains: dict[str, Chain], probes: dict[str, Probes]) -> None:
    nothing: list[Batch] = []
    with pytest.raises(SelectionError, match="There are no held-out images"):
        measure_similarities(chains, probes, nothing)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_names_its_anchor(
    chains: dict[str, Chain], probes: dict[str, Probes], value: float
) -> None:
    nn.init.constant_(chains["small"].head.linear.bias, value)
    with pytest.raises(SelectionError, match=r"^Anchor small gives probabilities that are not finite\.$"):
        measure_similarities(chains, probes, BATCHES)


def test_answers_that_are_certain_have_a_finite_divergence(
    chains: dict[str, Chain], probes: dict[str, Probes]
) -> None:
    with torch.no_grad():
        chains["tiny"].head.linear.bias.copy_(torch.tensor([500.0] + [0.0] * (CLASSES - 1)))
    found = measure_similarities(chains, probes, BATCHES)
    assert all(np.isfinite(table).all() for table in found.between.values())
    assert found.between["tiny", "tiny"][0, -1] > 100


def test_cross_entropy_is_that_of_torch_and_chance_the_share_of_the_most_frequent_class(
    chains: dict[str, Chain], probes: dict[str, Probes]
) -> None:
    found = measure_similarities(chains, probes, BATCHES)
    images, labels = rebatched(BATCHES, 19)[0]
    with torch.no_grad():
        p, q = (log_probabilities(chains[n], probes[n], images).double() for n in ("tiny", "base"))
    for i, j in np.ndindex(3, 5):
        # torch takes logits and probabilities as targets
        expected = F.cross_entropy(q[j], p[i].exp())
        assert found.cross_entropy("tiny", i + 1, "base", j + 1) == pytest.approx(expected.item(), rel=1e-6)
    assert found.chance == pytest.approx(100 * labels.bincount().max().item() / 19)


def test_outputs_alone_are_as_far_apart_as_beside_probes(chains: dict[str, Chain], probes: dict[str, Probes]) -> None:
    told: list[int] = []
    found = measure_outputs(chains, BATCHES, on_batch=told.append)
    similar = measure_similarities(chains, probes, BATCHES)
    assert found == pytest.approx({(f, g): similar.of_outputs(f, g) for f, g in combinations(chains, 2)}, rel=1e-5)
    assert told == [7, 7, 5]
    with pytest.raises(SelectionError, match="There are no held-out images"):
        measure_outputs(chains, [])


def test_a_probe_that_is_not_finite_is_named_with_its_block(
    chains: dict[str, Chain], probes: dict[str, Probes]
) -> None:
    with torch.no_grad():
        probes["small"].biases["6"][2] = float("nan")
    with pytest.raises(SelectionError, match=r"^The probe after block 3 of small gives probabilities that are not"):
        measure_similarities(chains, probes, BATCHES)

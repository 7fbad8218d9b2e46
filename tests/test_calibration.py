"""Temperatures of probes, against a search over a fine grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_similarity import drawn_probes
from toys import random_batches, three_chains

from klas_zoo.errors import SelectionError
from klas_zoo.selection.calibration import calibrate, every_other
from klas_zoo.selection.probes import log_probabilities, walk_pooled

BATCHES = random_batches((9, 8, 7))


def test_each_temperature_gives_the_least_cross_entropy() -> None:
    chains = three_chains()
    probes = drawn_probes(chains)
    tempered = calibrate(chains, probes, BATCHES)
    images = torch.cat([images for images, _ in BATCHES])
    labels = torch.cat([labels for _, labels in BATCHES])
    grid = torch.linspace(0.1, 15.9, 3000).double()
    for name, chain in chains.items():
        with torch.no_grad():
            logits = probes[name](walk_pooled(chain, images)[0]).double()
        for block, one in enumerate(logits):
            losses = torch.stack([F.cross_entropy(one / t, labels) for t in grid])
            found = tempered[name].temperatures[block].double()
            reached = F.cross_entropy(one / found, labels)
            assert reached <= losses.min() + 1e-4, (name, block)


def test_a_probe_made_twice_as_sure_gets_twice_the_temperature() -> None:
    chains = three_chains()
    generator = torch.Generator().manual_seed(0)
    # labels drawn from the probe's own distribution: its best temperature is near 1
    probes = drawn_probes(chains)
    images = torch.randn(400, 3, 8, 8, generator=generator)
    with torch.no_grad():
        distribution = log_probabilities(chains["base"], probes["base"], images)[1].exp()
    labels = torch.multinomial(distribution, 1, generator=generator)[:, 0]
    first = calibrate(chains, probes, [(images, labels)])["base"].temperatures[1].item()
    assert first == pytest.approx(1, abs=0.25)
    with torch.no_grad():
        for parameter in (*probes["base"].weights.values(), *probes["base"].biases.values()):
            parameter.mul_(2)
    assert calibrate(chains, probes, [(images, labels)])["base"].temperatures[1].item() == pytest.approx(
        2 * first, rel=0.01
    )


def test_an_anchors_own_answers_keep_their_temperature() -> None:
    chains = three_chains()
    probes = drawn_probes(chains)
    tempered = calibrate(chains, probes, BATCHES)
    images = BATCHES[0][0]
    plain, cooled = (log_probabilities(chains["tiny"], one["tiny"], images) for one in (probes, tempered))
    assert torch.equal(plain[-1], cooled[-1])
    assert not torch.allclose(plain[0], cooled[0])


@pytest.mark.parametrize("sizes", [(9, 8, 7), (1, 1, 1, 1), (2,)])
def test_the_two_halves_are_all_images_once(sizes: tuple[int, ...]) -> None:
    stream = random_batches(sizes)
    labels = torch.arange(sum(sizes)).split(list(sizes))
    numbered = [(images, one) for (images, _), one in zip(stream, labels, strict=True)]
    halves = [torch.cat([label for _, label in every_other(numbered, start)]).tolist() for start in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(sum(sizes)))
    assert set(halves[0]) == set(range(0, sum(sizes), 2))


def test_no_images_is_an_error() -> None:
    chains = three_chains()
    with pytest.raises(SelectionError, match="There are no held-out images to calibrate probes on"):
        calibrate(chains, drawn_probes(chains), [])

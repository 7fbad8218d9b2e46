"""Linear CKA of all block pairs at once, against one pair at a time by its definition."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from toys import IMAGE, MeanHead, calls, forget_calls, map_chain, random_batches, three_chains, token_chain

from klas_zoo.chains import Chain
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Seam
from klas_zoo.selection.cka import measure_cka

BATCHES = random_batches((9, 9))


def flat(chain: Chain, block: int, images: Tensor) -> Tensor:
    """Features after a block, a row for each image, every feature less its mean, in float64."""
    with torch.no_grad():
        features = list(chain.walk(images))[block].double().flatten(1)
    return features - features.mean(0)


def hsic(x: Tensor, y: Tensor) -> float:
    """⟨X Xᵀ, Y Yᵀ⟩ as the squared norm of Yᵀ X, over (B − 1)²."""
    return float((y.T @ x).square().sum() / (len(x) - 1) ** 2)


def by_definition(source: Chain, i: int, target: Chain, j: int) -> float:
    sums = [0.0, 0.0, 0.0]
    for images, _ in BATCHES:
        x, y = flat(source, i, images), flat(target, j, images)
        for k, (a, b) in enumerate(((x, y), (x, x), (y, y))):
            sums[k] += hsic(a, b)
    return sums[0] / math.sqrt(sums[1] * sums[2])


def seams_of(chains: dict[str, Chain], source: str, target: str) -> list[Seam]:
    depths = chains[source].depth, chains[target].depth
    return [Seam(source, i, target, j) for i in range(1, depths[0] + 1) for j in range(1, depths[1])]


@pytest.mark.parametrize("kind", ["tokens", "maps"])
def test_all_pairs_at_once_are_each_pair_by_definition(kind: str) -> None:
    chains = three_chains() if kind == "tokens" else {"tiny": map_chain(), "base": map_chain((5, 5, 9, 9), norm=True)}
    seams = [*seams_of(chains, "tiny", "base")] + (seams_of(chains, "tiny", "small") if kind == "tokens" else [])
    found = measure_cka(chains, seams, BATCHES)
    assert list(found) == seams
    for seam in seams:
        expected = by_definition(chains[seam.source], seam.i, chains[seam.target], seam.j)
        assert found[seam] == pytest.approx(expected, rel=1e-4), seam
        assert 0 < found[seam] <= 1


def test_an_anchor_is_like_itself_and_scale_and_rotation_do_not_matter() -> None:
    chain = token_chain((6,) * 4)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))
    turn = nn.Linear(6, 6, bias=False)
    turn.weight = nn.Parameter(7 * rotation)
    turned = Chain(chain.stem, [chain.blocks[0], turn, chain.blocks[1]], chain.head, input_shape=chain.input_shape)
    found = measure_cka({"it": chain, "turned": turned}, [Seam("it", 1, "it", 1), Seam("it", 1, "turned", 2)], BATCHES)
    assert list(found.values()) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_every_anchor_runs_once_per_batch_and_only_those_asked_for() -> None:
    chains = three_chains()
    for chain in chains.values():
        forget_calls(chain)
    told: list[int] = []
    measure_cka(chains, seams_of(chains, "tiny", "base"), BATCHES, on_batch=told.append)
    assert [set(calls(chain)) for chain in chains.values()] == [{2}, {0}, {2}]
    assert told == [9, 9]


def test_features_that_never_change_are_like_nothing() -> None:
    chains = three_chains()
    nn.init.zeros_(chains["base"].blocks[1][0].weight)
    assert measure_cka(chains, [Seam("tiny", 1, "base", 2)], BATCHES) == {Seam("tiny", 1, "base", 2): 0.0}


@pytest.mark.parametrize("offset", [3.0, 30.0, 300.0])  # centred as products, nearly, and as features
def test_an_offset_that_all_images_share_does_not_matter(offset: float) -> None:
    chain = token_chain((6,) * 4)
    shift = nn.Linear(6, 6)
    nn.init.eye_(shift.weight), nn.init.constant_(shift.bias, offset)
    shifted = Chain(chain.stem, [chain.blocks[0], shift], chain.head, input_shape=chain.input_shape)
    seams = [Seam("it", i, "shifted", j) for i in (1, 2) for j in (1, 2)]
    plain, moved, *others = measure_cka({"it": chain, "shifted": shifted}, seams, BATCHES).values()
    assert plain == pytest.approx(1.0) and others[0] < 0.99
    assert (moved, others[1]) == pytest.approx((plain, others[0]), abs=1e-4)


def test_activations_that_are_not_finite_name_their_block() -> None:
    chains = three_chains()
    nn.init.constant_(chains["base"].blocks[1][0].bias, float("nan"))
    with pytest.raises(SelectionError, match=r"^Activations after block 2 of base are not finite\.$"):
        measure_cka(chains, [Seam("tiny", 1, "base", 2)], BATCHES)


@pytest.mark.parametrize("sizes", [(), (1, 1)])
def test_no_two_images_at_a_time_is_an_error(sizes: tuple[int, ...]) -> None:
    with pytest.raises(SelectionError, match="CKA needs at least one batch of two images or more"):
        measure_cka(three_chains(), [Seam("tiny", 1, "base", 2)], random_batches(sizes) if sizes else [])


class Tokens(nn.Module):
    """Images (B, 3, 8, 8) → tokens (B, 64, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(2).transpose(1, 2))


def test_all_pairs_at_once_take_a_tenth_of_the_time_of_a_loop_over_pairs() -> None:
    """The loop is how libraries do it: two Gram matrices and three centred HSICs for every pair."""
    chains = {
        name: Chain(Tokens(width), [nn.Identity() for _ in range(12)], MeanHead(width), input_shape=IMAGE).eval()
        for name, width in (("tiny", 32), ("small", 48), ("base", 64))
    }
    batches = random_batches((128,))
    seams = [seam for pair in combinations(chains, 2) for seam in seams_of(chains, *pair)]

    def loop() -> None:
        centre = torch.eye(128) - 1 / 128
        for images, _ in batches:
            with torch.no_grad():
                features = {name: [f.flatten(1) for f in chain.walk(images)] for name, chain in chains.items()}
            for seam in seams:
                k, m = (f @ f.T for f in (features[seam.source][seam.i], features[seam.target][seam.j]))
                for a, b in ((k, m), (k, k), (m, m)):
                    (centre @ a @ centre @ b).trace()

    def seconds(job: Callable[[], object]) -> float:
        started = time.process_time()
        job()
        return time.process_time() - started

    def measured() -> None:
        measure_cka(chains, seams, batches)

    fast, slow = (min(seconds(job) for _ in range(3)) for job in (measured, loop))
    assert fast < slow / 10

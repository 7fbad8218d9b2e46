"""Features of frozen anchors are stored, and probes learn from them as they do from the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from toys import calls, data_of, forget_calls, random_batches, three_chains, token_chain

from klas_zoo.data.loading import Data, Split
from klas_zoo.errors import SelectionError, UsageError
from klas_zoo.processes.team import Team
from klas_zoo.selection import measuring
from klas_zoo.selection.measuring import MeasurementImages, images_of, learn_probes
from klas_zoo.selection.pooled_features import bytes_of, pool_features, walk_pooled
from klas_zoo.selection.probes import Probes, ProbeSettings

PROBING = ProbeSettings(epochs=3, batch=8)
DATA = data_of(random_batches((30,)), random_batches((10,), seed=1))


def streams(data: Data = DATA, **changes: object) -> MeasurementImages:
    return images_of(data, **{"probing": PROBING, "batch": 7, "init_images": 8, "seed": 5} | changes)  # type: ignore[arg-type]


def learned(images: MeasurementImages, probing: ProbeSettings = PROBING) -> tuple[dict[str, Probes], dict[str, int]]:
    """Probes, and what every stage told of its work."""
    told: dict[str, int] = {}

    @contextmanager
    def stage(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        told[name] = 0

        def advance(work: int, remark: str) -> None:
            told[name] += work

        yield advance

    return learn_probes(three_chains(), images, probing, stage=stage), told


def same(one: dict[str, Probes], other: dict[str, Probes]) -> bool:
    return all(
        torch.allclose(tensor, other[name].state_dict()[key], atol=1e-5)
        for name, probes in one.items()
        for key, tensor in probes.state_dict().items()
    )


def test_probes_of_stored_features_are_those_of_the_images() -> None:
    """30 images in batches of 8: every epoch leaves out 6, each time others."""
    stored, told = learned(streams())
    streamed, told_of_images = learned(replace(streams(), order=None))
    assert same(stored, streamed)
    assert told == {"features": 30, "probes": 3 * 24} and told_of_images == {"probes": 3 * 24}
    assert not same(stored, learned(streams(seed=6))[0])


def test_every_image_passes_through_the_anchors_once() -> None:
    chains = three_chains()
    for chain in chains.values():
        chain.width(1)  # runs once to see the shapes
        forget_calls(chain)
    learn_probes(chains, streams(), PROBING)
    assert {count for chain in chains.values() for count in calls(chain)} == {5}  # batches of 7


def test_features_that_take_too_much_memory_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = bytes_of(three_chains(), 30)
    for limit, stages in ((needed, ["features", "probes"]), (needed - 1, ["probes"])):
        monkeypatch.setattr(measuring, "MOST_BYTES", limit)
        assert list(learned(streams())[1]) == stages


def test_one_epoch_stores_nothing() -> None:
    once = replace(PROBING, epochs=1)
    assert list(learned(streams(probing=once), once)[1]) == ["probes"]


def test_images_that_are_augmented_are_seen_anew_in_every_epoch() -> None:
    train = Split(DATA.train.source, DATA.train.indices, DATA.train.transform, random=True)
    assert list(learned(streams(replace(DATA, train=train)))[1]) == ["probes"]


def test_features_are_found_by_position() -> None:
    chain = token_chain((4, 5, 6))
    ((images, labels),) = random_batches((6,))
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    batches = [(part, (images[part], labels[part])) for part in order.split(4)]
    stored = pool_features({"it": chain}, batches, 6)
    with torch.no_grad():
        expected, _ = walk_pooled(chain, images)
    found = stored.at("it", torch.tensor([5, 2]))
    assert all(torch.allclose(a, b[[5, 2]], atol=1e-6) for a, b in zip(found, expected, strict=True))
    ((positions, truth),) = stored.batches([torch.tensor([3, 3, 0])])
    assert positions.tolist() == [3, 3, 0] and torch.equal(truth, labels[[3, 3, 0]])
    assert bytes_of({"it": chain}, 6) == sum(4 * block.numel() for block in stored.blocks["it"])


@pytest.mark.parametrize("count", [28, 30, 38, 42])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_team_has_done_adds_up(monkeypatch: pytest.MonkeyPatch, count: int, rank: int) -> None:
    """Whole batches of 7 by turns; the first process reports, and may have a batch more, or a longer one."""
    monkeypatch.setattr(Team, "all_reduce", lambda team, values: values)
    order = streams(data_of(random_batches((count,)), random_batches()), team=(team := Team(rank, 2))).order
    assert order is not None
    told: list[int] = []
    stored = pool_features(three_chains(), order.images(), count, team=team, on_batch=told.append)
    assert sum(told) == count if rank == 0 else 0 < sum(told) <= count
    # of the other's images there are zeros, which a sum over processes fills in
    own = (torch.arange(count) // 7) % 2 == rank
    assert torch.equal(stored.blocks["tiny"][0].ne(0).any(1), own)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Team, "all_reduce", lambda team, values: values)
    with pytest.raises(UsageError, match="A batch of 8 images cannot be shared by 3 processes evenly"):
        learn_probes(three_chains(), streams(team=Team(0, 3)), PROBING, team=Team(0, 3))


def test_activations_that_are_not_finite_name_their_block() -> None:
    chains = three_chains()
    torch.nn.init.constant_(chains["base"].blocks[1][0].bias, float("nan"))
    with pytest.raises(SelectionError, match="after block 2 of base has no finite loss"):
        learn_probes(chains, streams(), PROBING)

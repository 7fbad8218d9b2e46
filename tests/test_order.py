"""Which image comes when: every image once per epoch, whoever counts and wherever counting starts."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.data.order import Draw, in_order, shuffled
from klas_zoo.processes.team import ALONE, Team

LENGTHS, SHARES, SIZES = st.integers(1, 60), st.integers(1, 7), st.integers(1, 4)


def stream(
    length: int, size: int, count: int, *, seed: int = 0, start: int = 0, team: Team = ALONE
) -> list[list[Draw]]:
    return list(islice(shuffled(length, size, seed, True, start, team), count))


@given(LENGTHS, SHARES, SIZES, st.integers(1, 3))
def test_every_image_is_seen_once_per_epoch_over_all_processes(length: int, share: int, size: int, epochs: int) -> None:
    batch = share * size
    parts = [stream(length, batch, -(-epochs * length // batch), team=Team(rank, size)) for rank in range(size)]
    # batch by batch the shares of all processes, in the order of ranks
    seen = [draw.position for batches in zip(*parts, strict=True) for part in batches for draw in part]
    for epoch in range(epochs):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(LENGTHS, SHARES, SIZES)
def test_a_team_sees_the_batches_of_one_process(length: int, share: int, size: int) -> None:
    batch = share * size
    alone = stream(length, batch, 5)
    parts = [stream(length, batch, 5, team=Team(rank, size)) for rank in range(size)]
    assert alone == [[draw for part in shares for draw in part] for shares in zip(*parts, strict=True)]


@given(LENGTHS, SHARES, st.integers(0, 20))
def test_a_stream_can_be_gone_on_with_at_any_batch(length: int, size: int, start: int) -> None:
    assert stream(length, size, 4, start=start) == stream(length, size, start + 4)[start:]


def test_orders_and_seeds_differ_from_epoch_to_epoch_and_from_seed_to_seed() -> None:
    first, second = stream(50, 50, 2)
    (other,) = stream(50, 50, 1, seed=1)
    assert len({tuple(draw.position for draw in one) for one in (first, second, other)}) == 3
    assert len({draw.seed for one in (first, second, other) for draw in one}) == 150


@given(LENGTHS, st.integers(1, 20), SIZES)
def test_images_in_order_go_to_the_processes_batch_by_batch(length: int, size: int, team: int) -> None:
    parts = [list(in_order(length, size, Team(rank, team))) for rank in range(team)]
    seen = Counter(draw.position for part in parts for batch in part for draw in batch)
    assert seen == Counter(range(length))
    assert [draw.position for batch in in_order(length, size, ALONE) for draw in batch] == list(range(length))


@pytest.mark.parametrize(("length", "batches"), [(10, 3), (9, 3), (2, 0)])
def test_one_epoch_leaves_out_what_fills_no_batch(length: int, batches: int) -> None:
    found = list(shuffled(length, 3, 0, False, 0, ALONE))
    assert len(found) == batches
    assert len({draw.position for batch in found for draw in batch}) == 3 * batches

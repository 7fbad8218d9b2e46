"""Routes, their names and their round trips."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.routes import Route, Seam, Segment

THREE = Route((Segment("tiny", 1, 3), Segment("small", 3, 5), Segment("base", 6, 8)))
SEGMENTS = st.builds(
    lambda anchor, first, length: Segment(anchor, first, first + length),
    st.sampled_from(["tiny", "small", "base"]),
    st.integers(1, 20),
    st.integers(0, 20),
)


def test_an_anchor_is_a_route_of_all_its_blocks_and_bears_its_name() -> None:
    route = Route.anchor("tiny", 4)
    assert route.segments == (Segment("tiny", 1, 4),)
    assert (str(route), route.is_anchor, route.seams) == ("tiny", True, ())


def test_a_stitch_runs_i_blocks_of_the_source_and_all_after_j_of_the_target() -> None:
    route = Route.stitch("tiny", 3, "base", 5, depth=8)
    assert route.segments == (Segment("tiny", 1, 3), Segment("base", 6, 8))
    assert str(route) == "tiny.1-3+base.6-8"
    assert not route.is_anchor
    assert route.seams == (Seam("tiny", 3, "base", 5),)
    assert str(route.seams[0]) == "tiny.3+base.5"


def test_a_stitch_may_keep_every_block_of_both() -> None:
    route = Route.stitch("tiny", 4, "base", 0, depth=8)
    assert sum(s.last - s.first + 1 for s in route.segments) == 4 + 8


def test_a_route_may_have_several_seams() -> None:
    assert THREE.seams == (Seam("tiny", 3, "small", 2), Seam("small", 5, "base", 5))
    assert str(THREE) == "tiny.1-3+small.3-5+base.6-8"


@pytest.mark.parametrize(("first", "last"), [(0, 3), (-1, 3), (4, 3)])
def test_a_segment_that_does_not_run_forward_is_a_bug(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="runs forward from block 1"):
        Segment("tiny", first, last)


@pytest.mark.parametrize(("i", "j"), [(0, 5), (3, 8), (3, -1)])
def test_a_stitch_without_blocks_of_both_is_a_bug(i: int, j: int) -> None:
    with pytest.raises(ValueError, match="runs forward"):
        Route.stitch("tiny", i, "base", j, depth=8)


def test_a_route_of_nothing_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        Route(())


def test_a_route_that_starts_in_the_middle_is_a_bug() -> None:
    with pytest.raises(ValueError, match="starts with the first block"):
        Route((Segment("tiny", 2, 3),))


def test_json_is_the_segments() -> None:
    assert THREE.to_json() == [["tiny", 1, 3], ["small", 3, 5], ["base", 6, 8]]


@given(st.integers(1, 20), st.lists(SEGMENTS, max_size=4))
def test_a_route_comes_back_from_json(last: int, rest: list[Segment]) -> None:
    route = Route((Segment("tiny", 1, last), *rest))
    assert Route.from_json(json.loads(json.dumps(route.to_json()))) == route
    assert len(route.seams) == len(rest)


@given(st.lists(SEGMENTS, min_size=1, max_size=3), st.lists(SEGMENTS, min_size=1, max_size=3))
def test_routes_of_several_segments_have_names_of_their_own(one: list[Segment], other: list[Segment]) -> None:
    start = Segment("tiny", 1, 2)
    first, second = Route((start, *one)), Route((start, *other))
    assert (str(first) == str(second)) == (first == second)
    assert {first: 1}.get(second) == (1 if first == second else None)

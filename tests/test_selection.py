"""Which stitches are chosen: Γ, buckets, τ and coverage, against a second writing of the rules."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import IMAGE, calls, map_chain, token_chain

from klas_zoo import selection as selecting
from klas_zoo.chains import Chain, Layout
from klas_zoo.errors import SelectionError, UnknownName
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection
from klas_zoo.selection.candidates import CostFunction, SelectionSettings
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.pairs import choose_pairs, stitchable_pairs
from klas_zoo.selection.scoring import LEAST_CAPACITY
from klas_zoo.selection.similarity import Similarities

DEPTHS = {"tiny": 4, "small": 5, "base": 6}
PER_BLOCK = {"tiny": 1.0, "small": 3.0, "base": 10.0}
CHAINS = {
    "tiny": token_chain((4,) * 5),
    "small": token_chain((5,) * 6),
    "base": token_chain((6,) * 7),
}


def cost(route: Route) -> float:
    blocks = sum(PER_BLOCK[s.anchor] * (s.last - s.first + 1) for s in route.segments)
    return blocks + 0.25 * len(route.seams)


def drawn(
    seed: int, chains: dict[str, Chain] = CHAINS, *, outputs: dict[tuple[str, str], float] | None = None
) -> Similarities:
    """Θ drawn at random; `outputs` between the anchors' own answers."""
    generator = np.random.default_rng(seed)
    names = list(chains)
    between = {}
    same = [(name, name) for name in names]
    for f, g in [*combinations(names, 2), *same, *combinations(names[::-1], 2)]:
        between[f, g] = generator.uniform(0.01, 2, (chains[f].depth + 1, chains[g].depth + 1))
        if outputs and (f, g) in outputs:
            between[f, g][-1, -1] = outputs[f, g]
    return Similarities(between=between, probe_accuracy={}, images=1)


def select(
    chains: dict[str, Chain], similarities: Similarities, cost: CostFunction, settings: SelectionSettings
) -> Selection:
    return selecting.select(chains, Measurements(probes=similarities), cost, settings)


def chosen(selection: Selection) -> dict[tuple[str, int, str, int], str]:
    return {(c.source, c.i, c.target, c.j): c.reason for c in selection.chosen}


PAIR = (("tiny", "base"),)


def by_hand(
    similarities: Similarities, source: str, target: str, buckets: int, tolerance: float
) -> dict[tuple[int, int], str]:
    """The published rule, written down once more, for one pair: (i, j) → reason."""
    low, high = (PER_BLOCK[name] * DEPTHS[name] for name in (source, target))
    gamma, bucket = {}, {}
    for i in range(1, DEPTHS[source] + 1):
        for j in range(1, DEPTHS[target]):
            price = i * PER_BLOCK[source] + (DEPTHS[target] - j) * PER_BLOCK[target] + 0.25
            if low < price < high:
                # index k − 1 is the probe after block k
                mismatch = similarities.between[source, target][i - 1, j - 1]
                capacity = similarities.between[target, target][j - 1, j]
                gamma[i, j] = mismatch / capacity
                bucket[i, j] = math.floor((price - low) / ((high - low) / buckets))
    reasons = {}
    for number in set(bucket.values()):
        inside = [key for key in gamma if bucket[key] == number]
        best = min(inside, key=gamma.__getitem__)
        reasons |= {key: "tied" for key in inside if gamma[key] <= (1 + tolerance) * gamma[best]}
        reasons[best] = "best"
    for j in {j for _, j in gamma}:
        if j not in {entered for _, entered in reasons}:
            reasons[min((key for key in gamma if key[1] == j), key=gamma.__getitem__)] = "covers"
    return reasons


def test_stitches_run_down_from_the_larger_anchor_when_asked() -> None:
    similarities = drawn(0)
    found = select(CHAINS, similarities, cost, SelectionSettings(pairs=PAIR, direction="down"))
    assert found.pairs == PAIR
    assert {(c.source, c.target) for c in found.candidates} == {("base", "tiny")}
    whole = {name: PER_BLOCK[name] * DEPTHS[name] for name in ("tiny", "base")}
    expected = {
        (i, j): price
        for i in range(1, DEPTHS["base"] + 1)
        for j in range(1, DEPTHS["tiny"])
        if whole["tiny"]
        < (price := i * PER_BLOCK["base"] + (DEPTHS["tiny"] - j) * PER_BLOCK["tiny"] + 0.25)
        < whole["base"]
    }
    assert {(c.i, c.j): c.cost for c in found.candidates} == expected
    for one in found.candidates:
        assert one.mismatch == similarities.theta("base", one.i, "tiny", one.j)
        assert one.capacity == similarities.theta("tiny", one.j, "tiny", one.j + 1)
        assert one.bucket == math.floor(20 * (one.cost - whole["tiny"]) / (whole["base"] - whole["tiny"]))


@pytest.mark.parametrize(("buckets", "each"), [(20, 10), (5, 3), (1, 1)])
@pytest.mark.parametrize("selector", ["klas", "random"])
def test_both_directions_have_half_of_the_buckets_each(selector: str, buckets: int, each: int) -> None:
    settings = SelectionSettings(pairs=PAIR, direction="both", buckets=buckets, selector=selector)
    both = select(CHAINS, drawn(0), cost, settings)
    up, down = (
        select(CHAINS, drawn(0), cost, replace(settings, direction=way, buckets=each)) for way in ("up", "down")
    )
    assert [replace(c, reason="") for c in both.candidates] == [
        replace(c, reason="") for c in (*up.candidates, *down.candidates)
    ]
    if selector == "klas":
        assert both.chosen == (*up.chosen, *down.chosen)
    assert [len(found.chosen) for found in (up, down)] == [
        sum(c.source == source for c in both.chosen) for source in PAIR[0]
    ]
    empty = both.empty_buckets
    assert empty.get(PAIR[0], ()) == up.empty_buckets.get(PAIR[0], ())
    assert empty.get(PAIR[0][::-1], ()) == down.empty_buckets.get(PAIR[0][::-1], ())


def test_what_was_measured_from_small_to_large_only_does_not_do_for_the_other_way() -> None:
    similarities = drawn(0)
    del similarities.between["base", "tiny"]
    with pytest.raises(SelectionError, match="Θ from base to tiny was not measured: build again to stitch that way"):
        select(CHAINS, similarities, cost, SelectionSettings(pairs=PAIR, direction="down"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("buckets", "tolerance"), [(20, 0.05), (3, 0.5), (1, 0.0), (7, 0.2)])
@pytest.mark.parametrize("pair", [("tiny", "base"), ("tiny", "small"), ("small", "base")], ids=":".join)
def test_selection_follows_the_published_rule(seed: int, buckets: int, tolerance: float, pair: tuple[str, str]) -> None:
    similarities = drawn(seed)
    settings = SelectionSettings(buckets=buckets, tolerance=tolerance, pairs=(pair,))
    selection = select(CHAINS, similarities, cost, settings)
    expected = by_hand(similarities, *pair, buckets, tolerance)
    assert {(c.i, c.j): c.reason for c in selection.chosen} == expected
    assert selection.pairs == (pair,)
    assert selection.settings is settings
    assert set(selection.routes) == {Route.stitch(pair[0], i, pair[1], j, DEPTHS[pair[1]]) for i, j in expected}


def test_a_score_is_mismatch_over_capacity() -> None:
    similarities = drawn(0)
    similarities.between["tiny", "base"][2, 3] = 0.6  # block 3 of tiny, block 4 of base
    similarities.between["base", "base"][3, 4] = 0.4  # blocks 4 and 5 of base
    similarities.between["base", "base"][4, 3] = 9.0  # the other direction is not asked for
    selection = select(CHAINS, similarities, cost, SelectionSettings(pairs=PAIR))
    found = next(c for c in selection.candidates if (c.i, c.j) == (3, 4))
    assert (found.mismatch, found.capacity, found.score) == (0.6, 0.4, pytest.approx(1.5))
    assert found.route == Route.stitch("tiny", 3, "base", 4, 6)
    assert found.route.seams == (Seam("tiny", 3, "base", 4),)
    assert found.cost == 3 * 1 + 2 * 10 + 0.25


def test_a_target_block_that_changes_nothing_has_the_least_capacity() -> None:
    similarities = drawn(0)
    similarities.between["base", "base"][3, 4] = 0.0
    similarities.between["base", "base"][2, 3] = -1e-17  # rounding
    similarities.between["tiny", "base"][2, 3] = 0.5
    similarities.between["tiny", "base"][2, 2] = -1e-17
    candidates = select(CHAINS, similarities, cost, SelectionSettings(pairs=PAIR)).candidates
    scores = {(c.i, c.j): c.score for c in candidates}
    assert scores[3, 4] == pytest.approx(0.5 / LEAST_CAPACITY)
    assert scores[3, 3] == 0.0


@pytest.mark.parametrize(
    ("share", "bucket"), [(0.001, 0), (0.2499, 0), (0.25, 1), (0.4999, 1), (0.5, 2), (0.75, 3), (0.9999, 3)]
)
def test_a_bucket_includes_its_lower_edge(share: float, bucket: int) -> None:
    route = Route.stitch("tiny", 2, "base", 3, 6)

    def priced(one: Route) -> float:
        whole = {"tiny": 100.0, "small": 150.0, "base": 200.0}
        if one.is_anchor:
            return whole[one.segments[0].anchor]
        return 100 + 100 * share if one == route else 199.0

    candidates = select(CHAINS, drawn(0), priced, SelectionSettings(buckets=4, pairs=PAIR)).candidates
    assert next(c.bucket for c in candidates if c.route == route) == bucket


def test_only_stitches_between_the_anchors_in_cost_are_candidates() -> None:
    def priced(route: Route) -> float:
        whole = {"tiny": 100.0, "small": 150.0, "base": 200.0}
        if route.is_anchor:
            return whole[route.segments[0].anchor]
        # as small as the source, as large as the target, beyond both, and one in between
        seam = route.seams[0]
        return {(1, 1): 100.0, (1, 2): 200.0, (2, 1): 50.0, (2, 2): 250.0, (3, 3): 130.0}.get((seam.i, seam.j), 0.0)

    selection = select(CHAINS, drawn(0), priced, SelectionSettings(pairs=PAIR))
    assert [(c.i, c.j, c.reason) for c in selection.candidates] == [(3, 3, "best")]


@pytest.mark.parametrize(("excess", "reason"), [(1.0, "tied"), (1.0499, "tied"), (1.0501, "")])
def test_what_is_within_tau_of_the_best_is_kept(excess: float, reason: str) -> None:
    similarities = drawn(0)
    similarities.between["base", "base"][:] = 1.0
    similarities.between["tiny", "base"][:] = 10.0
    similarities.between["tiny", "base"][1, 1] = 2.0
    similarities.between["tiny", "base"][0, 1] = 2.0 * excess
    selection = select(CHAINS, similarities, cost, SelectionSettings(buckets=1, pairs=PAIR))
    marks = {(c.i, c.j): c.reason for c in selection.candidates}
    assert marks[2, 2] == "best"
    assert marks[1, 2] == ("best" if excess == 1.0 else reason)


def test_every_target_block_is_entered_by_its_best_stitch() -> None:
    similarities = drawn(0)
    similarities.between["tiny", "base"][2, 0] = 0.0001  # far better than all others
    selection = select(CHAINS, similarities, cost, SelectionSettings(buckets=1, tolerance=0.0, pairs=PAIR))
    marks = chosen(selection)
    assert {j for _, _, _, j in marks} == {c.j for c in selection.candidates} == {1, 2, 3, 4, 5}
    assert sorted(marks.values()) == ["best"] + ["covers"] * 4
    for _, i, _, j in (key for key, reason in marks.items() if reason == "covers"):
        scores = {c.i: c.score for c in selection.candidates if c.j == j}
        assert min(scores, key=scores.__getitem__) == i


@pytest.mark.parametrize(
    ("distances", "pairs"),
    [
        # Swin: from Ti, B is nearer than S is (KLAS stitches Ti→B)
        ({("Ti", "S"): 0.36, ("S", "B"): 0.20, ("Ti", "B"): 0.35}, (("Ti", "B"),)),
        # DeiT: S is nearer (KLAS stitches Ti→S and S→B)
        ({("Ti", "S"): 0.30, ("S", "B"): 0.20, ("Ti", "B"): 0.35}, (("Ti", "S"), ("S", "B"))),
        # what cannot be stitched is left out
        ({("Ti", "S"): 0.30, ("S", "B"): 0.20}, (("Ti", "S"), ("S", "B"))),
        ({("Ti", "B"): 9.0, ("S", "B"): 0.2}, (("Ti", "B"),)),
        ({("Ti", "S"): 0.30}, (("Ti", "S"),)),
        ({("S", "B"): 0.30}, (("S", "B"),)),
        ({}, ()),
    ],
    ids=["Swin", "DeiT", "no shortcut", "only the shortcut", "only below", "only above", "nothing"],
)
def test_every_anchor_on_the_way_is_stitched_to_the_larger_one_of_the_nearest_output(
    distances: dict[tuple[str, str], float], pairs: tuple[tuple[str, str], ...]
) -> None:
    assert choose_pairs(["Ti", "S", "B"], distances) == pairs


@given(st.integers(2, 6), st.data())
def test_the_way_spans_the_family_and_no_step_has_a_nearer_end(count: int, data: st.DataObject) -> None:
    names = [f"a{index}" for index in range(count)]
    lengths = {pair: data.draw(st.floats(0, 10)) for pair in combinations(names, 2)}
    pairs = choose_pairs(names, lengths)
    assert pairs[0][0] == names[0] and pairs[-1][1] == names[-1]
    assert all(before[1] == after[0] for before, after in pairwise(pairs))
    for source, target in pairs:
        assert lengths[source, target] == min(length for pair, length in lengths.items() if pair[0] == source)


@pytest.mark.parametrize(
    ("outputs", "pairs"),
    [
        ({("tiny", "small"): 0.36, ("small", "base"): 0.2, ("tiny", "base"): 0.35}, PAIR),
        (
            {("tiny", "small"): 0.3, ("small", "base"): 0.2, ("tiny", "base"): 0.35},
            (("tiny", "small"), ("small", "base")),
        ),
    ],
    ids=["Swin", "DeiT"],
)
def test_pairs_come_from_the_anchors_own_outputs(
    outputs: dict[tuple[str, str], float], pairs: tuple[tuple[str, str], ...]
) -> None:
    selection = select(CHAINS, drawn(0, outputs=outputs), cost, SelectionSettings())
    assert selection.pairs == pairs
    assert {(c.source, c.target) for c in selection.candidates} == set(pairs)


def test_a_wanted_pair_overrides_the_choice() -> None:
    outputs = {("tiny", "small"): 0.1, ("small", "base"): 0.1, ("tiny", "base"): 0.9}
    pairs = (("tiny", "base"), ("tiny", "small"), ("tiny", "base"))
    selection = select(CHAINS, drawn(0, outputs=outputs), cost, SelectionSettings(pairs=pairs))
    assert selection.pairs == (("tiny", "base"), ("tiny", "small"))
    assert len(set(selection.routes)) == len(selection.routes)


MAPS = {"tiny": map_chain((4, 4, 8, 8)), "small": map_chain((5, 5, 9, 9))}
TOKENS = {"base": token_chain((6,) * 7)}


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        (("base", "tiny"), "Stitches run from the smaller anchor to the larger one: ask for tiny:base."),
        (("tiny", "tiny"), "A stitch joins two anchors, not tiny and itself."),
    ],
)
def test_a_wanted_pair_that_makes_no_sense_is_told_why(pair: tuple[str, str], sentence: str) -> None:
    with pytest.raises(SelectionError) as caught:
        select(CHAINS, drawn(0), cost, SelectionSettings(pairs=(pair,)))
    assert str(caught.value) == sentence


def test_a_wanted_pair_of_an_unknown_anchor_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Unknown anchor 'bass': did you mean base"):
        select(CHAINS, drawn(0), cost, SelectionSettings(pairs=(("tiny", "bass"),)))


@pytest.mark.parametrize("pairs", [None, (("tiny", "base"),)])
def test_anchors_without_a_common_grid_are_told_with_their_shapes(pairs: tuple[tuple[str, str], ...] | None) -> None:
    chains = {"tiny": MAPS["tiny"], "base": TOKENS["base"]}
    with pytest.raises(SelectionError) as caught:
        select(chains, drawn(0, chains), cost, SelectionSettings(pairs=pairs))
    assert str(caught.value) == (
        "Anchors tiny and base cannot be stitched: nearest to a seam are tiny after block 2 and base after block 1, "
        "but features 4×4 of width 8 and 4 of width 6 do not lie on one grid. Choose anchors with a common grid and "
        "equal prefix tokens, or an image size at which they have one."
    )


def test_anchors_whose_prefix_tokens_differ_are_told_so() -> None:
    def with_prefix(count: int) -> Chain:
        layout = partial(Layout.of_tokens, prefix=count)
        chain = token_chain()
        return Chain(chain.stem, list(chain.blocks), chain.head, input_shape=IMAGE, layout=layout)

    costs = {Route.anchor("tiny", 3): 1.0, Route.anchor("base", 3): 2.0}
    chains = {"tiny": with_prefix(1), "base": with_prefix(2)}
    with pytest.raises(SelectionError) as caught:
        stitchable_pairs(chains, costs.__getitem__, SelectionSettings())
    assert str(caught.value) == (
        "Anchors tiny and base cannot be stitched: nearest to a seam are tiny after block 1 and base after block 1, "
        "but prefix tokens (class, distillation, registers) cannot go from 1 to 2. Choose anchors with a common grid "
        "and equal prefix tokens, or an image size at which they have one."
    )


def test_anchors_that_can_be_stitched_are_even_if_the_largest_cannot() -> None:
    chains = {**MAPS, **TOKENS}
    selection = select(chains, drawn(0, chains), cost, SelectionSettings())
    assert selection.pairs == (("tiny", "small"),)
    assert selection.chosen


def test_pairs_that_can_be_stitched_are_known_before_any_image_is_seen() -> None:
    chains = {**MAPS, **TOKENS}
    before = [calls(chain) for chain in chains.values()]
    assert stitchable_pairs(chains, cost, SelectionSettings()) == (("tiny", "small"),)
    assert stitchable_pairs(CHAINS, cost, SelectionSettings()) == (*combinations(CHAINS, 2),)
    assert stitchable_pairs(CHAINS, cost, SelectionSettings(pairs=PAIR * 2)) == PAIR
    assert [calls(chain) for chain in chains.values()] == before


def test_a_seam_joins_only_maps_of_one_resolution() -> None:
    """Both halve their maps in block 2: block 1 goes to block 1, blocks 2 and 3 to blocks 2 and 3."""

    def priced(route: Route) -> float:
        return {"tiny": 1.0, "small": 3.0}.get(str(route), 2.0)

    selection = select(MAPS, drawn(0, MAPS), priced, SelectionSettings())
    assert {(c.i, c.j) for c in selection.candidates} == {(1, 1), (2, 2), (3, 2)}


@pytest.mark.parametrize("same", [False, True])
def test_anchors_in_another_order_than_their_cost_are_refused(same: bool) -> None:
    chains = {"base": CHAINS["base"], "tiny": CHAINS["tiny"]}
    with pytest.raises(SelectionError) as caught:
        select(chains, drawn(0, chains), (lambda route: 7.0) if same else cost, SelectionSettings())
    assert str(caught.value) == (
        "Anchors must be ordered from small to large, but base costs "
        f"{'7 and tiny after it 7' if same else '60 and tiny after it 4'} multiply-adds."
    )


def test_anchors_too_close_in_cost_for_any_stitch_are_told() -> None:
    def priced(route: Route) -> float:
        return {"tiny": 10.0, "small": 11.0, "base": 12.0}.get(str(route), 99.0)

    with pytest.raises(SelectionError, match="No stitch of tiny → small or small → base costs more than the one"):
        select(CHAINS, drawn(0), priced, SelectionSettings(pairs=(("tiny", "small"), ("small", "base"))))

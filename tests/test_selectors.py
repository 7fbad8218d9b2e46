"""Every selector: its score by its formula, what it keeps of a bucket, and what it asks to be measured."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_selection import CHAINS, DEPTHS, cost, drawn

from klas_zoo.errors import SelectionError, UnknownName
from klas_zoo.profiles.macs import ChainCost
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import Selection, select
from klas_zoo.selection.candidates import Candidate, SelectionSettings
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.scoring import LEAST_CAPACITY, keep_best
from klas_zoo.selection.selectors import SELECTORS, find_selector

PAIR = (("tiny", "base"),)
SEAMS = [
    Seam(source, i, target, j)
    for source, target in (("tiny", "small"), ("small", "base"), ("tiny", "base"))
    for i in range(1, DEPTHS[source] + 1)
    for j in range(1, DEPTHS[target])
]


def everything(seed: int = 0) -> Measurements:
    """All measurements, drawn at random."""
    generator = np.random.default_rng(seed + 100)

    def values(most: float) -> dict[Seam, float]:
        return dict(zip(SEAMS, generator.uniform(0.01, most, len(SEAMS)).tolist(), strict=True))

    entropy = {name: generator.uniform(0.1, 2, depth + 1) for name, depth in DEPTHS.items()}
    return Measurements(
        probes=replace(drawn(seed), entropy=entropy), cka=values(1), residual=values(1),
        accuracy=values(100), output_kl=values(3), latency_ms={"tiny": 1.0, "small": 2.0, "base": 3.0},
    )  # fmt: skip


def chosen_by(name: str, measured: Measurements | None = None, **settings: object) -> Selection:
    wanted = SelectionSettings(**{"selector": name, "buckets": 4, "pairs": PAIR, **settings})  # type: ignore[arg-type]
    return select(CHAINS, everything() if measured is None else measured, cost, wanted)


def kept(selection: Selection) -> set[tuple[int, int]]:
    return {(c.i, c.j) for c in selection.chosen}


def by_formula(name: str, m: Measurements, s: Seam) -> float:
    """Each score once more, from the tables themselves."""
    assert m.probes and m.residual and m.cka and m.accuracy and m.output_kl
    theta = m.probes.between[s.source, s.target][s.i - 1, s.j - 1]
    gamma = theta / m.probes.between[s.target, s.target][s.j - 1, s.j]
    return {
        "klas": gamma,
        "klas-latency": gamma,
        "kl-only": theta,
        "ce": theta + m.probes.entropy[s.source][s.i - 1],
        "cka": 1 - m.cka[s],
        "mse": m.residual[s],
        "direct": -m.accuracy[s],
        "output-kl": m.output_kl[s],
    }[name]


SCORED = [name for name, one in SELECTORS.items() if one.formula]
RULES = ["snnet", "random", "all"]


def test_there_are_these_selectors_and_each_says_what_it_is() -> None:
    assert {*SCORED, *RULES} == set(SELECTORS)
    assert all(one.name == name and one.description for name, one in SELECTORS.items())
    documented = (Path(__file__).parent.parent / "docs" / "selection.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in SELECTORS)


def test_the_papers_selector_is_the_default() -> None:
    assert SelectionSettings().selector == "klas"
    assert (SelectionSettings().buckets, SelectionSettings().tolerance) == (20, 0.05)


@pytest.mark.parametrize("name", SCORED)
def test_a_score_is_its_formula_and_the_lowest_of_each_bucket_is_kept(name: str) -> None:
    measured = everything()
    selection = chosen_by(name, measured, most=1)
    buckets: dict[int, list[Candidate]] = {}
    for one in selection.candidates:
        assert one.score == pytest.approx(by_formula(name, measured, one.seam))
        assert one.terms
        buckets.setdefault(one.bucket, []).append(one)
    best = {min(inside, key=lambda c: by_formula(name, measured, c.seam)).seam for inside in buckets.values()}
    assert {c.seam for c in selection.chosen} == best


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("most", [1, 2, 3])
def test_selectors_that_score_keep_equally_many(name: str, most: int) -> None:
    selection = chosen_by(name, most=most)
    sizes = Counter(c.bucket for c in selection.candidates)
    assert Counter(c.bucket for c in selection.chosen) == {b: min(most, size) for b, size in sizes.items()}
    assert Counter(c.reason for c in selection.chosen)["best"] == len(sizes)
    assert Counter(c.bucket for c in chosen_by("random", most=most).chosen) == Counter(
        c.bucket for c in selection.chosen
    )


@pytest.mark.parametrize("name", [*SCORED, "random", "all"])
def test_all_selectors_choose_from_the_same_candidates(name: str) -> None:
    found, expected = (chosen_by(one).candidates for one in (name, "klas"))
    assert [(c.route, c.cost, c.bucket) for c in found] == [(c.route, c.cost, c.bucket) for c in expected]


@pytest.mark.parametrize("name", SELECTORS)
def test_what_a_selector_asks_for_is_all_it_needs(name: str) -> None:
    measured = everything()
    for pairs in (PAIR, None):
        settings = SelectionSettings(selector=name, pairs=pairs)
        needs = SELECTORS[name].asks_for(settings)
        fields = {need: getattr(measured, need) for need in needs}
        if "outputs" in needs and "probes" not in needs:
            fields["outputs"] = measured.output_distances()
        assert select(CHAINS, Measurements(**fields), cost, settings).chosen
        if needs - {"latency_ms"}:
            with pytest.raises(SelectionError, match="needs the measurement '"):
                select(CHAINS, Measurements(), cost, settings)


def test_windows_and_everything_need_no_data() -> None:
    for name in ("snnet", "all"):
        assert not SELECTORS[name].asks_for(SelectionSettings())
    assert kept(chosen_by("all", Measurements())) == {(c.i, c.j) for c in chosen_by("klas").candidates}
    every = select(CHAINS, Measurements(), cost, SelectionSettings(selector="all")).pairs
    assert every == (("tiny", "small"), ("tiny", "base"), ("small", "base"))


def test_drawing_is_the_same_for_one_seed_and_uniform_over_seeds() -> None:
    assert kept(chosen_by("random", seed=3)) == kept(chosen_by("random", seed=3))
    sizes = Counter(c.bucket for c in chosen_by("all").candidates)
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(600):
        counts.update(kept(chosen_by("random", seed=seed)))
    for one in chosen_by("all").candidates:
        expected = 600 / sizes[one.bucket]
        assert abs(counts[one.i, one.j] - expected) < 5 * (expected * (1 - 1 / sizes[one.bucket]) + 1) ** 0.5


def test_scores_below_zero_have_a_margin_too() -> None:
    route = Route.stitch("tiny", 1, "base", 1, 6)
    accuracies = (80.0, 76.1, 75.9)
    candidates = [
        Candidate(route=route, source="tiny", i=i, target="base", j=1, cost=1.0, bucket=0, score=-top1)
        for i, top1 in enumerate(accuracies, start=1)
    ]
    assert [c.reason for c in keep_best(candidates, SelectionSettings())] == ["best", "tied", ""]


def test_a_name_nobody_knows_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Unknown selector 'sn-net': did you mean snnet"):
        find_selector("sn-net")
    with pytest.raises(UnknownName):
        chosen_by("klass")


def test_a_score_that_is_not_finite_names_its_stitch() -> None:
    measured = everything()
    assert measured.residual
    bad = {**measured.residual, Seam("tiny", 2, "base", 3): float("nan")}
    with pytest.raises(SelectionError, match=r"The score of tiny\.1-2\+base\.4-6 is not finite"):
        chosen_by("mse", replace(measured, residual=bad))


def test_a_pair_that_was_not_measured_is_told() -> None:
    with pytest.raises(SelectionError, match=r"The measurement 'cka' has no value for tiny\.1-"):
        chosen_by("cka", Measurements(cka={}))


def test_a_target_block_that_changes_nothing_has_the_least_capacity() -> None:
    measured = everything()
    assert measured.probes
    measured.probes.between["base", "base"][2, 3] = 0.0
    scores = {(c.i, c.j): c.score for c in chosen_by("klas", measured).candidates}
    assert scores[2, 3] == pytest.approx(measured.probes.between["tiny", "base"][1, 2] / LEAST_CAPACITY)


def test_buckets_without_a_candidate_are_named() -> None:
    held = {c.bucket for c in chosen_by("klas", buckets=40).candidates}
    empty = chosen_by("klas", buckets=40).empty_buckets
    assert empty == {PAIR[0]: tuple(b for b in range(40) if b not in held)}
    assert chosen_by("klas", buckets=1).empty_buckets == {}


def test_measurements_survive_json() -> None:
    measured = everything()
    again = Measurements.from_json(json.loads(json.dumps(measured.to_json())))
    assert again.to_json() == measured.to_json()
    assert again.cka == measured.cka
    assert again.probes and measured.probes
    assert np.array_equal(again.probes.between["tiny", "base"], measured.probes.between["tiny", "base"])
    assert Measurements.from_json({"outputs": [["tiny", "base", 0.5]], "unheard of": 1}) == Measurements(
        outputs={("tiny", "base"): 0.5}
    )


PARTS = {
    "tiny": ChainCost(
        stem_macs=10, block_macs=(20, 20), head_macs=10, stem_parameters=0, block_parameters=(0, 0), head_parameters=0
    ),
    "base": ChainCost(
        stem_macs=100, block_macs=(200, 300), head_macs=200, stem_parameters=0, block_parameters=(0, 0),
        head_parameters=0,
    ),
}  # fmt: skip


def test_a_predicted_latency_is_the_share_of_each_anchor_that_runs() -> None:
    price = latency_cost(PARTS, {"tiny": 3.0, "base": 4.0}, lambda route: 530 + 40)
    # tiny: stem and one block, 30 of 60; base: one block and head, 500 of 800; a seam of 40 at base's rate
    assert price(Route.stitch("tiny", 1, "base", 1, 2)) == pytest.approx(3 * 30 / 60 + 4 * 500 / 800 + 4 * 40 / 800)
    whole = latency_cost(PARTS, {"tiny": 3.0, "base": 4.0}, lambda route: 60 if str(route) == "tiny" else 800)
    assert (whole(Route.anchor("tiny", 2)), whole(Route.anchor("base", 2))) == pytest.approx((3.0, 4.0))


@pytest.mark.parametrize("found", [{"tiny": 1.0}, {"tiny": 1.0, "base": 0.0}, {"tiny": 1.0, "base": float("nan")}])
def test_an_anchor_without_a_latency_is_named(found: dict[str, float]) -> None:
    with pytest.raises(SelectionError, match="Anchor base has no measured latency above zero"):
        latency_cost(PARTS, found, lambda route: 1.0)


def test_anchors_in_another_order_than_their_latency_are_refused_in_ms() -> None:
    settings = SelectionSettings(selector="klas-latency", pairs=PAIR)
    with pytest.raises(SelectionError, match=r"ordered from small to large, but tiny costs 7 and small after it 7 ms"):
        select(CHAINS, everything(), lambda route: 7.0, settings, unit="ms")


def test_selection_warns_of_nothing_by_itself() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen_by("klas")

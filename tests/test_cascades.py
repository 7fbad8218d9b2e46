"""Cascades: what one is, what it costs, how thresholds are fitted, and what torch answers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import token_chain

from klas_zoo.cascades import execution
from klas_zoo.cascades.calibration import calibration_error, confidence, fit_temperature, probabilities
from klas_zoo.cascades.costs import costs_of
from klas_zoo.cascades.definition import Cascade, CascadeCost, Stage, common_blocks
from klas_zoo.cascades.fitting import (
    exits_of,
    fit_thresholds,
    images_needed,
    outcome,
    refuse_too_few,
    temperatures_of,
)
from klas_zoo.cascades.outputs import RouteOutputs, check_exits
from klas_zoo.cascades.search import SearchSettings, search
from klas_zoo.errors import DataError, UnknownName, UsageError
from klas_zoo.routes import Route, Segment
from klas_zoo.supernet import Supernet

TINY, SMALL, BASE = (Route.anchor(name, 4) for name in ("tiny", "small", "base"))
EARLY = Route.stitch("small", 2, "base", 2, 4)
LATE = Route.stitch("small", 3, "base", 3, 4)


def _route(name: str) -> Route:
    known = {str(route): route for route in (TINY, SMALL, BASE, EARLY, LATE)}
    if name not in known:
        raise UnknownName("route", name, known)
    return known[name]


def _cascade(*stages: Stage, **changes: Any) -> Cascade:
    return Cascade(stages=stages, **changes)


@pytest.mark.parametrize(
    "text",
    [
        "small ?p<0.83 → small.1-2+base.3-4",
        "small ?p<0.83 | small.1-2+base.3-4",
        "tiny ?m(T=1.5)<0.25 | small ?m<0 → small.1-3+base.4-4",
        "tiny ?e<1 | base",
    ],
)
def test_a_cascade_is_named_by_its_stages_and_read_from_its_name(text: str) -> None:
    found = Cascade.parse(text, _route)
    assert str(found) == text
    assert Cascade.from_json(found.to_json()) == found
    assert Cascade.parse(text.replace("→", "->"), _route) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("small", "'small' cannot be: a cascade has at least two stages."),
        ("small ?p<1.2 | base", "'small ?p<1.2 | base' cannot be: a threshold is a confidence from 0 to 1, not 1.2."),
        ("small ?p<-0.1 | base", "a threshold is a confidence from 0 to 1, not -0.1."),
        ("small ?p<nan | base", "a threshold is a confidence from 0 to 1, not nan."),
        ("small ?p(T=0)<0.5 | base", "a temperature is above 0, not 0."),
        ("small ?p<0.5 -> base", "base shares no blocks with small; write | for a stage that starts anew."),
        ("small ?p<0.5 | small", "small cannot follow itself."),
        ("small ?p<0.5 | tiny ?m<0.5 | base", "measures confidence in two ways: use one letter of p, m and e."),
        ("small ?q<0.5 | base", "'?q<0.5' is no condition; write it as 'small ?p<0.83 -> small.1-4+base.5-8'"),
        ("small ?p<0.5 / base", "is no cascade: write it as"),
        ("small ?p<0.5", "is no cascade: write it as"),
    ],
)
def test_a_text_that_is_no_cascade_is_refused_with_the_reason(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        Cascade.parse(text, _route)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_route_in_a_cascade_is_named() -> None:
    with pytest.raises(UnknownName, match="Unknown route 'smal': did you mean small"):
        Cascade.parse("smal ?p<0.5 | base", _route)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((Stage(route=SMALL), Stage(route=BASE)), "not the last one and needs a threshold"),
        ((Stage(route=SMALL, threshold=0.5), Stage(route=BASE, threshold=0.5)), "answers always"),
        ((Stage(route=SMALL, threshold=0.5, shared=2), Stage(route=BASE)), "has no stage before it"),
        ((Stage(route=SMALL, threshold=0.5), Stage(route=EARLY, shared=3)), "they have 2 blocks in common"),
        ((Stage(route=TINY, threshold=0.5), Stage(route=BASE, shared=1)), "they have no blocks in common"),
        (
            (Stage(route=SMALL, threshold=0.5), Stage(route=LATE, threshold=0.5, shared=3),
             Stage(route=EARLY, shared=2)),
            "itself starts behind block 3",
        ),
    ],
)  # fmt: skip
def test_stages_that_do_not_follow_one_another_are_refused(stages: tuple[Stage, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _cascade(*stages)


def test_blocks_in_common_end_where_a_stitch_leaves_its_source() -> None:
    assert common_blocks(SMALL, EARLY) == 2
    assert common_blocks(EARLY, LATE) == 2
    assert common_blocks(TINY, EARLY) == 0
    again = Route((Segment("small", 1, 2), Segment("small", 3, 4)))
    assert common_blocks(SMALL, again) == 2  # behind the seam small's own blocks get other features


def test_the_cost_of_a_path_is_that_of_all_stages_without_what_they_share() -> None:
    costs = costs_of((TINY, SMALL, EARLY), lambda route: {TINY: 5, SMALL: 40, EARLY: 90}[route], lambda r, b: 10 * b)
    plain = costs.of(Cascade.parse("small ?p<0.5 | small.1-2+base.3-4", _route))
    shared = costs.of(Cascade.parse("tiny ?p<0.5 | small ?p<0.5 -> small.1-2+base.3-4", _route))
    assert plain.paths == (40, 130)
    assert shared.paths == (5, 45, 115)
    assert (shared.best, shared.worst) == (5, 115)
    assert shared.mean((0.5, 0.3, 0.2)) == pytest.approx(2.5 + 13.5 + 23)


@pytest.mark.parametrize("shares", [(0.5, 0.4), (1.0,), (1.2, -0.2)])
def test_shares_that_are_no_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="2 shares that sum up to 1"):
        CascadeCost(paths=(1.0, 2.0)).mean(shares)


def _logits(count: int, strength: float, seed: int, labels: np.ndarray, classes: int = 4) -> np.ndarray:
    generator = np.random.default_rng(seed)
    found = generator.standard_normal((count, classes)).astype(np.float32)
    found[np.arange(count), labels] += strength
    return found


def _outputs(count: int = 2000, seed: int = 0) -> RouteOutputs:
    labels = np.random.default_rng(seed).integers(0, 4, count)
    strengths = {TINY: 1.0, SMALL: 2.0, EARLY: 2.5, BASE: 3.0}
    return RouteOutputs(
        labels=labels,
        logits={route: _logits(count, s, 10 * seed + k, labels) for k, (route, s) in enumerate(strengths.items())},
    )


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3), st.floats(0.1, 10))
def test_every_confidence_lies_between_0_and_1(row: list[float], temperature: float) -> None:
    logits = np.asarray([row], dtype=np.float32)
    assert all(0 <= confidence(logits, one, temperature)[0] <= 1 for one in ("probability", "margin", "entropy"))


def test_confidences_are_what_their_names_say() -> None:
    logits = np.log(np.asarray([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]]))
    assert confidence(logits, "probability") == pytest.approx([0.7, 1 / 3])
    assert confidence(logits, "margin") == pytest.approx([0.5, 0])
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert confidence(logits, "entropy") == pytest.approx([1 - entropy / math.log(3), 0])


def test_logits_that_are_not_finite_are_never_sure() -> None:
    assert confidence(np.asarray([[np.nan, 1.0], [np.inf, 0.0]]), "probability").tolist() == [0, 0]


def test_the_temperature_that_spoiled_logits_is_found_again() -> None:
    generator = np.random.default_rng(0)
    logits = 2 * generator.standard_normal((20_000, 4))
    labels = (probabilities(logits).cumsum(1) > generator.random((20_000, 1))).argmax(1)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)
    assert calibration_error(3 * logits, labels, 3.0) < 0.02 < calibration_error(3 * logits, labels)


def test_the_calibration_error_is_the_mean_distance_over_bins() -> None:
    logits = np.log(np.asarray([[0.8, 0.2]] * 10))
    assert calibration_error(logits, np.asarray([0] * 5 + [1] * 5)) == pytest.approx(0.3)


def test_a_threshold_passes_on_the_share_it_was_fitted_to() -> None:
    outputs = _outputs()
    stages = [Stage(route=TINY), Stage(route=SMALL), Stage(route=EARLY, shared=2)]
    found = fit_thresholds(stages, (0.5, 0.4), outputs)
    exits = exits_of(found, outputs.logits)
    assert (exits > 0).mean() == pytest.approx(0.5, abs=0.01)
    assert (exits > 1).mean() == pytest.approx(0.2, abs=0.01)
    seen = outcome(found, outputs)
    assert seen.escalated == ((exits > 0).mean(), (exits > 1).mean())
    assert all(low < share < high for share, (low, high) in zip(seen.escalated, seen.escalated_intervals, strict=True))
    assert sum(seen.shares) == pytest.approx(1)


def test_an_outcome_is_counted_image_by_image() -> None:
    outputs = _outputs(500)
    cascade = Cascade.parse("tiny ?p(T=1.3)<0.6 | small ?p<0.7 | base", _route)
    right = escalated = 0
    for number, label in enumerate(outputs.labels):
        rows = {route: logits[number : number + 1] for route, logits in outputs.logits.items()}
        answer = rows[TINY]
        if probabilities(rows[TINY], 1.3).max() < 0.6:
            escalated += 1
            answer = rows[BASE] if probabilities(rows[SMALL]).max() < 0.7 else rows[SMALL]
        right += int(answer.argmax() == label)
    seen = outcome(cascade, outputs)
    assert seen.top1 == pytest.approx(100 * right / 500)
    assert seen.escalated[0] == escalated / 500


@pytest.mark.parametrize("few", [1, 100, images_needed() - 1])
def test_too_few_held_out_images_are_refused_with_the_number_needed(few: int) -> None:
    with pytest.raises(DataError, match=f"{few} held-out images are too few to fit a threshold: 385 are needed"):
        refuse_too_few(few)
    with pytest.raises(DataError, match="385 are needed"):
        temperatures_of(_outputs(few))


def test_so_many_images_as_are_needed_keep_the_share_within_the_promised_points() -> None:
    count, far = images_needed(), 0
    for seed in range(400):
        sample = np.random.default_rng(seed).random(count)
        far += abs(np.quantile(sample, 0.5) - 0.5) > 0.05
    assert far / 400 < 0.08


def test_a_later_stage_that_few_images_reach_is_refused_too() -> None:
    stages = [Stage(route=TINY), Stage(route=SMALL), Stage(route=BASE)]
    with pytest.raises(DataError, match="385 are needed"):
        fit_thresholds(stages, (0.1, 0.5), _outputs(2000))


def test_networks_of_other_classes_or_other_preprocessing_are_no_stages_of_one_cascade() -> None:
    with pytest.raises(UsageError, match="tiny and base cannot be stages of one cascade: classes is 10 and 100"):
        check_exits({"tiny": {"classes": 10}, "base": {"classes": 100}})
    with pytest.raises(UsageError, match="interpolation is bicubic and None"):
        check_exits({"tiny": {"classes": 10, "interpolation": "bicubic"}, "base": {"classes": 10}})
    labels = np.zeros(3, dtype=int)
    with pytest.raises(UsageError, match="classes is 4 and 5"):
        RouteOutputs(labels=labels, logits={TINY: np.zeros((3, 4)), SMALL: np.zeros((3, 5))})


@pytest.fixture(scope="module")
def searched() -> tuple[RouteOutputs, Any, Any]:
    outputs = _outputs(4000)
    macs = {TINY: 10, SMALL: 40, EARLY: 80, BASE: 120}
    costs = costs_of(macs, macs.__getitem__, lambda route, blocks: macs[route] * blocks / 8)
    return outputs, costs, search(outputs, costs, common_blocks, SearchSettings())


def test_what_a_search_finds_is_what_an_evaluation_says(searched: tuple[RouteOutputs, Any, Any]) -> None:
    outputs, costs, found = searched
    assert any(len(one.cascade.stages) == 3 for one in found.cascades)
    assert any(stage.shared for one in found.cascades for stage in one.cascade.stages)
    for one in found.cascades:
        again = outcome(one.cascade, outputs)
        assert one.heldout == again
        assert one.mean_cost == pytest.approx(costs.of(one.cascade).mean(again.shares))


def test_a_search_keeps_what_nothing_cheaper_is_as_accurate_as(searched: tuple[RouteOutputs, Any, Any]) -> None:
    outputs, costs, found = searched
    statics = [(costs.routes[route], outputs.top1(route)) for route in outputs.logits]
    for kept, cost in ((found.by_mean, lambda one: one.mean_cost), (found.by_worst, lambda one: one.cost.worst)):
        assert kept
        assert all(a.heldout.top1 < b.heldout.top1 and cost(a) < cost(b) for a, b in pairwise(kept))
        assert not any(c <= cost(one) and top1 >= one.heldout.top1 for one in kept for c, top1 in statics)


def test_a_search_among_cascades_that_continue_finds_those_that_others_beat(
    searched: tuple[RouteOutputs, Any, Any],
) -> None:
    outputs, costs, everything = searched
    found = search(outputs, costs, common_blocks, SearchSettings(continuing=True))
    assert all(any(stage.shared for stage in one.cascade.stages) for one in found.cascades)
    assert 0 < found.tried < everything.tried
    kept = {one.cascade for one in found.cascades}
    assert {one.cascade for one in everything.by_mean if any(stage.shared for stage in one.cascade.stages)} <= kept


def test_a_search_keeps_no_more_than_it_is_asked_for(searched: tuple[RouteOutputs, Any, Any]) -> None:
    outputs, costs, everything = searched
    found = search(outputs, costs, common_blocks, SearchSettings(most=3, triples=False))
    assert len(found.by_mean) <= 3
    assert all(len(one.cascade.stages) == 2 for one in found.cascades)
    assert found.tried < everything.tried


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    chains = {name: token_chain((width,) * 5) for name, width in (("tiny", 4), ("small", 8), ("base", 16))}
    return Supernet(chains, [TINY, SMALL, BASE, EARLY, LATE]).eval()


def test_static_outputs_come_from_one_pass(supernet: Supernet) -> None:
    images, labels = torch.randn(6, *supernet.chain("tiny").input_shape), torch.arange(6) % 3
    found = execution.route_outputs(supernet, [TINY, EARLY], [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert found.labels.tolist() == labels.tolist()
    assert np.allclose(found.logits[EARLY], supernet(images, EARLY).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "form", ["tiny ?p<{} | base", "small ?p<{} -> small.1-2+base.3-4", "small ?p<{} -> small.1-2+base.3-4 ?p<{} | base",
             "tiny ?p<{} | small ?p<{} -> small.1-3+base.4-4",
             "small ?p<{} -> small.1-2+base.3-4 ?p<{} -> small.1-3+base.4-4"]
)  # fmt: skip
def test_torch_takes_the_exits_that_static_outputs_say_and_gives_their_logits(supernet: Supernet, form: str) -> None:
    torch.manual_seed(1)
    images, labels = torch.randn(40, *supernet.chain("tiny").input_shape), torch.zeros(40, dtype=torch.long)
    outputs = execution.route_outputs(supernet, supernet.routes, [(images, labels)])
    # between two confidences, so that rounding decides nothing
    first = form.split()[0]
    sure = np.sort(confidence(outputs.logits[_route(first)], "probability"))
    cascade = Cascade.parse(form.replace("{}", f"{(sure[19] + sure[20]) / 2:.6f}", 1).replace("{}", "0.5"), _route)
    logits, exits = execution.run(supernet, cascade, images)
    expected = exits_of(cascade, outputs.logits)
    assert exits.tolist() == expected.tolist()
    assert 0 < (expected > 0).sum() < 40
    for number, stage in enumerate(expected):
        assert np.allclose(logits[number], outputs.logits[cascade.routes[stage]][number], atol=1e-5)


def test_an_anchor_with_its_original_weights_shares_nothing_with_a_stitch_of_the_tuned_one(supernet: Supernet) -> None:
    assert execution.shared_blocks(supernet, SMALL, EARLY) == 2
    chains = {name: token_chain((width,) * 5) for name, width in (("small", 8), ("base", 16))}
    other = Supernet(chains, [SMALL, BASE, EARLY])
    other.keep_original("small", token_chain((8,) * 5))
    assert execution.shared_blocks(other, SMALL, EARLY) == 0

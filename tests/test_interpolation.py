"""The latency model, on families whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.interpolation import AnchorShape, choose_stitches, errors_percent, fit, summarise
from klas_zoo.profiles.profile import LatencyModel
from klas_zoo.routes import Route

DEPTHS = {"tiny": 6, "small": 6, "base": 8}
WIDTHS = {"tiny": 8, "small": 16, "base": 32}


def shape(name: str) -> AnchorShape:
    depth, width = DEPTHS[name], WIDTHS[name]
    macs = (50 * width, *[100 * width**2] * depth, 10 * width)
    return AnchorShape(
        guesses=tuple(map(float, macs)),
        groups=(0,) * depth,
        macs=macs,
        vectors=(16,) * (depth + 1),
        widths=(width,) * (depth + 1),
    )


SHAPES = {name: shape(name) for name in DEPTHS}
ANCHORS = [Route.anchor(name, depth) for name, depth in DEPTHS.items()]
STITCHES = [
    Route.stitch(source, i, target, j, DEPTHS[target])
    for source, target in (("tiny", "small"), ("small", "base"))
    for i in range(1, DEPTHS[source] + 1)
    for j in range(DEPTHS[target])
]


def truth(route: Route, *, stem: float = 0.7, head: float = 0.05, seam: float = 0.1) -> float:
    """Milliseconds that no guess knows: wide blocks are smaller for each multiply-add, stems and heads are large."""
    block_ms = {"tiny": 0.9, "small": 3.0, "base": 9.5}
    ms = stem * (1 + WIDTHS[route.segments[0].anchor] / 40) + head
    ms += sum(block_ms[s.anchor] * (s.last - s.first + 1) for s in route.segments)
    return ms + sum(seam + 16 * WIDTHS[s.source] * WIDTHS[s.target] / 1e5 for s in route.seams)


def test_eight_measurements_tell_every_stitch() -> None:
    chosen = choose_stitches(SHAPES, STITCHES, 5)
    assert len(set(chosen)) == 5
    model = fit(SHAPES, {route: truth(route) for route in (*ANCHORS, *chosen)})
    errors = errors_percent(model, {route: truth(route) for route in STITCHES})
    found = summarise(list(errors.values()), "all")
    assert found.median_percent < 1
    assert found.largest_percent < 3
    # the cross-validated error is of the same size and not more optimistic
    assert model.error.checked == 5
    assert model.error.largest_percent >= found.median_percent


@given(seed=st.integers(0, 1000))
def test_noise_of_a_per_cent_stays_a_per_cent(seed: int) -> None:
    noise = np.random.default_rng(seed)
    chosen = choose_stitches(SHAPES, STITCHES, 5)
    measured = {route: truth(route) * (1 + 0.01 * noise.standard_normal()) for route in (*ANCHORS, *chosen)}
    errors = errors_percent(fit(SHAPES, measured), {route: truth(route) for route in STITCHES})
    assert summarise(list(errors.values()), "all").median_percent < 4


def test_chosen_stitches_tell_more_than_any_five() -> None:
    def mean_error(routes: list[Route], seed: int) -> float:
        noise = np.random.default_rng(seed)
        measured = {route: truth(route) * (1 + 0.01 * noise.standard_normal()) for route in (*ANCHORS, *routes)}
        errors = errors_percent(fit(SHAPES, measured), {route: truth(route) for route in STITCHES})
        return float(np.mean(np.abs(list(errors.values()))))

    chosen = choose_stitches(SHAPES, STITCHES, 5)
    generator = np.random.default_rng(0)
    drawn = [[STITCHES[k] for k in generator.choice(len(STITCHES), 5, replace=False)] for _ in range(20)]
    of_chosen = np.mean([mean_error(chosen, seed) for seed in range(20)])
    assert of_chosen < np.mean([mean_error(routes, seed) for seed, routes in enumerate(drawn)])


def test_without_stitches_the_anchors_shares_are_the_prediction() -> None:
    measured = {route: truth(route) for route in ANCHORS}
    model = fit(SHAPES, measured)
    assert model.error.checked == 0
    assert errors_percent(model, measured) == pytest.approx(dict.fromkeys(ANCHORS, 0.0), abs=0.2)
    assert choose_stitches(SHAPES, [], 5) == []


def test_no_part_takes_less_than_no_time() -> None:
    # a stitch that is much faster than its anchors would make its seam negative
    stitch = Route.stitch("tiny", 3, "small", 3, 6)
    model = fit(SHAPES, {**{route: truth(route) for route in ANCHORS}, stitch: 0.4 * truth(stitch)})
    values = [model.seam_ms, *model.seam_ms_per_gmac.values()]
    values += [ms for one in model.anchors.values() for ms in (one.stem_ms, *one.block_ms, one.head_ms)]
    assert min(values) >= 0


def test_an_anchor_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ProfileError, match="anchor base was not measured"):
        fit(SHAPES, {route: truth(route) for route in ANCHORS[:2]})


def test_the_same_measurements_give_the_same_choice_and_model() -> None:
    measured = {route: truth(route) for route in (*ANCHORS, *STITCHES[:5])}
    assert choose_stitches(SHAPES, STITCHES, 5) == choose_stitches(SHAPES, STITCHES[::-1], 5)
    found: list[LatencyModel] = [fit(SHAPES, measured) for _ in range(2)]
    assert found[0] == found[1]

"""Which route a step of tuning takes."""

from __future__ import annotations

from collections import Counter

import pytest

from klas_zoo.routes import Route
from klas_zoo.tuning.drawing import RouteDraw

ROUTES = [Route.anchor(name, 3) for name in ("a", "b", "c")]


def test_uniform_draws_do_not_depend_on_losses() -> None:
    one, other = (RouteDraw(ROUTES, "uniform", 4) for _ in range(2))
    drawn = []
    for step in range(50):
        drawn.append(one.next())
        one.learned(drawn[-1], 1 / (1 + step))
    assert drawn == [other.next() for _ in range(50)]


def test_a_route_whose_loss_still_falls_is_drawn_more_often_and_none_is_left_out() -> None:
    draw = RouteDraw(ROUTES, "gain", 0)
    for step in range(60):
        draw.learned(ROUTES[0], 3 - step / 30)
        draw.learned(ROUTES[1], 1.0)
        draw.learned(ROUTES[2], 1 + step / 30)  # gets worse
    counts = Counter(draw.next() for _ in range(2_000))
    assert counts[ROUTES[0]] > 3 * counts[ROUTES[1]]
    assert counts[ROUTES[1]] == pytest.approx(counts[ROUTES[2]], rel=0.3)
    assert min(counts[route] for route in ROUTES) > 0


def test_without_any_gain_all_are_alike() -> None:
    draw = RouteDraw(ROUTES, "gain", 0)
    for route in ROUTES:
        draw.learned(route, 1.0)
    assert draw.weights() == [1.0, 1.0, 1.0]


def test_a_restored_state_draws_the_same() -> None:
    draw = RouteDraw(ROUTES, "gain", 7)
    for step in range(20):
        draw.learned(draw.next(), 2 - step / 20)
    again = RouteDraw(ROUTES, "gain", 0)
    again.restore(draw.state())
    assert [draw.next() for _ in range(20)] == [again.next() for _ in range(20)]

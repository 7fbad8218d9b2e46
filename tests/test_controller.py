"""The controller, on made-up latencies: down at once, up with patience, and no flipping in between."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.errors import UsageError
from klas_zoo.runtime.controller import Controller, ControllerSettings

LADDER = [("a", 1.0), ("b", 2.0), ("c", 4.0), ("d", 8.0)]
AT_THE_EDGE = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 12.0}


def feed(controller: Controller, slowdown: float, calls: int) -> list[str]:
    """Calls that take `slowdown` times what their route takes alone, 1,000 a second; the routes they took."""
    taken = []
    for _ in range(calls):
        route = controller.route
        controller.observe(route, slowdown * dict(LADDER)[route], now_s=controller.counters().calls / 1000)
        taken.append(route)
    return taken


def test_it_starts_on_the_most_accurate_route_that_an_idle_machine_can_hold() -> None:
    assert Controller(LADDER, 100).route == "d"
    assert Controller(LADDER, 5).route == "c"
    assert Controller(LADDER, 0.5).route == "a"


def test_under_load_it_steps_down_as_far_as_the_excess_asks_for() -> None:
    controller = Controller(LADDER, 10)
    feed(controller, 1.0, 20)
    assert controller.route == "d"
    feed(controller, 3.0, 20)  # 24 ms, more than two targets: at once
    assert controller.route == "b"
    found = controller.counters()
    assert (found.steps_down, found.steps_up, found.over_target) == (1, 0, 1)
    assert found.last_step == "d → b: 24 ms are over 10 ms"


def test_a_small_excess_needs_some_calls_before_it_is_believed() -> None:
    controller = Controller(LADDER, 10)
    assert feed(controller, 1.5, 10) == ["d"] * 10  # 12 ms
    assert controller.route == "c"


def test_when_the_load_is_gone_it_climbs_back_one_step_at_a_time_after_patience() -> None:
    controller = Controller(LADDER, 10)
    feed(controller, 20.0, 5)
    assert controller.route == "a"
    taken = feed(controller, 1.0, 400)
    assert taken[-1] == "d"
    assert [name for index, name in enumerate(taken) if index == 0 or name != taken[index - 1]] == ["a", "b", "c", "d"]
    assert taken.count("b") == controller.settings.patience
    assert controller.counters().steps_up == 3


def test_a_load_at_the_edge_does_not_flip_routes() -> None:
    """`c` holds the target and `d` does not; every second look makes it believe that `d` would."""
    controller = Controller(LADDER, 10)
    flips = 0
    for number in range(10_000):
        before = controller.route
        # alone each route takes what the ladder says; d slows down what waits behind it
        controller.observe(before, AT_THE_EDGE[before], now_s=number / 1000)
        flips += controller.route != before
    found = controller.counters()
    assert found.patience == controller.settings.most_patience
    assert flips <= 25
    assert found.over_target < 150
    assert found.calls_of["c"] > 9_500


def test_what_failed_under_a_heavier_load_is_tried_again_soon_when_calls_are_rarer() -> None:
    controller, now = Controller(LADDER, 10), 0.0

    def call(every_s: float, latencies: dict[str, float]) -> None:
        nonlocal now
        now += every_s
        controller.observe(controller.route, latencies[controller.route], now_s=now)

    for _ in range(5_000):
        call(0.001, AT_THE_EDGE)
    assert (controller.route, controller.counters().patience) == ("c", controller.settings.most_patience)
    for _ in range(300):
        call(0.002, dict(LADDER))
    assert controller.route == "d"


def test_a_route_that_failed_makes_no_step_below_it_slower() -> None:
    controller = Controller(LADDER, 10)
    for number in range(5_000):
        controller.observe(controller.route, AT_THE_EDGE[controller.route], now_s=number / 1000)
    assert controller.route == "c"
    controller.observe("c", 100.0, now_s=5.0)  # a pause of the machine
    assert controller.route == "a"
    for number in range(5_001, 5_151):  # 50 to b, and 100 to c, which was left once
        controller.observe(controller.route, AT_THE_EDGE[controller.route], now_s=number / 1000)
    assert controller.route == "c"


def test_a_step_up_that_lasts_makes_it_patient_as_before() -> None:
    controller = Controller(LADDER, 10)
    patience = controller.settings.patience
    feed(controller, 20.0, 1)
    feed(controller, 1.0, 3 * patience + 50)  # d, left once, takes twice the patience
    assert controller.route == "d"
    feed(controller, 1.5, 10)
    assert controller.counters().taken_back == 1
    assert controller.counters().patience == 4 * patience
    feed(controller, 1.0, 4 * patience)
    assert controller.route == "d"
    for lasting, left in ((8, 2), (4, 1), (2, 1)):
        feed(controller, 1.0, lasting * patience)
        assert controller.counters().patience == left * patience


def test_one_slow_call_in_a_hundred_is_what_a_p99_allows() -> None:
    controller = Controller(LADDER, 10)
    for number in range(1_000):
        controller.observe(controller.route, 12.0 if number % 100 == 50 else 5.0, now_s=number / 1000)
    assert (controller.route, controller.counters().steps_down) == ("d", 0)
    for number in range(1_000, 1_200):
        controller.observe(controller.route, 12.0 if number % 25 == 0 else 5.0, now_s=number / 1000)
    assert controller.route != "d"


def test_calls_that_began_before_a_step_say_nothing_of_the_new_route() -> None:
    controller = Controller(LADDER, 10)
    feed(controller, 3.0, 1)
    assert controller.route == "b"
    for _ in range(50):
        controller.observe("d", 24.0)
    assert controller.route == "b"
    assert controller.counters().over_target == 51
    assert math.isnan(controller.counters().now_ms)


@given(
    st.lists(st.floats(0.1, 1000), min_size=1, max_size=300),
    st.floats(0.5, 50),
    st.integers(1, 20),
)
def test_whatever_happens_it_stays_on_the_ladder_and_its_counters_add_up(
    latencies: list[float], target: float, patience: int
) -> None:
    controller = Controller(LADDER, target, ControllerSettings(patience=patience, least=3, window=10))
    for latency in latencies:
        controller.observe(controller.route, latency)
    found = controller.counters()
    assert found.route in dict(LADDER)
    assert sum(found.calls_of.values()) == found.calls == len(latencies)
    assert found.over_target == sum(latency > target for latency in latencies)
    assert found.taken_back <= min(found.steps_up, found.steps_down)


@pytest.mark.parametrize(
    ("ladder", "target", "says"),
    [
        ([], 1.0, "needs routes"),
        ([("a", 2.0), ("b", 1.0)], 1.0, "from fast to slow"),
        ([("a", 0.0)], 1.0, "above zero"),
        ([("a", 1.0)], 0.0, "no latency"),
        ([("a", 1.0)], math.inf, "no latency"),
    ],
)
def test_what_makes_no_sense_is_refused(ladder: list[tuple[str, float]], target: float, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Controller(ladder, target)

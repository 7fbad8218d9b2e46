"""Which waiting requests are answered next, together and by which route: on made-up latencies, without a clock."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.serving.latencies import LatencyModel
from klas_zoo.serving.scheduling import Job, Scheduler

LADDER = ("a", "b", "c")
ALONE = {"a": 1.0, "b": 2.0, "c": 4.0, "odd": 3.0}


def latencies() -> LatencyModel:
    """Eight images take four times as long as one; a machine that is as fast as it was."""
    model = LatencyModel()
    model.update({name: {1: ms, 8: 4 * ms} for name, ms in ALONE.items()})
    for _ in range(100):
        model.observe("a", 1, ALONE["a"])
    return model


def scheduler(largest_batch: int = 8) -> Scheduler:
    return Scheduler(ladder=LADDER, latencies=latencies(), largest_batch=largest_batch)


def job(budget_ms: float = math.inf, images: int = 1, *, arrived_ms: float = 0.0, route: str | None = None) -> Job:
    return Job(
        images=images, arrived_s=arrived_ms / 1e3, deadline_s=(arrived_ms + budget_ms) / 1e3, route=route,
    )  # fmt: skip


def queue(*jobs: Job) -> list[Job]:
    return sorted(jobs, key=lambda one: one.urgency)


@pytest.mark.parametrize(("budget_ms", "route"), [(1.5, "a"), (3.9, "b"), (4.5, "c"), (1e6, "c")])
def test_a_request_alone_gets_the_most_accurate_route_within_its_budget(budget_ms: float, route: str) -> None:
    plan = scheduler().plan([job(budget_ms)], 0.0)
    assert (plan.route, len(plan.jobs), plan.late) == (route, 1, ())


def test_time_in_the_queue_counts() -> None:
    assert scheduler().plan([job(5)], 0.0).route == "c"
    assert scheduler().plan([job(5)], 0.002).route == "b"
    assert scheduler().plan([job(5)], 0.0035).route == "a"
    late = scheduler().plan([job(5)], 0.0045)
    assert (late.jobs, len(late.late)) == ((), 1)


def test_requests_are_merged_only_while_every_member_is_answered_in_time() -> None:
    # 4 ms alone, 5.7 ms two, 7.4 ms three
    patient, hasty = job(1000), job(6)
    plan = scheduler().plan(queue(hasty, *[replace(patient) for _ in range(6)]), 0.0)
    assert plan.route == "c" and hasty in plan.jobs
    assert 1e3 * hasty.deadline_s >= latencies().alone("c", len(plan.jobs))
    assert len(plan.jobs) == 2


def test_a_batch_has_at_most_the_largest_number_of_images() -> None:
    plan = scheduler(largest_batch=8).plan(queue(*[job(1000, images=3) for _ in range(5)]), 0.0)
    assert sum(one.images for one in plan.jobs) == 6


def test_a_longer_queue_lowers_the_route_before_it_makes_requests_late() -> None:
    routes = [scheduler(1).plan(queue(*[job(20) for _ in range(count)]), 0.0).route for count in (4, 9, 18)]
    assert routes == ["c", "b", "a"]


def test_a_request_that_names_a_route_gets_it_and_is_merged_with_its_like_only() -> None:
    named, other, free = job(route="odd"), job(route="odd"), job(1000)
    plan = scheduler().plan(queue(named, other, free, job(route="a")), 0.0)
    assert (plan.route, set(plan.jobs)) == ("odd", {named, other})


def test_patient_requests_do_not_grow_a_batch_until_another_is_late() -> None:
    """After a second of patience they go first; the other has 12 ms, and alone needs 1."""
    patient = [job(route="c") for _ in range(8)]
    hasty = job(12, arrived_ms=1005)
    plan = scheduler().plan(queue(*patient, hasty), 1.005)
    assert plan.route == "c" and 1 <= len(plan.jobs) < 8
    assert latencies().alone("c", len(plan.jobs)) + 1 <= 12


def test_a_request_without_a_deadline_is_served_after_a_second_however_many_come_later() -> None:
    old = job(route="c")
    plan = scheduler().plan(queue(old, *[job(50, arrived_ms=1000) for _ in range(20)]), 1.0)
    assert plan.jobs == (old,)


def test_what_cannot_be_in_time_any_more_is_given_up_and_the_others_are_served() -> None:
    lost, fine = job(5), job(50)
    plan = scheduler().plan(queue(lost, fine), 0.010)
    assert (plan.late, plan.jobs) == ((lost,), (fine,))


def test_a_ceiling_holds_for_steered_requests_only() -> None:
    steered, own = replace(job(100), steered=True), job(101)
    assert scheduler().plan([steered], 0.0, ceiling="b").route == "b"
    assert scheduler().plan([own], 0.0, ceiling="a").route == "c"
    plan = scheduler().plan(queue(steered, own), 0.0, ceiling="a")
    assert (plan.route, plan.jobs) == ("a", (steered,))


def test_a_slow_machine_lowers_the_route() -> None:
    found = scheduler()
    for _ in range(50):
        found.latencies.observe("b", 1, 2 * ALONE["b"])
    assert found.plan([job(4.5)], 0.0).route == "b"
    assert found.latencies.slowdown == pytest.approx(2, abs=0.1)


def test_latencies_between_measured_sizes_are_interpolated_and_beyond_them_in_proportion() -> None:
    model = latencies()
    found = [model.alone("b", images) for images in (1, 4, 8, 16)]
    assert found == pytest.approx([2, 2 + 6 * 3 / 7, 8, 16])
    assert model.alone("unknown", 1) == 0


JOBS = st.builds(
    lambda budget, images, arrived, route, steered: Job(
        images=images, arrived_s=arrived / 1e3, deadline_s=(arrived + budget) / 1e3, route=route, steered=steered
    ),
    st.floats(0.1, 100) | st.just(math.inf), st.integers(1, 8), st.floats(0, 2000),
    st.sampled_from([None, None, None, "a", "odd"]), st.booleans(),
)  # fmt: skip


@given(st.lists(JOBS, min_size=1, max_size=40), st.floats(0, 3), st.sampled_from([None, *LADDER]))
def test_whatever_waits_a_plan_serves_or_gives_up_something_and_keeps_its_promises(
    jobs: list[Job], now_s: float, ceiling: str | None
) -> None:
    found, waiting = scheduler(), queue(*jobs)
    plan = found.plan(waiting, now_s, ceiling=ceiling)
    assert plan.jobs or plan.late
    assert not set(plan.jobs) & set(plan.late) and {*plan.jobs, *plan.late} <= set(waiting)
    assert all(one.route in (None, plan.route) for one in plan.jobs)
    images = sum(one.images for one in plan.jobs)
    if len(plan.jobs) > 1:
        end_s = now_s + found.latencies.cautious(plan.route, images) / 1e3
        assert images <= 8 and all(end_s <= one.deadline_s for one in plan.jobs)
    # a lone job above the fastest route is in time as well
    if len(plan.jobs) == 1 and plan.jobs[0].route is None and plan.route != LADDER[0]:
        assert now_s + found.latencies.cautious(plan.route, images) / 1e3 <= plan.jobs[0].deadline_s

"""Which latencies an engine has, and which of them a pick compares: never two sets of conditions at once."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
from click.testing import CliRunner
from profiles_made_up import latency_model, network, profile, statistics

from klas_zoo.cli import main
from klas_zoo.errors import NothingFits, ProfileError, UnknownName, UsageError
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.profile import MeasuredNetwork, Profile
from klas_zoo.profiles.records import LatencyRecord, origin_of
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.latencies import apply_profiles
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import delete_tag, move_tag
from klas_zoo.routes import Route

STITCH = Route.stitch("tiny", 2, "base", 2, 4)
OTHER = Route.stitch("tiny", 1, "base", 3, 4)
OLD, NEW, NEWEST = (f"2026-0{month}-02T03:04:05+00:00" for month in (1, 2, 3))


NUMBERS = itertools.count()


def timed(tmp_path: Path, *profiles: Profile, route: Route = STITCH, **changes: Any) -> tuple[LatencyRecord, ...]:
    """The latencies of a registered engine, the best first, with these profiles beside its registry."""
    macs = latency_model().macs(OTHER if route == OTHER else STITCH)
    facts = {"family": "toy", "route": route, "macs": macs, "latencies": ()}
    registry = made_up.holding(tmp_path / f"registry{next(NUMBERS)}", made_up.planned(1, **facts | changes))
    ProfileStore.of(registry.root).add(profiles)
    apply_profiles(registry)
    (found,) = registry.engines()
    return found.latencies


def best(tmp_path: Path, *profiles: Profile, **changes: Any) -> tuple[str, float] | None:
    found = timed(tmp_path, *profiles, **changes)
    return (origin_of(found[0]), found[0].p50_ms) if found else None


def measured(p50_ms: float, when: str = OLD, **changes: Any) -> Profile:
    facts = {"networks": (network(STITCH, p50_ms),), "measured_at": when, "hardware": describe_cpu()}
    return profile(**facts | changes)


ROOFLINE = profile(origin="roofline", networks=(), measured_at=NEWEST, hardware=describe_cpu())


def test_a_measured_network_of_a_profile_is_a_measurement_of_the_engine(tmp_path: Path) -> None:
    (found,) = timed(tmp_path, measured(7.0))
    assert (found.origin, found.p50_ms, found.p90_ms, found.p99_ms, found.runs) == ("measured", 7.0, 7.7, 10.5, 60)
    assert found.shape == (1, 3, 8, 8)


def test_a_network_that_was_not_measured_is_interpolated_with_its_error(tmp_path: Path) -> None:
    (found,) = timed(tmp_path, measured(7.0), route=OTHER)
    expected = latency_model().predict_ms(OTHER)
    assert (origin_of(found), found.p50_ms) == ("interpolated (±2.5 %)", expected)
    assert (found.p90_ms, found.p99_ms) == pytest.approx((1.1 * expected, 1.5 * expected))


def test_measured_wins_over_interpolated_and_that_over_roofline_however_old_it_is(tmp_path: Path) -> None:
    assert best(tmp_path, ROOFLINE, measured(7.0)) == ("measured", 7.0)
    assert best(tmp_path, ROOFLINE, measured(7.0), route=OTHER)[0] == "interpolated (±2.5 %)"  # type: ignore[index]
    assert best(tmp_path, ROOFLINE, route=OTHER)[0] == "roofline (±2.5 %)"  # type: ignore[index]
    by_build = (made_up.latency(3.0),)
    assert best(tmp_path, measured(7.0, NEWEST), ROOFLINE, route=OTHER, latencies=by_build) == ("measured", 3.0)


def test_of_two_measurements_under_the_same_conditions_the_newer_counts(tmp_path: Path) -> None:
    assert timed(tmp_path, measured(7.0), measured(8.0, NEW))[0].p50_ms == 8.0
    assert len(timed(tmp_path, measured(8.0, NEW), measured(7.0))) == 1
    by_build = (made_up.latency(3.0, measured_at=NEW),)
    assert best(tmp_path, measured(7.0), latencies=by_build) == ("measured", 3.0)
    assert best(tmp_path, measured(7.0, NEWEST), latencies=by_build) == ("measured", 7.0)


def test_a_measurement_that_is_dated_in_the_future_does_not_count_for_ever(tmp_path: Path) -> None:
    """Of a machine whose clock was wrong."""
    never = "9999-12-31T00:00:00+00:00"
    by_build = (made_up.latency(3.0, measured_at=never),)
    assert best(tmp_path, measured(7.0), latencies=by_build) == ("measured", 7.0)
    assert best(tmp_path, measured(7.0, never), measured(8.0, NEW)) == ("measured", 8.0)


def test_times_of_other_zones_are_compared_as_times(tmp_path: Path) -> None:
    early, late = "2026-01-02T09:00:00+09:00", "2026-01-02T01:00:00+00:00"
    assert early > late  # as text
    assert best(tmp_path, measured(7.0, early), measured(8.0, late)) == ("measured", 8.0)
    assert best(tmp_path, measured(8.0, late), measured(7.0, early)) == ("measured", 8.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"macs": 1},
        {"parameters": 1},
        {"precision": "fp16"},
        {"runtime": "tensorrt"},
        {"input_shape": (3, 9, 9)},
        {"route": Route.anchor("small", 4)},
    ],
)
def test_a_profile_of_something_else_is_not_used(changes: dict[str, Any], tmp_path: Path) -> None:
    assert best(tmp_path, measured(7.0), **changes) is None


def test_a_failed_batch_is_not_used_and_batches_stay_apart(tmp_path: Path) -> None:
    failed = profile(networks=(), model=None, failure="out of memory")
    assert best(tmp_path, failed) is None
    found = timed(tmp_path, measured(7.0), measured(20.0, batch=8))
    assert [(one.batch, one.p50_ms) for one in found] == [(1, 7.0), (8, 20.0)]


OTHER_CONDITIONS: dict[str, dict[str, Any]] = {
    "other threads": {"threads": 2},
    "a CUDA graph": {"options": {"enable_cuda_graph": "1"}},
    "another machine": {"hardware": "a loom"},
    "another version": {"runtime_version": "9.9"},
    "the device's clock": {"clock": "device"},
}


@pytest.mark.parametrize("changes", OTHER_CONDITIONS.values(), ids=OTHER_CONDITIONS)
@pytest.mark.parametrize("p50_ms", [0.5, 50.0])
def test_a_profile_under_other_conditions_never_replaces_or_mixes_with_what_a_build_measured(
    tmp_path: Path, changes: dict[str, Any], p50_ms: float
) -> None:
    engines = [
        made_up.planned(1, route=route, macs=latency_model().macs(route), top1=top1, family="toy", latencies=ms)
        for route, top1, ms in ((STITCH, 80.0, 5.0), (OTHER, 70.0, 3.0))
    ]
    registry = made_up.holding(tmp_path / "registry", *engines)
    before = pick("5ms", registry=registry)
    assert (before.engine.route, before.latency_ms) == (STITCH, 5.0)
    ProfileStore.of(registry.root).add([measured(p50_ms, NEWEST, **changes)])
    apply_profiles(registry)
    (stitch,) = [one for one in registry.engines() if one.route == STITCH]
    assert sorted(one.p50_ms for one in stitch.latencies) == sorted([5.0, p50_ms])  # both are kept
    for budget, route in (("5ms", STITCH), ("4.9ms", OTHER)):
        after = pick(budget, registry=registry)
        assert (after.engine.route, after.candidates, after.left_out) == (route, 2, ())
        assert after.latency.conditions == before.latency.conditions
    assert pick("60ms", registry=registry).runner_up_faster.latency_ms == 3.0  # type: ignore[union-attr]


def test_a_device_clock_of_a_profile_is_stored_beside_its_host_clock_and_not_picked_by(tmp_path: Path) -> None:
    both = MeasuredNetwork(
        route=STITCH, macs=latency_model().macs(STITCH), parameters=5_000, latency=statistics(7.0),
        device=statistics(0.7),
    )  # fmt: skip
    found = timed(tmp_path, measured(7.0, networks=(both,)))
    assert [(one.clock, one.p50_ms) for one in found] == [("host", 7.0), ("device", 0.7)]
    registry = Registry(tmp_path / f"registry{next(NUMBERS) - 1}")
    assert pick("10ms", registry=registry).latency_ms == 7.0
    with pytest.raises(NothingFits):
        pick("1ms", registry=registry)


def test_engines_with_device_times_only_are_refused_with_the_reason(tmp_path: Path) -> None:
    registry = made_up.holding(
        tmp_path / "registry", made_up.planned(1, device="a100", latencies=(made_up.latency(1.0, clock="device"),))
    )
    with pytest.raises(UsageError, match=r"The latencies of deit-micro on a100 are device times, or .*: measure it on"):
        pick("5ms", registry=registry)


def test_a_profile_decides_where_no_build_measured(tmp_path: Path) -> None:
    engines = [made_up.planned(1, route=one, macs=latency_model().macs(one), family="toy", latencies=())
               for one in (STITCH, OTHER)]  # fmt: skip
    registry = made_up.holding(tmp_path / "registry", *engines)
    ProfileStore.of(registry.root).add([measured(6.0, threads=3)])
    apply_profiles(registry)
    found = pick("60ms", registry=registry)
    assert (found.latency.threads, found.candidates) == (3, 2)


def test_threads_that_were_asked_for_are_used(tmp_path: Path) -> None:
    registry = made_up.holding(
        tmp_path / "registry",
        made_up.planned(1, "a", 70.0, (made_up.latency(1.0), made_up.latency(0.5, threads=4))),
        made_up.planned(1, "b", 80.0, 2.0),
    )
    assert str(pick("5ms", registry=registry).engine.route) == "b"
    found = pick("5ms", threads=4, registry=registry)
    assert (str(found.engine.route), found.latency_ms, found.candidates) == ("a", 0.5, 1)
    assert found.left_out == ("1 engine of deit-micro: measured with another number of threads (--threads)",)
    with pytest.raises(UsageError, match=r"No engine was measured with 7 threads, only with 1, 4\."):
        pick("5ms", threads=7, registry=registry)


def test_latencies_of_profiles_are_found_when_a_build_is_registered_later(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry", create=True)
    ProfileStore.of(registry.root).add([measured(7.0)])
    new = made_up.planned(1, route=STITCH, macs=latency_model().macs(STITCH), family="toy", latencies=())
    made_up.register(registry, made_up.build(family="toy"), [new])
    assert [one.p50_ms for one in registry.engines()[0].latencies] == [7.0]


def test_a_damaged_profile_stops_neither_a_build_nor_a_pick_and_is_named_when_profiles_are_applied(
    tmp_path: Path,
) -> None:
    registry = made_up.filled_registry(tmp_path / "registry")
    (path,) = ProfileStore.of(registry.root).add([measured(7.0)])
    path.write_text("{")
    made_up.filled_registry(registry.root)
    assert pick("5ms", registry=registry).candidates == 3
    with pytest.raises(ProfileError, match=path.name):
        apply_profiles(registry)


# machines


def on(hardware: str, **changes: Any) -> tuple[Any, list[Any]]:
    """A build on a machine, of two engines, and its engines."""
    latencies = {"tiny": (made_up.latency(1.0, hardware=hardware),), "base": (made_up.latency(2.0, hardware=hardware),)}
    engines = [made_up.planned(1, name, 70.0 + 5 * len(name), timed, **changes) for name, timed in latencies.items()]
    return made_up.build(hardware=hardware, **changes), engines


def test_machines_that_share_a_registry_have_their_own_builds_and_numbers(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, create=True)
    mine = made_up.register(registry, *on(describe_cpu()))
    before = pick("5ms", registry=registry)
    move_tag(registry, "deit-micro@prod")
    theirs = made_up.register(registry, *on("a loom"))
    assert registry.current_build("deit-micro", "cpu", describe_cpu()) == mine
    assert registry.current_build("deit-micro", "cpu", "a loom") == theirs
    after = pick("5ms", registry=registry)
    assert (after.engine, after.latency, after.candidates) == (before.engine, before.latency, 2)
    assert after.left_out == ("2 engines of deit-micro: measured on other hardware (--hardware)",)
    asked = pick("5ms", hardware="loom", registry=registry)
    assert (asked.engine.build_id, asked.latency.hardware) == (theirs, "a loom")
    assert "a loom), measured" in asked.summary()[1]
    with pytest.raises(UnknownName, match="Unknown hardware 'wheel': known: "):
        pick("5ms", hardware="wheel", registry=registry)
    again = made_up.register(registry, *on(describe_cpu()))
    assert {one.build_id for one in registry.engines()} == {again, theirs}
    assert {one.build_id for one in registry.engines("deit-micro@prod")} == {mine}


def test_a_machine_that_measured_nothing_is_refused_and_told_what_there_is(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, create=True)
    made_up.register(registry, *on("a loom"))
    with pytest.raises(UsageError, match=r"was measured on this machine \(.*\), only on a loom: run klas-zoo build or"):
        pick("5ms", registry=registry)


def test_a_tag_points_to_a_build_of_each_machine_and_moves_one_without_the_others(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, create=True)
    mine, theirs = (made_up.register(registry, *on(machine)) for machine in (describe_cpu(), "a loom"))
    move_tag(registry, "deit-micro@prod")

    def tagged() -> set[int]:
        return {one.build_id for one in registry.engines("deit-micro@prod")}

    assert tagged() == {mine, theirs}
    newer = made_up.register(registry, *on(describe_cpu()))
    move_tag(registry, "deit-micro@prod")
    assert tagged() == {newer, theirs}
    move_tag(registry, "deit-micro@prod", build_id=mine)
    assert tagged() == {mine, theirs}
    assert check(registry) == []
    delete_tag(registry, "deit-micro@prod")
    with pytest.raises(UnknownName):
        tagged()


def test_a_new_driver_does_not_make_a_new_machine(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path, create=True)
    made_up.register(registry, *on("NVIDIA T4, 16 GiB, driver 1.1", device="t4"))
    newer = made_up.register(registry, *on("NVIDIA T4, 16 GiB, driver 2.2", device="t4"))
    assert {one.build_id for one in registry.engines()} == {newer}
    assert registry.current_build("deit-micro", "t4", "NVIDIA T4, 16 GiB, driver 3.3") == newer


# picking


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two engines for a t4 that nobody timed: a stitch of 12.8 ms that is better than one of 9.9 ms, predicted."""
    place = Registry.open(tmp_path / "registry", create=True)
    engines = [
        made_up.new_engine(
            tmp_path / f"{route}", route=route, top1=top1, latencies=(), macs=latency_model().macs(route),
            family="toy", device="t4",
        )
        for route, top1 in ((STITCH, 70.0), (OTHER, 60.0))
    ]  # fmt: skip
    made_up.register(place, made_up.build(family="toy", device="t4"), engines)
    return place


def hold(registry: Registry, *profiles: Profile) -> None:
    ProfileStore.of(registry.root).add([replace(one, device="t4", kind="gpu", threads=0) for one in profiles])
    apply_profiles(registry)


def test_a_pick_answers_from_a_roofline_and_says_so(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    found = pick("20ms", device="t4", registry=registry)
    assert (found.engine.route, found.latency.origin) == (STITCH, "roofline")
    assert "roofline (±2.5 %)" in found.summary()[1]
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["latency"]["origin"] == "roofline" and told["latency"]["p99_ms"] is None
    assert told["latency"]["error_percent"] == 2.5
    assert pick("20ms", device="tesla-t4", registry=registry).engine.route == STITCH


def test_latencies_are_filled_in_when_a_profile_arrives(registry: Registry) -> None:
    with pytest.raises(UsageError, match=r"nor at any other: measure a profile on such a machine"):
        pick("20ms", device="t4", registry=registry)
    hold(registry, ROOFLINE)
    assert pick("20ms", registry=registry).latency.origin == "roofline"
    hold(registry, measured(19.0))
    assert (pick("20ms", registry=registry).latency_ms, pick("20ms", registry=registry).latency.origin) == (
        19.0,
        "measured",
    )
    slower = pick("18ms", registry=registry)
    assert (slower.engine.route, slower.latency.origin) == (OTHER, "interpolated")
    assert slower.runner_up_slower is not None and slower.runner_up_slower.engine.route == STITCH


def test_measured_only_refuses_predictions(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    with pytest.raises(UsageError, match=r"was measured, there are only predictions \(roofline\): import a profile"):
        pick("20ms", measured_only=True, registry=registry)
    hold(registry, measured(19.0))
    assert pick("20ms", measured_only=True, registry=registry).candidates == 1
    with pytest.raises(NothingFits):
        pick("18ms", measured_only=True, registry=registry)


def test_a_roofline_knows_no_percentiles_and_an_interpolation_does(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    with pytest.raises(UsageError, match="A roofline predicts the median only"):
        pick("20ms", percentile="p90", registry=registry)
    hold(registry, measured(19.0))
    assert pick("30ms", percentile="p90", registry=registry).latency_ms == pytest.approx(20.9)


def test_the_command_says_where_a_latency_comes_from(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    arguments = ["pick", "--latency", "20ms", "--device", "T4", "--registry", str(registry.root)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "roofline (±2.5 %)" in result.stdout
    result = CliRunner().invoke(main, [*arguments, "--measured-only"], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, "")
    listed = CliRunner().invoke(main, ["list", "--registry", str(registry.root)], catch_exceptions=False)
    assert "roofline (±2.5 %)" in listed.stdout

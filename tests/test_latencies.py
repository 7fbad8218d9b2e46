"""Which latency of an engine counts: measured before interpolated before roofline, newer before older."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest
from click.testing import CliRunner
from profiles_made_up import latency_model, network, profile

from klas_zoo.cli import main
from klas_zoo.costs.estimates import origin_of
from klas_zoo.errors import NothingFits, ProfileError, UsageError
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry import Registry
from klas_zoo.registry.latencies import known_latencies
from klas_zoo.registry.picking import pick
from klas_zoo.registry.records import EngineRecord
from klas_zoo.routes import Route

STITCH = Route.stitch("tiny", 2, "base", 2, 4)
OTHER = Route.stitch("tiny", 1, "base", 3, 4)
OLD, NEW, NEWEST = (f"2026-0{month}-02T03:04:05+00:00" for month in (1, 2, 3))


def engine(tmp_path: Path, route: Route = STITCH, **changes: Any) -> EngineRecord:
    file = tmp_path / "engine"
    file.write_bytes(b"x")
    facts = {"family": "toy", "route": route, "macs": latency_model().macs(route), "latencies": ()}
    return made_up.engine(file, **facts | changes)


def best(one: EngineRecord, *profiles: Profile) -> tuple[str, float] | None:
    found = known_latencies(one, profiles)
    return (origin_of(found[0]), found[0].p50_ms) if found else None


def measured(p50_ms: float, when: str = OLD, **changes: Any) -> Profile:
    return profile(networks=(network(STITCH, p50_ms),), measured_at=when, **changes)


ROOFLINE = profile(origin="roofline", networks=(), measured_at=NEWEST)


def test_a_measured_network_of_a_profile_is_a_measurement_of_the_engine(tmp_path: Path) -> None:
    assert best(engine(tmp_path), measured(7.0)) == ("measured", 7.0)
    (found,) = known_latencies(engine(tmp_path), [measured(7.0)])
    assert (found.p90_ms, found.p99_ms, found.runs) == (7.7, 10.5, 60)
    assert found.shape == (1, 3, 8, 8)


def test_a_network_that_was_not_measured_is_interpolated_with_its_error(tmp_path: Path) -> None:
    one = engine(tmp_path, OTHER)
    (found,) = known_latencies(one, [measured(7.0)])
    expected = latency_model().predict_ms(OTHER)
    assert (origin_of(found), found.p50_ms) == ("interpolated (±2.5 %)", expected)
    assert (found.p90_ms, found.p99_ms) == pytest.approx((1.1 * expected, 1.5 * expected))


def test_measured_wins_over_interpolated_and_that_over_roofline_however_old_it_is(tmp_path: Path) -> None:
    known, unknown = engine(tmp_path), engine(tmp_path, OTHER)
    assert best(known, ROOFLINE, measured(7.0)) == ("measured", 7.0)
    assert best(unknown, ROOFLINE, measured(7.0))[0] == "interpolated (±2.5 %)"  # type: ignore[index]
    assert best(unknown, ROOFLINE)[0] == "roofline (±2.5 %)"  # type: ignore[index]
    by_build = engine(tmp_path, OTHER, latencies=(made_up.latency(3.0),))
    assert best(by_build, measured(7.0, NEWEST), ROOFLINE) == ("measured", 3.0)


def test_of_two_measurements_the_newer_counts(tmp_path: Path) -> None:
    assert best(engine(tmp_path), measured(7.0), measured(8.0, NEW)) == ("measured", 8.0)
    assert best(engine(tmp_path), measured(8.0, NEW), measured(7.0)) == ("measured", 8.0)
    by_build = engine(tmp_path, latencies=(made_up.latency(3.0, measured_at=NEW),))
    assert best(by_build, measured(7.0)) == ("measured", 3.0)
    assert best(by_build, measured(7.0, NEWEST)) == ("measured", 7.0)


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
def test_a_profile_of_something_else_tells_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    assert best(replace(engine(tmp_path), **changes), measured(7.0)) is None


def test_a_failed_batch_tells_nothing_and_batches_stay_apart(tmp_path: Path) -> None:
    failed = profile(networks=(), model=None, failure="out of memory")
    assert best(engine(tmp_path), failed) is None
    found = known_latencies(engine(tmp_path), [measured(7.0), measured(20.0, batch=8)])
    assert [(one.batch, one.p50_ms) for one in found] == [(1, 7.0), (8, 20.0)]


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
    place.register(made_up.build(family="toy", device="t4"), engines)
    return place


def hold(registry: Registry, *profiles: Profile) -> None:
    ProfileStore.of(registry.root).add([replace(one, device="t4", kind="gpu", threads=0) for one in profiles])


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
    with pytest.raises(UsageError, match=r"was measured, there is only roofline \(±2\.5 %\): import a profile"):
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


def test_a_damaged_profile_is_named(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    (path,) = ProfileStore.of(registry.root).paths()
    path.write_text("{")
    with pytest.raises(ProfileError, match=path.name):
        pick("20ms", registry=registry)


def test_the_command_says_where_a_latency_comes_from(registry: Registry) -> None:
    hold(registry, ROOFLINE)
    arguments = ["pick", "--latency", "20ms", "--device", "T4", "--registry", str(registry.root)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "roofline (±2.5 %)" in result.stdout
    result = CliRunner().invoke(main, [*arguments, "--measured-only"], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, "")
    listed = CliRunner().invoke(main, ["list", "--registry", str(registry.root)], catch_exceptions=False)
    assert "roofline (±2.5 %)" in listed.stdout

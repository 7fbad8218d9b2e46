"""All families of one machine in one picture, against brute force."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import made_up
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klas_zoo.cli import main
from klas_zoo.errors import UnknownName
from klas_zoo.registry import Registry
from klas_zoo.registry.overview import Overview, overview
from klas_zoo.registry.picking import pick
from klas_zoo.routes import Route

NUMBERS = itertools.count()
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def registry_of(place: Path, *engines: made_up.NewEngine) -> Registry:
    return made_up.holding(place / str(next(NUMBERS)), *engines)


@pytest.fixture
def two_families(place: Path) -> Registry:
    """A stitch that is the best of its family, one that a plain network of another dominates, and a good one."""
    stitch, bad = Route.stitch("small", 2, "large", 2, 4), Route.stitch("small", 3, "large", 3, 4)
    return registry_of(
        place,
        made_up.planned(1, "small", 70.0, 1.0, family="f"),
        made_up.planned(1, "x", 76.0, 2.0, family="f", route=stitch),
        made_up.planned(1, "y", 77.0, 3.0, family="f", route=bad),
        made_up.planned(1, "large", 80.0, 4.0, family="f"),
        made_up.planned(1, "levit", 79.0, 2.5, family="levit"),
        made_up.planned(1, "claim", 99.0, 1.0, family="claim", accuracy_source="its authors"),
    )


def test_stitches_that_a_plain_network_dominates_are_marked_with_it(two_families: Registry) -> None:
    found = overview(two_families)
    marks = {one.route: (one.on_frontier, one.dominated_by) for one in found.points}
    assert marks == {
        "small": (True, ""),
        "small.1-2+large.3-4": (True, ""),
        "levit": (True, ""),
        "small.1-3+large.4-4": (False, "levit: levit (onnxruntime, fp32)"),
        "large": (True, ""),
    }
    assert found.left_out == ("1 engine of claim: the accuracy is claimed (--claimed)",)
    assert [one.latency_ms for one in found.points] == sorted(one.latency_ms for one in found.points)


LEVEL = st.integers(1, 4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(engines=st.lists(st.tuples(LEVEL, LEVEL, st.booleans()), min_size=1, max_size=7))
def test_frontier_and_dominance_are_what_brute_force_finds(place: Path, engines: list[tuple[int, int, bool]]) -> None:
    planned = []
    for number, (ms, tens, plain) in enumerate(engines):
        route = Route.anchor(f"e{number}", 4) if plain else Route.stitch(f"e{number}", 1, "other", 1, 4)
        planned.append(made_up.planned(1, f"e{number}", 10.0 * tens, float(ms), route=route))
    registry = registry_of(place, *planned)
    found = overview(registry)
    table = [(ms, 10.0 * tens, plain) for ms, tens, plain in engines]
    for one in found.points:
        here = (one.latency_ms, one.top1)
        dominating = [row for row in table if row[0] <= here[0] and row[1] >= here[1] and row[:2] != here]
        if one.on_frontier:
            assert not dominating
        assert bool(one.dominated_by) == (not one.plain and any(row[2] for row in dominating))
    points = {row[:2] for row in table}
    best = {p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)}
    assert {(one.latency_ms, one.top1) for one in found.points if one.on_frontier} == best
    # a pick is always on the frontier
    for budget in range(1, 5):
        if min(row[0] for row in table) <= budget:
            picked = pick(float(budget), registry=registry)
            assert (picked.latency_ms, picked.engine.top1) in best


def test_the_command_shows_draws_and_prints_json(two_families: Registry, tmp_path: Path) -> None:
    words = ["frontier", "--registry", str(two_families.root), "--plot", str(tmp_path / "frontier.png")]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "1 of 2 stitches are dominated by a plain network." in result.stdout
    assert "excluded 1 engine of claim" in result.stdout
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    found = json.loads(CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False).stdout)
    assert len(found["points"]) == 5 and found["percentile"] == "p50"


def test_claimed_accuracies_and_other_percentiles_are_asked_for(two_families: Registry) -> None:
    found: Overview = overview(two_families, claimed=True, percentile="p90")
    assert len(found.points) == 6 and found.points[0].latency_ms == pytest.approx(1.1)
    with pytest.raises(UnknownName, match="did you mean p99 or p90"):
        overview(two_families, percentile="p91")

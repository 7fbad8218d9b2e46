"""Picking, against a brute force that shares no code with it."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import made_up
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klas_zoo.errors import (
    BadQuantity,
    DamagedRegistry,
    KlasZooError,
    NothingFits,
    RegistryError,
    UnknownName,
    UsageError,
)
from klas_zoo.hardware import describe_cpu
from klas_zoo.registry import Registry, database
from klas_zoo.registry.picking import pick
from klas_zoo.registry.records import NewEngine
from klas_zoo.registry.store import check_file
from klas_zoo.routes import Route

planned = made_up.planned
_PLACE: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[None]:
    """Where `holding` puts registries: in memory where it can be, as each is synced to the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        _PLACE[:] = [Path(folder)]
        yield


def holding(*engines: NewEngine) -> Registry:
    return made_up.holding(_PLACE[0] / f"{next(_NUMBERS)}", *engines)


_NUMBERS = itertools.count()


@pytest.fixture
def three() -> Registry:
    """tiny 1 ms 70 % 1 B, small 2 ms 80 % 2 B, base 4 ms 90 % 4 B."""
    return holding(
        planned(1, "tiny", 70.0, 1.0), planned(2, "small", 80.0, 2.0), planned(4, "base", 90.0, 4.0)
    )


def name(found: Any) -> str | None:
    return str(found.engine.route) if found else None


# what is picked


@pytest.mark.parametrize(
    ("latency", "expected"),
    [
        ("1ms", "tiny"),
        ("1.99ms", "tiny"),
        ("2ms", "small"),
        (3.9, "small"),
        ("4000us", "base"),
        ("1s", "base"),
    ],
)
def test_the_most_accurate_engine_within_the_budget_is_picked(
    three: Registry, latency: str | float, expected: str
) -> None:
    assert name(pick(latency, registry=three)) == expected


def test_other_limits_hold_too(three: Registry) -> None:
    assert name(pick("10ms", max_size="3B", registry=three)) == "small"
    assert name(pick("10ms", max_size=1, registry=three)) == "tiny"
    assert name(pick("10ms", min_accuracy=90, max_size=4, registry=three)) == "base"


def test_of_equally_accurate_engines_the_faster_is_picked() -> None:
    slow, fast = planned(1, "slow", 80.0, 2.0), planned(4, "fast", 80.0, 1.0)
    assert name(pick("5ms", registry=holding(slow, fast))) == "fast"
    assert name(pick("5ms", registry=holding(fast, slow))) == "fast"


def test_of_equally_accurate_and_fast_engines_the_smaller_is_picked() -> None:
    big, small = planned(4, "big"), planned(1, "small")
    assert name(pick("5ms", registry=holding(big, small))) == "small"
    assert name(pick("5ms", registry=holding(small, big))) == "small"


def test_ties_look_at_the_percentile_that_was_asked_for() -> None:
    steady = planned(1, "steady", latencies=(made_up.latency(2.0, p99_ms=2.1),))
    nervous = planned(1, "nervous", latencies=(made_up.latency(1.0, p99_ms=9.0),))
    assert name(pick("10ms", registry=holding(steady, nervous))) == "nervous"
    assert name(pick("10ms", percentile="p99", registry=holding(steady, nervous))) == "steady"


def test_the_latency_is_that_of_the_batch_size_asked_for() -> None:
    latencies = (made_up.latency(1.0), made_up.latency(6.0, batch=8, threads=2))
    found = pick("6ms", batch=8, registry=holding(planned(1, latencies=latencies)))
    assert (found.latency_ms, found.latency.threads, found.percentile) == (6.0, 2, "p50")
    with pytest.raises(NothingFits):
        pick("5ms", batch=8, registry=holding(planned(1, latencies=latencies)))


NUMBERS = st.integers(1, 4)
SPECIFICATION = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)  # top1 in tens, p50, p90 over p50, size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    specifications=st.lists(SPECIFICATION, min_size=1, max_size=8),
    budget=st.integers(1, 5),
    percentile=st.sampled_from(["p50", "p90"]),
    min_accuracy=st.none() | st.sampled_from([0, 15, 20, 30, 100]),
    max_size=st.none() | st.integers(1, 4),
)
def test_a_pick_is_what_brute_force_finds(
    specifications: list[tuple[int, int, int, int]],
    budget: int,
    percentile: str,
    min_accuracy: int | None,
    max_size: int | None,
) -> None:
    engines, table = [], []
    for number, (tens, p50, extra, size) in enumerate(specifications):
        measured = made_up.latency(float(p50), p90_ms=float(p50 + extra))
        engines.append(planned(size, f"e{number}", 10.0 * tens, (measured,)))
        table.append((10.0 * tens, p50 if percentile == "p50" else p50 + extra, size))
    small_enough = [
        (accuracy, ms, size)
        for accuracy, ms, size in table
        if (max_size is None or size <= max_size) and (min_accuracy is None or accuracy >= min_accuracy)
    ]
    fitting = [row for row in small_enough if row[1] <= budget]
    limits: dict[str, Any] = {"percentile": percentile, "min_accuracy": min_accuracy, "max_size": max_size}
    if not fitting:
        with pytest.raises(NothingFits):
            pick(float(budget), registry=holding(*engines), **limits)
        return
    best = max(fitting, key=lambda row: (row[0], -row[1], -row[2]))
    found = pick(float(budget), registry=holding(*engines), **limits)
    assert (found.engine.top1, found.latency_ms, found.engine.size_bytes) == best
    assert (found.fitting, found.candidates) == (len(fitting), len(table))

    faster = [row for row in fitting if row[1] < best[1]]
    assert bool(faster) == (found.runner_up_faster is not None)
    if found.runner_up_faster:
        chosen = found.runner_up_faster
        assert chosen.engine.top1 == max(row[0] for row in faster)
        assert chosen.latency_ms == min(row[1] for row in faster if row[0] == chosen.engine.top1)
        assert chosen.latency_difference_ms == chosen.latency_ms - best[1]
        assert chosen.top1_difference == chosen.engine.top1 - best[0]
    slower = [row for row in small_enough if row[1] > budget and row[0] > best[0]]
    assert bool(slower) == (found.runner_up_slower is not None)
    if found.runner_up_slower:
        assert found.runner_up_slower.latency_ms == min(row[1] for row in slower)
        assert found.runner_up_slower.top1_difference > 0


# how much the database is asked


def traced(registry: Registry, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[str]:
    """The statements of a pick, and that none but the one that counts `builds` reads a whole table."""
    statements: list[str] = []
    attach = database._attach

    def attach_and_trace(*words: Any) -> sqlite3.Connection:
        connection = attach(*words)
        connection.set_trace_callback(statements.append)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(database, "_attach", attach_and_trace)
        pick("5ms", registry=registry, **arguments)
    with closing(database.connect(registry.database_path)) as connection:
        connection.execute("CREATE TEMP TABLE candidates (engine_id, conditions_id, family, name, top1, size_bytes,"
                           " p50_ms, p90_ms, p99_ms)")  # fmt: skip
        for statement in statements:
            if statement.startswith("SELECT") and "candidates" not in statement:
                plan = [row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
                scanned = [one for one in plan if one.startswith(("SCAN engines", "SCAN latencies"))]
                assert scanned == [], statement
    return statements


def test_a_pick_asks_the_database_the_same_few_questions_however_many_engines_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = traced(holding(*(planned(1, f"e{n}", 60.0 + n, 1.0 + n) for n in range(9))), monkeypatch)
    engines = [planned(1, f"e{n}", 60.0 + n / 10, 1.0 + n / 10, family=f"f{n % 10}") for n in range(300)]
    many = traced(holding(*engines), monkeypatch)
    assert len(few) == len(many) < 30
    # only the picked engine and its neighbours are read as records, and the budget is a condition
    assert sum("engines.*" in one for one in many) <= 3
    assert any("WHERE ms <= 5.0" in one and "LIMIT 1" in one for one in many)


# what is said about it


def test_the_neighbours_say_what_they_would_save_and_cost(three: Registry) -> None:
    found = pick("3ms", registry=three)
    faster, slower = found.runner_up_faster, found.runner_up_slower
    assert (name(faster), name(found), name(slower)) == ("tiny", "small", "base")
    assert faster and (faster.latency_difference_ms, faster.top1_difference) == (-1.0, -10.0)
    assert slower and (slower.latency_difference_ms, slower.top1_difference) == (2.0, 10.0)


def test_of_several_better_engines_over_the_budget_the_fastest_is_the_neighbour(
) -> None:
    registry = holding(
        planned(1, "mine", 70.0, 1.0),
        planned(1, "next", 80.0, 2.0),
        planned(1, "next-better", 81.0, 2.0),
        planned(1, "best", 90.0, 9.0),
        planned(4, "too-big", 90.0, 1.5),
    )
    assert name(pick("1ms", max_size=3, registry=registry).runner_up_slower) == "next-better"


def test_an_explanation_is_lines_for_people(three: Registry) -> None:
    assert pick("3ms", registry=three).explain() == [
        "small of deit-micro on cpu (onnxruntime, fp32)",
        f"latency  2.00 ms of 3.00 ms (p50, batch 1, 1 thread, {describe_cpu()}), measured",
        "top-1    80.00 % on 50 images of 50 images of clouds",
        "size     2 B, 1 M MACs",
        "fitting  2 of 3 engines",
        "faster   tiny: 1.00 ms (1.00 ms less), top-1 70.00 % (-10.00 points)",
        "slower   base: 4.00 ms (2.00 ms more), top-1 90.00 % (+10.00 points)",
    ]


def test_a_pick_of_random_weights_says_so_aloud() -> None:
    found = pick("3ms", registry=holding(planned(1, weights="random")))
    assert found.random_weights
    assert found.to_json()["random_weights"] is True
    assert found.summary()[-1] == "warning  its weights are random: the accuracy means nothing"
    trained = pick("3ms", registry=holding(planned(1)))
    assert not trained.random_weights
    assert not any("random" in line for line in trained.explain())


def test_a_pick_is_json_with_all_its_numbers() -> None:
    stitch = planned(1, "x", 85.0, 2.5, route=Route.stitch("tiny", 3, "base", 5, 8))
    others = planned(2, "small", 80.0, 2.0), planned(4, "base", 90.0, 4.0)
    found = pick("3ms", max_size="1kB", registry=holding(stitch, *others))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["schema_version"] == 2
    assert told["engine"]["route"] == "tiny.1-3+base.6-8"
    assert told["engine"]["segments"] == [["tiny", 1, 3], ["base", 6, 8]]
    assert told["engine"]["path"] == str(found.engine.path)
    assert (told["engine"]["format"], told["engine"]["status"]) == ("onnx", "verified")
    assert told["latency"]["clock"] == "host" and told["left_out"] == []
    assert told["engine"]["verification"]["images"] == 50
    assert told["latency"]["p50_ms"] == told["latency_ms"] == 2.5
    assert told["limits"] == {
        "latency_ms": 3.0,
        "percentile": "p50",
        "batch": 1,
        "min_accuracy": None,
        "max_size_bytes": 1000,
    }
    assert told["runner_up_faster"]["engine"]["route"] == "small"
    assert told["runner_up_slower"]["top1_difference"] == 5.0


# what does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"latency": "0.05ms"},
            "No engine of deit-micro on cpu is within 0.0500 ms (p50, batch 1): "
            "the nearest is tiny, 1.00 ms, 0.950 ms over.",
        ),
        (
            {"latency": "5ms", "min_accuracy": 95},
            "No engine of deit-micro on cpu is within 5.00 ms (p50, batch 1), at least 95 % accurate: "
            "the nearest is base, top-1 90.00 %, 5 points short.",
        ),
        (
            {"latency": "1ms", "min_accuracy": 75, "max_size": "1B"},
            "No engine of deit-micro on cpu is within 1.00 ms (p50, batch 1), at least 75 % accurate, "
            "at most 1 B: the nearest is tiny, top-1 70.00 %, 5 points short.",
        ),
        (
            # small misses both by little, tiny the accuracy by more, base the latency by more
            {"latency": "1.9ms", "min_accuracy": 81, "percentile": "p50"},
            "No engine of deit-micro on cpu is within 1.90 ms (p50, batch 1), at least 81 % accurate: "
            "the nearest is small, 2.00 ms, 0.100 ms over; top-1 80.00 %, 1 point short.",
        ),
        (
            {"latency": "4ms", "min_accuracy": 90, "max_size": 3},
            "No engine of deit-micro on cpu is within 4.00 ms (p50, batch 1), at least 90 % accurate, "
            "at most 3 B: the nearest is small, top-1 80.00 %, 10 points short.",
        ),
        (
            {"latency": "3.9ms", "min_accuracy": 90, "max_size": 3, "percentile": "p90"},
            "No engine of deit-micro on cpu is within 3.90 ms (p90, batch 1), at least 90 % accurate, "
            "at most 3 B: the nearest is small, top-1 80.00 %, 10 points short.",
        ),
    ],
)
def test_when_nothing_fits_the_nearest_engine_and_each_miss_are_named(
    three: Registry, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(NothingFits) as raised:
        pick(registry=three, **arguments)
    assert str(raised.value) == message
    assert raised.value.exit_code == 1


def test_the_nearest_engine_has_the_smallest_sum_of_misses_each_relative_to_its_limit(
) -> None:
    much_of_one = planned(1, "much-of-one", 80.0, 1.5)  # half too slow
    some_of_two = planned(1, "some-of-two", 48.0, 1.4)  # 0.4 too slow and 0.4 too bad
    with pytest.raises(NothingFits, match=r"the nearest is much-of-one, 1\.50 ms, 0\.500 ms over"):
        pick("1ms", min_accuracy=80, registry=holding(much_of_one, some_of_two))


def test_every_limit_that_the_nearest_engine_misses_is_named() -> None:
    with pytest.raises(
        NothingFits, match=r"tiny, 1\.00 ms, 0\.500 ms over; top-1 70\.00 %, 5 .*; 4 B, 1 B over\.$"
    ):
        pick(0.5, min_accuracy=75, max_size=3, registry=holding(planned(4)))


# what makes no sense


@pytest.mark.parametrize("latency", ["5", "fast", "", "-5ms", "0ms", 0, -1.0, math.nan, math.inf])
def test_a_latency_that_is_none_is_a_bad_quantity(three: Registry, latency: str | float) -> None:
    with pytest.raises(BadQuantity):
        pick(latency, registry=three)


@pytest.mark.parametrize("size", ["5", "big", 0, -1])
def test_a_size_that_is_none_is_a_bad_quantity(three: Registry, size: str | int) -> None:
    with pytest.raises(BadQuantity):
        pick("5ms", max_size=size, registry=three)


@pytest.mark.parametrize("accuracy", [-0.1, 100.1, math.nan])
def test_an_accuracy_out_of_range_is_a_usage_error(three: Registry, accuracy: float) -> None:
    with pytest.raises(UsageError, match="per cent, 0 to 100"):
        pick("5ms", min_accuracy=accuracy, registry=three)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "deit-mikro"}, "Unknown family 'deit-mikro': did you mean deit-micro?"),
        ({"family": "x"}, "Unknown family 'x': known: deit-micro."),
        ({"device": "cqu"}, "Unknown device 'cqu': did you mean cpu?"),
        ({"percentile": "p95"}, "Unknown percentile 'p95': did you mean p99 or p90 or p50?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    three: Registry, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownName) as raised:
        pick("5ms", registry=three, **arguments)
    assert str(raised.value) == message
    assert raised.value.exit_code == 2


def test_a_batch_size_that_was_not_measured_is_answered_with_those_that_were() -> None:
    latencies = (made_up.latency(1.0), made_up.latency(6.0, batch=8))
    with pytest.raises(UsageError, match=r"measured at batch size 2, only at 1, 8\."):
        pick("5ms", batch=2, registry=holding(planned(1, latencies=latencies)))
    with pytest.raises(UsageError, match="nor at any other"):
        pick("5ms", registry=holding(planned(1, latencies=())))


def test_an_engine_without_that_batch_size_is_no_candidate() -> None:
    other = planned(1, "other", 99.0, (made_up.latency(1.0, batch=8),))
    found = pick("5ms", registry=holding(planned(1, "tiny"), other))
    assert (name(found), found.candidates) == ("tiny", 1)


def test_of_several_devices_one_has_to_be_named() -> None:
    registry = holding(planned(1, "a"), planned(1, "b", device="gpu"))
    with pytest.raises(UsageError, match="several devices are registered, cpu, gpu: pass --device"):
        pick("5ms", registry=registry)
    assert name(pick("5ms", device="gpu", registry=registry)) == "b"


def test_a_device_of_another_family_does_not_have_to_be_named() -> None:
    registry = holding(
        planned(1, "a", family="f"), planned(1, "b", family="g", device="gpu")
    )
    assert name(pick("5ms", family="g", registry=registry)) == "b"
    with pytest.raises(UsageError, match="g has no engines for cpu, only for gpu"):
        pick("5ms", family="g", device="cpu", registry=registry)


def test_families_compare_only_on_the_same_images_and_what_was_left_out_is_said() -> None:
    mine = planned(1, "a", 70.0, family="f")
    same = planned(1, "b", 80.0, family="g")
    other = planned(1, "c", 90.0, family="h", data_fingerprint="other")
    found = pick("5ms", registry=holding(mine, same, other))
    assert (name(found), found.candidates) == ("b", 2)
    assert found.left_out == ("1 engine of h: evaluated on other images (--family)",)
    assert found.summary()[-1] == "excluded 1 engine of h: evaluated on other images (--family)"
    assert name(pick("5ms", family="h", registry=holding(mine, other))) == "c"


def test_all_precisions_and_runtimes_compete() -> None:
    on = {"provider": "CUDAExecutionProvider", "hardware": "a GPU", "threads": 0}
    engines = [
        planned(4, "tiny", 80.0, (made_up.latency(4.0, **on),), device="gpu"),
        planned(2, "tiny", 79.9, (made_up.latency(2.0, precision="fp16", **on),), device="gpu", precision="fp16"),
        planned(
            1, "tiny", 79.8, (made_up.latency(1.0, runtime="tensorrt", runtime_version="11", precision="fp16", **on),),
            device="gpu", precision="fp16", runtime="tensorrt", format="tensorrt",
        ),
    ]  # fmt: skip
    registry = holding(*engines)
    for budget, expected in (("4ms", "onnxruntime fp32"), ("3ms", "onnxruntime fp16"), ("1ms", "tensorrt fp16")):
        found = pick(budget, registry=registry)
        assert f"{found.engine.runtime} {found.engine.precision}" == expected
        assert found.candidates == 3
    assert found.summary()[0] == "tiny of deit-micro on gpu (tensorrt, fp16)"
    assert found.explain()[-1].startswith("slower   tiny (onnxruntime, fp16): 2.00 ms (1.00 ms more), top-1 79.90 %")
    with pytest.raises(NothingFits, match=r"the nearest is tiny \(tensorrt, fp16\), 1\.00 ms, 0\.500 ms over"):
        pick("0.5ms", registry=registry)


@pytest.mark.parametrize("status", ["built, not run", "to be compiled on the target"])
def test_an_engine_that_was_not_verified_is_never_picked(status: Any) -> None:
    unverified = {"status": status, "reason": "no such GPU here", "verification": None}
    # a latency that somebody predicted for it changes nothing
    other = planned(1, "other", 99.0, 0.5, runtime="tensorrt", format="tensorrt", **unverified)
    found = pick("5ms", registry=holding(planned(1), other))
    assert (name(found), found.candidates) == ("tiny", 1)
    assert found.left_out == (f"1 engine of deit-micro: {status}",)
    with pytest.raises(UsageError, match=rf"No engine for cpu was run on one yet \(1 {status}\): run klas-zoo install"):
        pick("5ms", registry=holding(other))


def test_a_claimed_accuracy_counts_only_where_it_was_asked_for() -> None:
    claim = {"family": "g", "accuracy_source": "its authors", "data_fingerprint": "", "images": 0}
    registry = holding(planned(1, "a", 70.0, family="f"), planned(1, "b", 90.0, **claim))
    found = pick("5ms", registry=registry)
    assert (name(found), found.left_out) == ("a", ("1 engine of g: the accuracy is claimed (--claimed)",))
    for asked in ({"claimed": True}, {"family": "g"}):
        found = pick("5ms", registry=registry, **asked)  # type: ignore[arg-type]
        assert (name(found), found.left_out) == ("b", ())
        assert "90.00 % claimed by its authors" in found.summary()[2]
    with pytest.raises(UsageError, match=r"Nothing can be picked: for all 1 candidates, the accuracy is claimed"):
        pick("5ms", registry=holding(planned(1, **claim)))


def test_all_that_was_left_out_is_counted_by_engine_with_the_first_reason() -> None:
    registry = holding(
        planned(1, "good", 70.0, (made_up.latency(1.0), made_up.latency(2.0, threads=7))),
        planned(1, "worse", 60.0),
        planned(1, "batched", 99.0, (made_up.latency(1.0, batch=8),)),
        planned(1, "untimed", 99.0, ()),
        planned(1, "old", 99.0, (made_up.latency(1.0, runtime_version="0.1"),), family="g"),
        planned(1, "graph", 99.0, (made_up.latency(1.0, options='{"x":"1"}'),), family="g"),
    )
    found = pick("5ms", registry=registry)
    assert (name(found), found.candidates) == ("good", 2)
    assert found.left_out == (
        "2 engines of deit-micro: no latency at batch size 1",
        "1 engine of g: timed by the device's clock or with other options only",
        "1 engine of g: measured with another version of their runtime",
    )


def test_an_empty_registry_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"No registry at .*: run klas-zoo build, add or install first"):
        pick("5ms", registry=tmp_path / "none")
    Registry.open(tmp_path / "empty", create=True)
    with pytest.raises(RegistryError, match="holds no engines: run klas-zoo build, add or install first"):
        pick("5ms", registry=tmp_path / "empty")


def test_the_default_registry_is_the_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLAS_ZOO_REGISTRY", str(tmp_path))
    made_up.register(Registry.open(create=True), made_up.build(), [made_up.new_engine(tmp_path / "a", "mine")])
    assert name(pick("5ms")) == "mine"


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_pick_whose_file_is_gone_names_the_file(tmp_path: Path, damage: str) -> None:
    registry = Registry.open(tmp_path, create=True)
    made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a")])
    path = registry.engines()[0].path
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"x")
    with pytest.raises(DamagedRegistry) as raised:
        pick("5ms", registry=registry)
    assert str(path) in str(raised.value)
    assert "Run klas-zoo build or install again" in str(raised.value)


# loading


@pytest.fixture
def doubling(tmp_path: Path) -> Registry:
    """A registry whose one engine is a real one: it doubles 24 numbers, on two threads."""
    onnx = pytest.importorskip("onnx")
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("klas_zoo.runtimes")
    helper = onnx.helper
    matrix = onnx.numpy_helper.from_array(2 * numpy.eye(24, dtype=numpy.float32), "matrix")
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["y"])],
        "doubling",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 3, 2, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 24])],
        [matrix],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "doubling")
    registry = Registry.open(tmp_path, create=True)
    new = made_up.new_engine(tmp_path / "doubling", latencies=(made_up.latency(1.0, threads=2),))
    made_up.register(registry, made_up.build(), [new])
    return registry


def test_a_picked_engine_loads_and_runs_as_it_was_measured(doubling: Registry) -> None:
    numpy = pytest.importorskip("numpy")
    found = pick("5ms", registry=doubling)
    with found.load() as session:
        x = numpy.arange(24, dtype=numpy.float32).reshape(1, 3, 2, 4)
        assert (session.run(x) == 2 * x.reshape(1, 24)).all()
        assert (session.runtime, session.provider, session.threads) == ("onnxruntime", "CPUExecutionProvider", 2)
        assert session.options == ""
    with found.load(threads=1) as session:
        assert session.threads == 1


def test_a_latency_of_a_larger_machine_opens_no_more_threads_than_there_are_cores_here(
    tmp_path: Path, doubling: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("klas_zoo.registry.picked.physical_cores", lambda: 3)
    file = next(doubling.root.rglob("packages/*/doubling*"))
    there = made_up.latency(1.0, threads=64, hardware="AMD EPYC 9654, 64 cores")
    build = made_up.build(hardware="AMD EPYC 9654, 64 cores")
    made_up.register(doubling, build, [made_up.new_engine(file, latencies=(there,))])
    found = pick("5ms", registry=doubling, hardware="9654", threads=64)
    for threads, opened in ((None, 3), (5, 5)):
        with found.load(threads=threads) as session:
            assert session.threads == opened


def test_an_engine_that_was_tampered_with_is_not_loaded(doubling: Registry) -> None:
    found = pick("5ms", registry=doubling)
    content = found.engine.path.read_bytes()
    found.engine.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedRegistry, match="is not the file that was registered"):
        found.load()


def test_an_engine_whose_weights_were_tampered_with_is_not_loaded(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "weights.bin").write_bytes(b"weights")
    new = made_up.new_engine(package / "tiny.onnx")
    made_up.new_engine(package / "other.onnx")
    made_up.write_manifest(package)
    registry = Registry.open(tmp_path / "registry", create=True)
    registry.register(made_up.build(), [new])
    found = pick("5ms", registry=registry)
    check_file(found.engine, content=True)
    (found.engine.path.parent / "other.onnx").write_bytes(b"TINY")  # it does not read that one
    check_file(found.engine, content=True)
    (found.engine.path.parent / "weights.bin").write_bytes(b"WEIGHTS")
    with pytest.raises(DamagedRegistry, match=r"weights\.bin is not the file that was registered"):
        found.load()


def test_a_provider_that_is_not_there_is_no_reason_to_run_elsewhere() -> None:
    pytest.importorskip("klas_zoo.runtimes")
    registry = holding(planned(1, latencies=(made_up.latency(1.0, provider="AbacusExecutionProvider"),)))
    with pytest.raises(KlasZooError, match="has no AbacusExecutionProvider here"):
        pick("5ms", registry=registry).load()


def test_without_onnxruntime_the_message_names_what_to_install(
    doubling: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KlasZooError, match="pip install onnxruntime"):
        pick("5ms", registry=doubling).load()


def test_picking_imports_nothing_heavy(tmp_path: Path) -> None:
    made_up.holding(tmp_path, planned(1, "mine"))
    script = (
        "import sys; from klas_zoo.registry.picking import pick; found = pick('5ms', registry=sys.argv[1]);"
        "found.explain(); found.to_json(); print(found.engine.route);"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'timm', 'PIL', 'msgspec', 'rich',"
        " 'statistics', 'shutil', 'klas_zoo.cascades.definition', 'klas_zoo.runtimes.ort',"
        " 'klas_zoo.profiles.profile') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output == "mine\n[]\n"

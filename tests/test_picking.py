"""Picking, against a brute force that shares no code with it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
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
from klas_zoo.registry import Registry
from klas_zoo.registry.picking import pick
from klas_zoo.registry.records import EngineRecord
from klas_zoo.routes import Route


@pytest.fixture(scope="session")
def sized(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of 1 to 4 bytes."""
    folder = tmp_path_factory.mktemp("sized")
    files = {size: folder / str(size) for size in range(1, 5)}
    for size, file in files.items():
        file.write_bytes(b"x" * size)
    return files


def holding(*engines: EngineRecord) -> made_up.FixedRegistry:
    return made_up.FixedRegistry(root=Path("nowhere"), held=engines)


@pytest.fixture
def three(sized: dict[int, Path]) -> made_up.FixedRegistry:
    """tiny 1 ms 70 % 1 B, small 2 ms 80 % 2 B, base 4 ms 90 % 4 B."""
    return holding(
        made_up.engine(sized[1], "tiny", 70.0, 1.0),
        made_up.engine(sized[2], "small", 80.0, 2.0),
        made_up.engine(sized[4], "base", 90.0, 4.0),
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


def test_of_equally_accurate_engines_the_faster_is_picked(sized: dict[int, Path]) -> None:
    slow, fast = made_up.engine(sized[1], "slow", 80.0, 2.0), made_up.engine(sized[4], "fast", 80.0, 1.0)
    assert name(pick("5ms", registry=holding(slow, fast))) == "fast"
    assert name(pick("5ms", registry=holding(fast, slow))) == "fast"


def test_of_equally_accurate_and_fast_engines_the_smaller_is_picked(sized: dict[int, Path]) -> None:
    big, small = made_up.engine(sized[4], "big"), made_up.engine(sized[1], "small")
    assert name(pick("5ms", registry=holding(big, small))) == "small"
    assert name(pick("5ms", registry=holding(small, big))) == "small"


def test_ties_look_at_the_percentile_that_was_asked_for(sized: dict[int, Path]) -> None:
    steady = made_up.engine(sized[1], "steady", latencies=(made_up.latency(2.0, p99_ms=2.1),))
    nervous = made_up.engine(sized[1], "nervous", latencies=(made_up.latency(1.0, p99_ms=9.0),))
    assert name(pick("10ms", registry=holding(steady, nervous))) == "nervous"
    assert name(pick("10ms", percentile="p99", registry=holding(steady, nervous))) == "steady"


def test_the_latency_is_that_of_the_batch_size_asked_for(sized: dict[int, Path]) -> None:
    latencies = (made_up.latency(1.0), made_up.latency(6.0, batch=8, threads=2))
    found = pick("6ms", batch=8, registry=holding(made_up.engine(sized[1], latencies=latencies)))
    assert (found.latency_ms, found.latency.threads, found.percentile) == (6.0, 2, "p50")
    with pytest.raises(NothingFits):
        pick("5ms", batch=8, registry=holding(made_up.engine(sized[1], latencies=latencies)))


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
    sized: dict[int, Path],
    specifications: list[tuple[int, int, int, int]],
    budget: int,
    percentile: str,
    min_accuracy: int | None,
    max_size: int | None,
) -> None:
    engines, table = [], []
    for number, (tens, p50, extra, size) in enumerate(specifications):
        measured = made_up.latency(float(p50), p90_ms=float(p50 + extra))
        engines.append(made_up.engine(sized[size], f"e{number}", 10.0 * tens, (measured,)))
        table.append((10.0 * tens, p50 if percentile == "p50" else p50 + extra, size))
    cheap_enough = [
        (accuracy, ms, size)
        for accuracy, ms, size in table
        if (max_size is None or size <= max_size) and (min_accuracy is None or accuracy >= min_accuracy)
    ]
    fitting = [row for row in cheap_enough if row[1] <= budget]
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
    slower = [row for row in cheap_enough if row[1] > budget and row[0] > best[0]]
    assert bool(slower) == (found.runner_up_slower is not None)
    if found.runner_up_slower:
        assert found.runner_up_slower.latency_ms == min(row[1] for row in slower)
        assert found.runner_up_slower.top1_difference > 0


# what is said about it


def test_the_neighbours_say_what_they_would_save_and_cost(three: Registry) -> None:
    found = pick("3ms", registry=three)
    faster, slower = found.runner_up_faster, found.runner_up_slower
    assert (name(faster), name(found), name(slower)) == ("tiny", "small", "base")
    assert faster and (faster.latency_difference_ms, faster.top1_difference) == (-1.0, -10.0)
    assert slower and (slower.latency_difference_ms, slower.top1_difference) == (2.0, 10.0)


def test_of_several_better_engines_over_the_budget_the_fastest_is_the_neighbour(
    sized: dict[int, Path],
) -> None:
    registry = holding(
        made_up.engine(sized[1], "mine", 70.0, 1.0),
        made_up.engine(sized[1], "next", 80.0, 2.0),
        made_up.engine(sized[1], "next-better", 81.0, 2.0),
        made_up.engine(sized[1], "best", 90.0, 9.0),
        made_up.engine(sized[4], "too-big", 90.0, 1.5),
    )
    assert name(pick("1ms", max_size=3, registry=registry).runner_up_slower) == "next-better"


def test_an_explanation_is_lines_for_people(three: Registry) -> None:
    assert pick("3ms", registry=three).explain() == [
        "small of deit-micro on cpu (onnxruntime, fp32)",
        "latency  2.00 ms of 3.00 ms (p50, batch 1, 1 thread, an abacus), measured",
        "top-1    80.00 % on 50 images of 50 images of clouds",
        "size     2 B, 1 M MACs",
        "fitting  2 of 3 engines",
        "faster   tiny: 1.00 ms (1.00 ms less), top-1 70.00 % (-10.00 points)",
        "slower   base: 4.00 ms (2.00 ms more), top-1 90.00 % (+10.00 points)",
    ]


def test_a_pick_of_random_weights_says_so_aloud(sized: dict[int, Path]) -> None:
    found = pick("3ms", registry=holding(made_up.engine(sized[1], weights="random")))
    assert found.random_weights
    assert found.to_json()["random_weights"] is True
    assert found.summary()[-1] == "warning  its weights are random: the accuracy means nothing"
    trained = pick("3ms", registry=holding(made_up.engine(sized[1])))
    assert not trained.random_weights
    assert not any("random" in line for line in trained.explain())


def test_a_pick_is_json_with_all_its_numbers(three: Registry, sized: dict[int, Path]) -> None:
    stitch = made_up.engine(sized[1], "x", 85.0, 2.5, route=Route.stitch("tiny", 3, "base", 5, 8))
    found = pick("3ms", max_size="1kB", registry=holding(*three.engines(), stitch))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["schema_version"] == 1
    assert told["engine"]["route"] == "tiny.1-3+base.6-8"
    assert told["engine"]["segments"] == [["tiny", 1, 3], ["base", 6, 8]]
    assert told["engine"]["path"] == str(sized[1])
    assert told["engine"]["verification"]["images"] == 50
    assert told["latency"]["p50_ms"] == told["latency_ms"] == 2.5
    assert told["limits"] == {
        "budget_ms": 3.0,
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
    sized: dict[int, Path],
) -> None:
    much_of_one = made_up.engine(sized[1], "much-of-one", 80.0, 1.5)  # half too slow
    some_of_two = made_up.engine(sized[1], "some-of-two", 48.0, 1.4)  # 0.4 too slow and 0.4 too bad
    with pytest.raises(NothingFits, match=r"the nearest is much-of-one, 1\.50 ms, 0\.500 ms over"):
        pick("1ms", min_accuracy=80, registry=holding(much_of_one, some_of_two))


def test_every_limit_that_the_nearest_engine_misses_is_named(sized: dict[int, Path]) -> None:
    with pytest.raises(
        NothingFits, match=r"tiny, 1\.00 ms, 0\.500 ms over; top-1 70\.00 %, 5 .*; 4 B, 1 B over\.$"
    ):
        pick(0.5, min_accuracy=75, max_size=3, registry=holding(made_up.engine(sized[4])))


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


def test_a_batch_size_that_was_not_measured_is_answered_with_those_that_were(sized: dict[int, Path]) -> None:
    latencies = (made_up.latency(1.0), made_up.latency(6.0, batch=8))
    with pytest.raises(UsageError, match=r"measured at batch size 2, only at 1, 8\."):
        pick("5ms", batch=2, registry=holding(made_up.engine(sized[1], latencies=latencies)))
    with pytest.raises(UsageError, match="nor at any other"):
        pick("5ms", registry=holding(made_up.engine(sized[1], latencies=())))


def test_an_engine_without_that_batch_size_is_no_candidate(sized: dict[int, Path]) -> None:
    other = made_up.engine(sized[1], "other", 99.0, (made_up.latency(1.0, batch=8),))
    found = pick("5ms", registry=holding(made_up.engine(sized[1], "tiny"), other))
    assert (name(found), found.candidates) == ("tiny", 1)


def test_of_several_devices_one_has_to_be_named(sized: dict[int, Path]) -> None:
    registry = holding(made_up.engine(sized[1], "a"), made_up.engine(sized[1], "b", device="gpu"))
    with pytest.raises(UsageError, match="several devices are registered, cpu, gpu: say --device"):
        pick("5ms", registry=registry)
    assert name(pick("5ms", device="gpu", registry=registry)) == "b"


def test_a_device_of_another_family_does_not_have_to_be_named(sized: dict[int, Path]) -> None:
    registry = holding(
        made_up.engine(sized[1], "a", family="f"), made_up.engine(sized[1], "b", family="g", device="gpu")
    )
    assert name(pick("5ms", family="g", registry=registry)) == "b"
    with pytest.raises(UsageError, match="g has no engines for cpu, only for gpu"):
        pick("5ms", family="g", device="cpu", registry=registry)


def test_families_compare_only_on_the_same_images(sized: dict[int, Path]) -> None:
    mine = made_up.engine(sized[1], "a", 70.0, family="f")
    same = made_up.engine(sized[1], "b", 80.0, family="g")
    other = made_up.engine(sized[1], "c", 90.0, family="h", data_fingerprint="other")
    assert name(pick("5ms", registry=holding(mine, same))) == "b"
    with pytest.raises(
        UsageError, match=r"The engines of f, h were evaluated on different images.*say --family"
    ):
        pick("5ms", registry=holding(mine, other))
    assert name(pick("5ms", family="f", registry=holding(mine, other))) == "a"


def test_an_empty_registry_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"No registry at .*: run klas-zoo build first"):
        pick("5ms", registry=tmp_path / "none")
    Registry.open(tmp_path / "empty", create=True)
    with pytest.raises(RegistryError, match="holds no engines: run klas-zoo build first"):
        pick("5ms", registry=tmp_path / "empty")


def test_the_default_registry_is_the_one_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLAS_ZOO_REGISTRY", str(tmp_path))
    Registry.open(create=True).register(made_up.build(), [made_up.new_engine(tmp_path / "a", "mine")])
    assert name(pick("5ms")) == "mine"


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_pick_whose_file_is_gone_names_the_file(tmp_path: Path, damage: str) -> None:
    registry = Registry.open(tmp_path, create=True)
    registry.register(made_up.build(), [made_up.new_engine(tmp_path / "a")])
    path = registry.engines()[0].path
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"x")
    with pytest.raises(DamagedRegistry) as raised:
        pick("5ms", registry=registry)
    assert str(path) in str(raised.value)
    assert "Run klas-zoo build again" in str(raised.value)


# loading


@pytest.fixture
def doubling(tmp_path: Path) -> Registry:
    """A registry whose one engine is a real one: it doubles eight numbers, on two threads."""
    onnx = pytest.importorskip("onnx")
    numpy = pytest.importorskip("numpy")
    helper = onnx.helper
    matrix = onnx.numpy_helper.from_array(2 * numpy.eye(8, dtype=numpy.float32), "matrix")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "matrix"], ["y"])],
        "doubling",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 8])],
        [matrix],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "doubling")
    registry = Registry.open(tmp_path, create=True)
    new = made_up.new_engine(tmp_path / "doubling", latencies=(made_up.latency(1.0, threads=2),))
    registry.register(made_up.build(), [new])
    return registry


def test_a_picked_engine_loads_and_runs_as_it_was_measured(doubling: Registry) -> None:
    pytest.importorskip("onnxruntime")
    numpy = pytest.importorskip("numpy")
    found = pick("5ms", registry=doubling)
    session = found.load()
    x = numpy.arange(16, dtype=numpy.float32).reshape(2, 8)
    (y,) = session.run(None, {"x": x})
    assert (y == 2 * x).all()
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 2
    assert found.load() is not session


def test_session_options_can_be_set_and_unknown_ones_are_refused(doubling: Registry) -> None:
    pytest.importorskip("onnxruntime")
    found = pick("5ms", registry=doubling)
    options = found.load(intra_op_num_threads=1, log_severity_level=3).get_session_options()
    assert (options.intra_op_num_threads, options.log_severity_level) == (1, 3)
    for wrong in (
        {"intra_op_threads": 1},
        {"intra_op_num_threads": "many"},
        {"add_free_dimension_override": 1},
    ):
        with pytest.raises(UsageError, match=f"takes no {next(iter(wrong))}="):
            found.load(**wrong)


def test_an_engine_that_was_tampered_with_is_not_loaded(doubling: Registry) -> None:
    found = pick("5ms", registry=doubling)
    content = found.engine.path.read_bytes()
    found.engine.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedRegistry, match="is not the file that was registered"):
        found.load()


def test_a_provider_that_is_not_there_is_no_reason_to_run_elsewhere(sized: dict[int, Path]) -> None:
    pytest.importorskip("onnxruntime")
    measured = made_up.latency(1.0, provider="AbacusExecutionProvider")
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of one x
    registry = holding(made_up.engine(sized[1], latencies=(measured,), sha256=sha256))
    with pytest.raises(KlasZooError, match="with AbacusExecutionProvider, which onnxruntime cannot use here"):
        pick("5ms", registry=registry).load()


def test_without_onnxruntime_the_message_names_what_to_install(
    doubling: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KlasZooError, match="pip install onnxruntime"):
        pick("5ms", registry=doubling).load()


def test_picking_imports_nothing_heavy(tmp_path: Path) -> None:
    Registry.open(tmp_path, create=True).register(
        made_up.build(), [made_up.new_engine(tmp_path / "a", "mine")]
    )
    script = (
        "import sys; from klas_zoo.registry.picking import pick; found = pick('5ms', registry=sys.argv[1]);"
        "found.explain(); found.to_json(); print(found.engine.route);"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy', 'timm', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output == "mine\n[]\n"

"""Cascades in the registry: kept with their shares and paths, picked by their true mixture, loaded as engines."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import packages
import pytest
from click.testing import CliRunner
from PIL import Image

from klas_zoo import pick
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.fitting import exits_of, outcome_of
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.records import CascadeFacts, Outcome
from klas_zoo.catalogue.evaluating import evaluate
from klas_zoo.catalogue.installing import install
from klas_zoo.cli import main
from klas_zoo.errors import BadQuantity, DamagedPackage, DamagedRegistry, NothingFits, UsageError, VerificationError
from klas_zoo.exporters.cascade_fitting import verify_cascade
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import (
    CASCADES,
    PackagedCascade,
    PackagedCascades,
    cascades_text,
    parse_cascades,
    read_cascades,
)
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.records import CascadeLatency
from klas_zoo.profiles.timing import Method
from klas_zoo.registry import Registry
from klas_zoo.registry.cascades import new_cascade
from klas_zoo.registry.checking import check
from klas_zoo.registry.overview import overview
from klas_zoo.registry.records import NewEngine, percentile_ms
from klas_zoo.routes import Route

SMALL, BASE = Route.anchor("small", 4), Route.anchor("base", 4)
PAIR = Cascade.parse("small ?p(T=1.5)<0.8 | base", {"small": SMALL, "base": BASE}.__getitem__)


def _outcome(escalated: float, top1: float, images: int = 1000) -> Outcome:
    exits = (np.arange(images) < escalated * images).astype(int)
    return outcome_of(exits, round(top1 * images / 100), 2)


def _mixed(short_ms: float, long_ms: float, escalated: float, **changes: Any) -> CascadeLatency:
    """Of paths that always take equally long."""
    found = MixedLatency.of([np.full(100, short_ms), np.full(100, long_ms)], [1 - escalated, escalated])
    facts = vars(made_up.latency(1.0)) | vars(found) | {"min_ms": short_ms}
    return CascadeLatency(**facts | changes)


def _cascade(escalated: float = 0.2) -> NewEngine:
    """1 ms where small answers, 6 ms where base does, 80 % top-1."""
    seen = _outcome(escalated, 80.0)
    facts = CascadeFacts(heldout=seen, test=seen)
    return made_up.planned(100, "cascades", 80.0, (_mixed(1.0, 6.0, escalated),), route=PAIR, cascade=facts)


def _registry(root: Path, *cascades: NewEngine) -> Registry:
    """small: 1 ms and 70 %, base: 5 ms and 82 %; p99 is half as much again."""
    small, base = made_up.planned(4, "small", 70.0, 1.0), made_up.planned(4, "base", 82.0, 5.0)
    return made_up.holding(root, small, base, *cascades)


def test_a_cascade_is_read_as_it_was_registered(tmp_path: Path) -> None:
    given = _cascade()
    found = next(one for one in _registry(tmp_path / "registry", given).engines() if one.cascade is not None)
    for name in ("route", "cascade", "top1", "images", "latencies", "macs", "verification", "data_fingerprint"):
        assert getattr(found, name) == getattr(given, name)
    assert found.route.stages[0].temperature == 1.5  # type: ignore[union-attr]
    assert json.loads(json.dumps(found.to_json()))["route"] == str(PAIR)
    assert check(Registry(tmp_path / "registry")) == []


@pytest.mark.parametrize(
    ("limits", "picked"),
    [
        ({"mean": 2.5}, "cascade"),
        ({"mean": "2.5ms", "worst": "7ms"}, "cascade"),
        ({"mean": 2.5, "worst": 5.9}, "small"),
        ({"worst": 7.6}, "base"),
        ({"latency": 2.5}, "cascade"),
        ({"latency": 2.5, "percentile": "p90"}, "small"),
        ({"latency": 1.5, "percentile": "p99"}, "small"),
        ({"latency": 6.5, "percentile": "p99"}, "cascade"),
        ({"latency": 8.0, "percentile": "p99", "mean": 2.5}, "cascade"),
        ({"latency": 8.0, "percentile": "p99", "mean": 1.5}, "small"),
    ],
)
def test_a_cascade_is_picked_by_its_mixture(tmp_path: Path, limits: dict[str, Any], picked: str) -> None:
    registry = _registry(tmp_path / "registry", _cascade())
    found = pick(registry=registry, **limits)
    assert ("cascade" if found.engine.cascade else str(found.engine.route)) == picked
    first = next(iter(limits))
    wanted = limits.get("percentile", "p50") if first == "latency" else first
    assert found.latency_ms == percentile_ms(found.latency, wanted)


@pytest.mark.parametrize(("share", "picked"), [(0.009, True), (0.02, False)])
def test_the_99th_percentile_is_the_long_path_where_more_than_one_in_a_hundred_escalates(
    tmp_path: Path, share: float, picked: bool
) -> None:
    registry = _registry(tmp_path / "registry", _cascade(escalated=share))
    assert (pick(2.0, percentile="p99", registry=registry).engine.cascade is not None) == picked


def test_limits_that_nothing_keeps_name_the_nearest_and_each_miss(tmp_path: Path) -> None:
    registry = _registry(tmp_path / "registry", _cascade())
    with pytest.raises(NothingFits) as refused:
        pick(mean=0.9, worst=1.4, registry=registry)
    assert str(refused.value) == (
        "No engine of deit-micro on cpu is within 0.900 ms (mean, batch 1), within 1.40 ms (worst): the nearest is "
        "small, 1.00 ms, 0.100 ms over; worst 1.50 ms, 0.100 ms over."
    )


@pytest.mark.parametrize(
    ("limits", "kind", "sentence"),
    [
        ({}, UsageError, "Pass a limit: latency, mean or worst."),
        ({"mean": 0}, BadQuantity, "A latency of 0 ms is no budget"),
        ({"worst": "fast"}, BadQuantity, "fast"),
        ({"mean": math.inf}, BadQuantity, "A latency of inf ms is no budget"),
    ],
)
def test_limits_that_are_none_are_refused(
    tmp_path: Path, limits: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        pick(registry=_registry(tmp_path / "registry"), **limits)


def test_explain_says_how_often_it_escalates_and_what_it_would_cost_if_every_image_did(tmp_path: Path) -> None:
    _registry(tmp_path / "registry", _cascade())
    shown = CliRunner().invoke(
        main, ["pick", "--mean", "3ms", "--worst", "8ms", "--explain", "--registry", str(tmp_path / "registry")]
    )
    assert shown.exit_code == 0, shown.output
    assert "small ?p(T=1.5)<0.8 | base of deit-micro on cpu" in shown.output
    assert "2.00 ms of 3.00 ms (mean, batch 1" in shown.output
    escalates = (
        "escalates 20.0 % (17.6 to 22.6) of the images: 2.00 ms each in the mean, 1.00 ms where the first stage answers"
    )
    assert shown.output.count(escalates) == 1
    # a median is that of the short path where few images escalate, so that it is said without --explain too
    plain = CliRunner().invoke(main, ["pick", "--mean", "3ms", "--registry", str(tmp_path / "registry")])
    assert plain.output.count(escalates) == 1 and "if all did" not in plain.output
    assert "if all did 6.00 ms each in the median, 6.00 ms in the 99th percentile" in shown.output
    none = CliRunner().invoke(main, ["pick", "--registry", str(tmp_path / "registry")])
    assert (none.exit_code, none.output) == (2, "Error: Pass a limit: latency, mean or worst.\n")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data_fingerprint": "others"}, "evaluated on other images"),
        ({"latencies": (_mixed(1.0, 6.0, 0.2, threads=2),)}, "measured with another number of threads"),
        ({"latencies": (_mixed(1.0, 6.0, 0.2, hardware="an abacus"),)}, "measured on other hardware"),
        ({"latencies": (_mixed(1.0, 6.0, 0.2, runtime_version="0.1"),)}, "another version of their runtime"),
    ],
)
def test_a_cascade_under_other_conditions_or_on_other_images_is_left_out_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    registry = _registry(tmp_path / "registry", replace(_cascade(), **changes))
    found = pick(mean=2.5, registry=registry)
    assert found.engine.cascade is None
    assert any(reason in clause for clause in found.left_out)


def test_a_cascade_has_no_latency_of_a_batch(tmp_path: Path) -> None:
    registry = _registry(tmp_path / "registry", _cascade())
    with pytest.raises(UsageError, match="No engine was measured at batch size 8, only at 1"):
        pick(9.0, batch=8, registry=registry)


def test_cascades_are_among_the_points_of_the_frontier(tmp_path: Path) -> None:
    points = {one.route: one for one in overview(_registry(tmp_path / "registry", _cascade())).points}
    assert not points[str(PAIR)].plain
    assert points[str(PAIR)].on_frontier


@pytest.mark.parametrize("change", [{"cascade": None}, {"route": BASE}])
def test_a_cascade_without_shares_or_shares_without_a_cascade_are_no_engine(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is a cascade where the shares"):
        replace(_cascade(), **change)


@pytest.mark.parametrize("damage", ["'{\"heldout\": 1}'", "'no JSON'", "NULL"])
def test_a_damaged_row_of_a_cascade_is_one_sentence(tmp_path: Path, damage: str) -> None:
    registry = _registry(tmp_path / "registry", _cascade())
    with registry.changing() as connection:
        connection.execute(f"UPDATE engines SET cascade = {damage} WHERE cascade IS NOT NULL")
    with pytest.raises(DamagedRegistry, match="cannot be understood"):
        registry.engines()


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, PackagedCascade]:
    package = packages.write_package(tmp_path_factory.mktemp("carried") / "package")
    return packages.carry_cascade(package, fingerprint="abc")


def test_a_package_carries_its_cascades(carried: tuple[Package, PackagedCascade]) -> None:
    package, one = carried
    found = read_cascades(package)
    assert found.cascades == (one,)
    assert set(found.engines) == {"slim", "slim.1-2+wide.2-3", "wide"}
    assert found.data == {"description": "noise", "fingerprint": "abc"}
    assert parse_cascades(cascades_text(found), "a file") == found
    assert one.verification.passed
    assert 0 < one.latencies[0].paths_ms[0] < one.latencies[0].worst_ms


def test_a_package_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_cascades(packages.write_package(tmp_path / "package")) == PackagedCascades()


def _edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda table: change(table["cascades"][0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_edited(lambda one: one["cascade"]["stages"][0].update(threshold=1.5)), "a confidence from 0 to 1, not 1.5"),
        (_edited(lambda one: one["cascade"]["stages"].pop()), "a cascade has at least two stages"),
        (_edited(lambda one: one["heldout"].update(shares=[0.5, 0.5, 0.5])), "sum up to 1"),
        (_edited(lambda one: one["latencies"][0].update(worst_ms=-1.0)), "finite and above zero"),
        (_edited(lambda one: one["verification"].update(max_abs_difference=9.0)), "did not pass its verification"),
        (
            _edited(lambda one: one["cascade"]["stages"][1].update(route=[["vide", 1, 3]], shared=0)),
            "of the route vide, which the package does not have",
        ),
        (lambda table: table.update(schema_version=2), "schema"),
        (lambda table: table.pop("data"), "data"),
    ],
)  # fmt: skip
def test_a_file_of_cascades_that_cannot_be_is_refused_in_one_sentence(
    carried: tuple[Package, PackagedCascade], tmp_path: Path, change: Callable[[dict[str, Any]], object], sentence: str
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(carried[0].folder, folder)
    table = json.loads((folder / CASCADES).read_text())
    change(table)
    (folder / CASCADES).write_text(json.dumps(table))
    packages.rehash(folder, CASCADES)
    with pytest.raises(DamagedPackage, match=sentence):
        read_cascades(Package.open(folder))


def test_a_cascade_that_takes_other_exits_than_torch_is_refused(
    carried: tuple[Package, PackagedCascade], tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    shutil.copytree(carried[0].folder, folder)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "references.safetensors")
    tensors["logits/slim"] = tensors["logits/slim"][::-1].copy()
    save_file(tensors, folder / "references.safetensors")
    packages.rehash(folder, "references.safetensors")
    with pytest.raises(VerificationError, match="takes another exit than torch on image"):
        verify_cascade(Package.open(folder), carried[1].cascade, provider="CPUExecutionProvider", threads=1)


def test_a_registered_cascade_is_loaded_and_answers_as_its_stages(
    carried: tuple[Package, PackagedCascade], tmp_path: Path
) -> None:
    package, one = carried
    facts = {"device": "cpu", "dataset": "noise", "data_fingerprint": "abc"}
    registry = Registry.open(tmp_path / "registry", create=True)
    build = made_up.build(family="made-up", dataset="noise", data_fingerprint="abc", hardware=describe_cpu())
    registry.register(build, [new_cascade(one, package.manifest, package.folder, **facts)])
    found = pick(mean=1e4, threads=1, registry=registry)
    stored = package.references()
    with found.load() as engine:
        assert (engine.threads, engine.runtime, engine.provider) == (1, "onnxruntime", "CPUExecutionProvider")
        logits = engine.run(stored.images)
        assert len(engine.predict(np.zeros((16, 16, 3), np.uint8), top=2)) == 2
        counted = engine.session.counters()
    exits = exits_of(one.cascade, {route: stored.logits[str(route)] for route in one.cascade.routes})
    expected = np.stack([stored.logits[str(route)] for route in one.cascade.routes])[exits, np.arange(len(exits))]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert sum(counted.images) == len(exits) + 1
    assert counted.expected == one.facts.heldout.escalated_intervals
    (found.engine.path.parent / "wide.onnx").write_bytes(b"another")
    with pytest.raises(DamagedRegistry):
        found.load()


def _quickly() -> dict[str, Any]:
    return {"threads": 1, "method": Method(warmup_ms=0, min_runs=5, min_ms=0, rounds=1)}


def test_install_brings_the_cascades_of_a_package_along(
    carried: tuple[Package, PackagedCascade], tmp_path: Path
) -> None:
    package, one = carried
    root = tmp_path / "registry"
    done = install(package.folder, registry=root, **_quickly())
    assert f"{one.name} (onnxruntime, fp32)" in done.engines
    engines = Registry(root).engines()
    (found,) = (engine for engine in engines if engine.cascade is not None)
    assert found.cascade == one.facts
    assert found.data_fingerprint == "abc" and found.package == done.digest
    plain = next(engine for engine in engines if engine.cascade is None)
    assert found.latencies[0].conditions == plain.latencies[0].conditions
    assert install(package.folder, registry=root, **_quickly()).already


def test_install_measures_top1_of_cascades_on_the_images_that_were_given(
    carried: tuple[Package, PackagedCascade], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    for number in range(20):
        place = tmp_path / "images" / f"class{number % packages.CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(place / f"{number}.png")
    install(carried[0].folder, registry=tmp_path / "registry", data=tmp_path / "images", **_quickly())
    engines = Registry(tmp_path / "registry").engines()
    (found,) = (engine for engine in engines if engine.cascade is not None)
    assert {engine.data_fingerprint for engine in engines} == {found.data_fingerprint}
    assert found.images == 20 and found.cascade is not None and found.cascade.test.images == 20
    assert found.cascade.heldout == carried[1].facts.heldout
    (again,) = evaluate(str(found.route), data=tmp_path / "images", registry=tmp_path / "registry", threads=1)
    assert (again.top1, again.images) == (found.top1, 20)


def test_cascades_of_another_package_are_refused_and_nothing_is_installed(
    carried: tuple[Package, PackagedCascade], tmp_path: Path
) -> None:
    folder = tmp_path / "package"
    other = packages.write_package(folder, load=lambda routes: packages.supernet(seed=3))
    shutil.copyfile(carried[0].folder / CASCADES, folder / CASCADES)
    packages.edit(folder, lambda manifest: manifest["files"].update({CASCADES: {"size_bytes": 0, "sha256": ""}}))
    packages.rehash(folder, CASCADES)
    assert str(carried[1].cascade.routes[0]) in {one.name for one in other.routes}
    with pytest.raises(DamagedPackage, match="belongs to another package: its cascades were fitted on another slim"):
        install(folder, registry=tmp_path / "registry", **_quickly())
    assert not (tmp_path / "registry").exists()

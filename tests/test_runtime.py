"""One process holds the family: it answers as torch does, on the route that was asked for or that fits."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
import torch

from klas_zoo.errors import DamagedPackage, NothingFits, PackageError, UnknownName, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.runtime import ElasticSession
from klas_zoo.runtime import session as session_module
from klas_zoo.runtime.controller import Controller

HERE = resolve_device("cpu").hardware
NAMES = list(map(str, packages.ROUTES))
IMAGES = np.random.default_rng(0).standard_normal((2, *packages.SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that was timed on this very machine: 1, 2 and 3 ms."""
    folder = tmp_path_factory.mktemp("runtime") / "package"
    routes = tuple(
        replace(one, latencies=(packages.latency(1.0 + index, hardware=HERE),))
        for index, one in enumerate(packages.source().routes)
    )
    packages.write_package(folder, routes=routes)
    return folder


@pytest.fixture
def session(folder: Path) -> ElasticSession:
    return ElasticSession(folder, threads=1)


@pytest.mark.parametrize("packed", ["none", "all", [NAMES[1]]], ids=str)
def test_every_route_answers_as_torch_whether_its_weights_are_packed_or_shared(folder: Path, packed: str) -> None:
    session = ElasticSession(folder, threads=1, packed=packed)
    network = packages.supernet()
    for route in packages.ROUTES:
        with torch.no_grad():
            expected = network(torch.from_numpy(IMAGES), route).numpy()
        np.testing.assert_allclose(session.run(IMAGES, route=str(route)), expected, atol=1e-4)


def test_a_budget_gets_the_most_accurate_route_within_it(session: ElasticSession) -> None:
    one = IMAGES[:1]
    for budget, name in ((1.0, NAMES[0]), (2.9, NAMES[1]), (1e9, NAMES[2])):
        assert session.best(budget) == name
        np.testing.assert_array_equal(session.run(one, latency_ms=budget), session.run(one, route=name))
    assert session.best(1.6, percentile="p99") == NAMES[0]


def test_time_that_was_spent_waiting_is_taken_off_the_budget(session: ElasticSession) -> None:
    session.run(IMAGES[:1], latency_ms=3.5, waited_ms=2.0)
    assert session.counters().calls == {NAMES[0]: 1, NAMES[1]: 0, NAMES[2]: 0}


def test_a_budget_that_nothing_keeps_names_the_nearest(session: ElasticSession) -> None:
    with pytest.raises(NothingFits, match=r"within 0\.500 ms: the nearest, slim, takes 1\.00 ms"):
        session.run(IMAGES[:1], latency_ms=0.5)


def test_latencies_of_other_machines_threads_and_batches_are_not_believed(folder: Path, tmp_path: Path) -> None:
    assert ElasticSession(folder, threads=1).latencies() == dict(zip(NAMES, (1.0, 2.0, 3.0), strict=True))
    for session, batch in ((ElasticSession(folder, threads=2), 1), (ElasticSession(folder, threads=1), 2)):
        with pytest.raises(UsageError, match=rf"call calibrate\(batch={batch}\) first"):
            session.run(IMAGES[:batch], latency_ms=5)
    elsewhere = tmp_path / "package"
    packages.write_package(elsewhere)
    with pytest.raises(UsageError, match="on this machine with threads=1 is known"):
        ElasticSession(elsewhere, threads=1).latencies()


def timed_under(folder: Path, **conditions: str) -> Package:
    """The package as if its latencies had been measured under other conditions."""
    package = Package.open(folder)
    routes = tuple(
        replace(one, latencies=tuple(replace(latency, **conditions) for latency in one.latencies))
        for one in package.manifest.routes
    )
    return replace(package, manifest=replace(package.manifest, routes=routes))


def test_latencies_under_other_options_or_by_another_clock_are_not_believed(folder: Path) -> None:
    never = '{"session.intra_op.allow_spinning":"0"}'
    for conditions in ({"clock": "device"}, {"options": never}, {"hardware": "an abacus"}):
        with pytest.raises(UsageError, match="on this machine with threads=1 is known"):
            ElasticSession(timed_under(folder, **conditions), threads=1).latencies()
    with pytest.raises(UsageError, match="on this machine with threads=1 is known"):
        ElasticSession(folder, threads=1, spinning=False).latencies()
    assert ElasticSession(timed_under(folder, options=never), threads=1, spinning=False).latencies()[NAMES[0]] == 1.0


def test_spinning_reaches_every_session(folder: Path) -> None:
    settings = ((False, "session.intra_op.allow_spinning", "0"), (None, "session.force_spinning_stop", "1"))
    for spinning, key, value in settings:
        session = ElasticSession(folder, threads=2, spinning=spinning)
        for one in session._sessions.values():
            assert one.raw.get_session_options().get_session_config_entry(key) == value


def test_calibrating_measures_every_route_here(folder: Path) -> None:
    session = ElasticSession(folder, threads=1)
    found = session.calibrate(batch=2, runs=3)
    assert list(found) == NAMES and all(value > 0 for value in found.values())
    assert session.latencies(batch=1)[NAMES[0]] == 1.0
    session.run(IMAGES, latency_ms=1e9)
    assert session.counters().calls[NAMES[2]] == 1


def test_counters_tell_calls_switches_and_budgets_that_were_missed(session: ElasticSession) -> None:
    for name in (NAMES[0], NAMES[0], NAMES[2], NAMES[1]):
        session.run(IMAGES, route=name)
    session.run(IMAGES[:1], latency_ms=1.0, waited_ms=0.0)
    session._choices._latencies[NAMES[0]][1]["p50"] = 1e-9
    session.run(IMAGES[:1], latency_ms=1e-6)
    found = session.counters()
    assert found.calls == {NAMES[0]: 4, NAMES[1]: 1, NAMES[2]: 1}
    assert (found.switches, found.images) == (3, 10)
    assert found.over_budget >= 1


def test_a_controller_is_followed_and_told(session: ElasticSession) -> None:
    controller = session.controller(target_ms=1e6)
    assert [name for name, _ in controller.ladder] == NAMES
    assert controller.route == NAMES[2]
    session.run(IMAGES[:1], controller=controller)
    assert controller.counters().calls_of[NAMES[2]] == 1


def test_threads_share_a_session_and_none_of_their_calls_is_lost(session: ElasticSession) -> None:
    expected = {name: session.run(IMAGES, route=name) for name in NAMES}
    wrong: list[str] = []

    def work(start: int) -> None:
        for step in range(20):
            name = NAMES[(start + step) % 3]
            if not np.array_equal(session.run(IMAGES, route=name), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(session.counters().calls.values()) == 3 + 80


@pytest.mark.parametrize(
    "arguments",
    [{}, {"route": "slim", "latency_ms": 5.0}, {"latency_ms": 5.0, "controller": Controller([("a", 1.0)], 1.0)}],
)
def test_exactly_one_way_of_choosing_is_taken(session: ElasticSession, arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Pass one of"):
        session.run(IMAGES, **arguments)  # type: ignore[arg-type]


def test_unknown_routes_and_images_of_another_shape_are_refused(session: ElasticSession, folder: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean wide"):
        session.run(IMAGES, route="widee")
    with pytest.raises(UsageError, match=r"Images are \(B, 3, 16, 16\)"):
        session.run(IMAGES[:, :, :8], route="slim")
    with pytest.raises(UsageError, match="B from 1 on"):
        session.run(IMAGES[:0], route="slim")
    with pytest.raises(UnknownName, match="did you mean slim"):
        ElasticSession(folder, threads=1, routes=["slimm"])
    with pytest.raises(UnknownName):
        ElasticSession(folder, threads=1, routes=["slim"], packed=["wide"])


def test_only_named_routes_are_opened(folder: Path) -> None:
    session = ElasticSession(folder, threads=1, routes=["wide"])
    assert [one.name for one in session.routes] == ["wide"]
    with pytest.raises(UnknownName):
        session.run(IMAGES, route="slim")


def test_what_was_built_and_not_run_is_opened_only_by_name(tmp_path: Path) -> None:
    package = packages.write_package(tmp_path / "bf16", precision="bf16")
    assert {one.status for one in package.routes} == {"built, not run"}
    with pytest.raises(PackageError, match="none is opened unless it is named"):
        ElasticSession(package)


def test_a_package_without_graphs_is_refused(folder: Path) -> None:
    package = Package.open(folder)
    torch_package = Package(package.folder, replace(package.manifest, format="torch"))
    with pytest.raises(PackageError, match="export with --format onnx"):
        ElasticSession(torch_package)
    assert json.loads((folder / "manifest.json").read_text())["format"] == "onnx"


# what is hashed is what is used


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def other_weights(folder: Path) -> bytes:
    content = bytearray((folder / "weights.bin").read_bytes())
    content[3::4] = bytes(byte ^ 1 for byte in content[3::4])  # another exponent in every number
    return bytes(content)


def replaced(path: Path, content: bytes) -> None:
    """As careful programs replace a file: by a rename."""
    (path.parent / "new").write_bytes(content)
    (path.parent / "new").rename(path)


@pytest.mark.parametrize("name", ["weights.bin", "slim.onnx", "references.safetensors", "manifest.json"])
def test_a_package_that_was_opened_before_is_checked_again(name: str, mine: Path) -> None:
    package = Package.open(mine)
    content = bytearray((mine / name).read_bytes())
    content[len(content) // 2] ^= 1
    replaced(mine / name, content)
    with pytest.raises(DamagedPackage):
        ElasticSession(package, threads=1)


def test_a_package_that_was_replaced_by_another_whole_one_is_refused(mine: Path) -> None:
    package = Package.open(mine)
    packages.edit(mine, lambda manifest: manifest["provenance"].update(build_id=8))
    with pytest.raises(DamagedPackage, match="was replaced after it was opened: open it again"):
        ElasticSession(package, threads=1)


@pytest.mark.parametrize("name", ["weights.bin", "slim.onnx"])
def test_a_file_that_is_swapped_between_its_hash_and_its_use_is_never_used(
    name: str, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ElasticSession(mine, threads=1).run(IMAGES, route="slim")
    opened = session_module.open_engine

    def swapping(*arguments: Any, **options: Any) -> Any:
        replaced(mine / name, other_weights(mine) if name == "weights.bin" else b"no graph")
        return opened(*arguments, **options)

    monkeypatch.setattr(session_module, "open_engine", swapping)
    if name == "weights.bin":
        with pytest.raises(DamagedPackage, match=r"weights\.bin was changed while it was open"):
            ElasticSession(mine, threads=1, routes=["slim"])
    else:  # its content had been read
        session = ElasticSession(mine, threads=1, routes=["slim"])
        assert np.array_equal(session.run(IMAGES, route="slim"), wanted)


def test_weights_that_are_overwritten_in_place_give_an_error_and_no_other_answer(mine: Path) -> None:
    session = ElasticSession(mine, threads=1)
    wanted = session.run(IMAGES, route="slim")
    content, changed = (mine / "weights.bin").read_bytes(), other_weights(mine)
    with (mine / "weights.bin").open("r+b") as file:
        file.write(changed)
    for _ in range(2):
        with pytest.raises(DamagedPackage, match=r"weights\.bin was changed while it was open: answers computed from"):
            session.run(IMAGES, route="slim")
    with (mine / "weights.bin").open("r+b") as file:
        file.write(content)
    assert np.array_equal(session.run(IMAGES, route="slim"), wanted)


def test_what_does_not_change_the_weights_does_not_disturb(mine: Path) -> None:
    session = ElasticSession(mine, threads=1)
    wanted = session.run(IMAGES, route="slim")
    os.link(mine / "weights.bin", mine.parent / "another name")
    (mine / "weights.bin").touch()
    assert np.array_equal(session.run(IMAGES, route="slim"), wanted)
    shutil.rmtree(mine)
    assert np.array_equal(session.run(IMAGES, route="slim"), wanted)

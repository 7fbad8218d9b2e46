"""Registries of every older version: read as they are, upgraded when something is written, never lost."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import made_up
import pytest
from profiles_made_up import profile, statistics

from klas_zoo.cascades.definition import Cascade, Stage
from klas_zoo.errors import NewerRegistry, UsageError
from klas_zoo.profiles.profile import MeasuredNetwork
from klas_zoo.profiles.records import CascadeLatency
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry import Registry, database, schema, upkeep
from klas_zoo.registry.checking import check
from klas_zoo.registry.packages import digest_of, package_folder
from klas_zoo.registry.picking import pick
from klas_zoo.registry.schema import SCHEMA_VERSION, STEPS, Migration, upgrade, version_of
from klas_zoo.registry.store import check_file
from klas_zoo.registry.tags import history
from klas_zoo.routes import Route

GOLDEN = Path(__file__).parent / "golden"
OLDER = range(1, SCHEMA_VERSION)
FIRST_WITH_CASCADES = 5
CASCADE = "tiny ?p(T=1.5)<0.8 | base"


def golden_engines(version: int) -> list[tuple[str, str, float]]:
    """Names, devices and top-1 of what the golden registry of a version holds."""
    cascades = [(CASCADE, "cpu", 79.0)] if version >= FIRST_WITH_CASCADES else []
    plain = [("tiny", "cpu", 70.0), ("small", "cpu", 75.0), ("base", "cpu", 80.0)]
    return [*plain, *cascades, ("tiny", "a100", 70.0)]


def old_registry(root: Path, version: int) -> Registry:
    """A registry as that version left it: its database from tests/golden, its engines and a tuned supernet."""
    root.mkdir()
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection:
        connection.executescript((GOLDEN / f"registry-v{version}.sql").read_text())
    cascades = ("cascades",) if version >= FIRST_WITH_CASCADES else ()
    for names in (("old",), ("tiny", "small", "base", *cascades), ("tiny",)):
        if version < 4:
            _write_loose(root, names)
        else:  # engines are files of packages
            _write_package(root, names)
    supernet = upkeep.legacy_supernet(root, "deit-micro", "cpu")
    supernet.parent.mkdir()
    supernet.write_text("tuned")
    return Registry(root)


def _write_loose(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        path = root / "engines" / sha256[:2] / f"{sha256}.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def _write_package(root: Path, names: tuple[str, ...]) -> None:
    package = root / "package"
    package.mkdir()
    for name in names:
        (package / name).write_bytes(name.encode())
    made_up.write_manifest(package)
    stored = package_folder(root, digest_of(package))
    stored.parent.mkdir(exist_ok=True)
    package.rename(stored)


def dump(registry: Registry) -> list[str]:
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        return [f"version {version_of(connection)}", *connection.iterdump()]


def tables(connection: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Columns of every table and index, with their types, defaults and keys."""
    found = connection.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
    return {
        name: [tuple(row)[1:] for row in connection.execute(f"PRAGMA {kind}_info('{name}')")]
        for kind, name in found
    }


def test_every_older_version_has_a_golden_registry() -> None:
    assert {path.name for path in GOLDEN.glob("registry-v*.sql")} >= {f"registry-v{n}.sql" for n in OLDER}


def test_the_present_version_reads_its_own_golden_registry_and_would_write_the_same(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "golden", SCHEMA_VERSION)
    engines = registry.engines()
    assert [(str(e.route), e.device, e.top1) for e in engines] == golden_engines(SCHEMA_VERSION)
    assert all(e.package for e in engines)
    fresh = Registry.open(tmp_path / "fresh", create=True)
    with (
        closing(database.connect(registry.database_path)) as golden,
        closing(database.connect(fresh.database_path)) as made,
    ):
        assert tables(golden) == tables(made)


@pytest.mark.parametrize("version", OLDER)
def test_the_steps_still_make_the_older_schema_that_was_released(version: int, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", version)
    with (
        closing(database.connect(registry.root / "registry.sqlite")) as released,
        closing(sqlite3.connect(":memory:", isolation_level=None)) as made,
    ):
        assert version_of(released) == version
        upgrade(made, STEPS[:version])
        assert tables(released) == tables(made)


@pytest.mark.parametrize("version", OLDER)
def test_an_older_registry_is_read_without_being_changed(version: int, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", version)
    before = dump(registry)
    found = Registry.open(registry.root, create=False).engines()
    assert [(str(e.route), e.device, e.top1) for e in found] == golden_engines(version)
    assert found[1].latency_ms("p50", 8) == 6.0
    assert registry.build(1).finished_at == "2026-01-01T00:00:00+00:00"
    assert dump(registry) == before


@pytest.mark.parametrize("version", OLDER)
def test_writing_upgrades_an_older_registry_and_loses_nothing(version: int, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", version)
    before, builds = registry.engines(), [registry.build(n) for n in (1, 2, 3)]
    new = made_up.new_engine(tmp_path / "new", "new", family="another")
    made_up.register(registry, made_up.build(family="another"), [new])
    after = registry.engines()
    assert [str(e.route) for e in after if e.family == "another"] == ["new"]
    assert [e for e in after if e.family != "another"] == before
    assert [registry.build(n) for n in (1, 2, 3)] == builds
    fresh = Registry.open(tmp_path / "fresh", create=True)
    with (
        closing(database.connect(registry.root / "registry.sqlite")) as upgraded,
        closing(database.connect(fresh.root / "registry.sqlite")) as made,
    ):
        assert version_of(upgraded) == SCHEMA_VERSION
        assert tables(upgraded) == tables(made)
        assert upgraded.execute("PRAGMA foreign_key_check").fetchall() == []
        assert upgraded.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("upgraded", [True, False])
def test_engines_of_an_older_registry_are_picked_checked_and_kept(
    version: int, upgraded: bool, tmp_path: Path
) -> None:
    registry = old_registry(tmp_path / "old", version)
    if upgraded:
        with registry.changing():
            pass
    for engine in (*registry.engines(), *(registry.engines("deit-micro@prod") if version > 1 else [])):
        check_file(engine, content=True)
        assert engine.path.parent.parent == registry.root / ("engines" if version < 4 else "packages")
        assert (engine.format, engine.runtime, engine.status) == ("onnx", "onnxruntime", "verified")
        assert engine.latencies[0].clock == "host" and engine.latencies[0].options == ""
    with pytest.raises(UsageError, match=r"was measured on this machine \(.*\), only on an abacus: .*--hardware"):
        pick("2.5ms", device="cpu", registry=registry)
    found = pick("2.5ms", device="cpu", hardware="abacus", registry=registry)
    expected = (CASCADE, 1.0, 4) if version >= FIRST_WITH_CASCADES else ("small", 2.0, 3)
    assert (str(found.engine.route), found.latency_ms, found.candidates) == expected
    assert check(registry) == []
    supernet = upkeep.legacy_supernet(registry.root, "deit-micro", "cpu")
    orphan = registry.root / "engines" / "ab" / "abcd.onnx"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.touch()
    _, garbage = upkeep.collect(registry)
    assert [one.path for one in garbage] == [orphan]
    assert supernet.read_text() == "tuned"
    assert check(registry) == []


@pytest.mark.parametrize("version", range(FIRST_WITH_CASCADES, SCHEMA_VERSION + 1))
@pytest.mark.parametrize("written", ["not at all", "by a build", "by the next version's upgrade"])
def test_a_cascade_of_a_golden_registry_is_read_picked_and_kept(version: int, written: str, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", version)
    before = [one for one in registry.engines() if one.cascade is not None]
    if written == "by a build":
        new = made_up.new_engine(tmp_path / "new", "new", family="another")
        made_up.register(registry, made_up.build(family="another"), [new])
    elif written == "by the next version's upgrade":
        step = Migration("a note of each engine", "ALTER TABLE engines ADD COLUMN note TEXT NOT NULL DEFAULT '';")
        with closing(sqlite3.connect(registry.database_path, isolation_level=None)) as connection:
            upgrade(connection, (*STEPS, step))
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    (found,) = (one for one in registry.engines("deit-micro") if one.cascade is not None)
    assert [found] == before
    assert isinstance(found.route, Cascade) and str(found.route) == CASCADE
    assert found.route.stages[0] == Stage(route=Route.anchor("tiny", 4), threshold=0.8, temperature=1.5)
    assert found.cascade is not None and found.cascade.heldout == found.cascade.test
    assert (found.cascade.test.shares, found.cascade.test.images) == ((0.8, 0.2), 500)
    (latency,) = found.latencies
    assert isinstance(latency, CascadeLatency)
    assert (latency.mean_ms, latency.worst_ms, latency.paths_ms) == (pytest.approx(1.6), 4.0, (1.0, 4.0))
    check_file(found, content=True)
    assert check(registry) == []
    picked = pick(mean="1.7ms", worst="5ms", device="cpu", hardware="abacus", registry=registry)
    assert picked.engine == found and picked.latency_ms == latency.mean_ms


def test_an_upgrade_applies_the_profiles_and_skips_one_that_is_damaged(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", SCHEMA_VERSION - 1)
    found = next(engine for engine in registry.engines(device="cpu") if str(engine.route) == "small")
    measured = MeasuredNetwork(
        route=found.route, macs=found.macs, parameters=found.parameters, latency=statistics(0.5)
    )
    (good,) = ProfileStore.of(registry.root).add(
        [profile(family="deit-micro", networks=(measured,), model=None, threads=4)]
    )
    (good.parent / "20260101000000-0123456789ab.json").write_text("{")

    def latencies() -> list[tuple[int, float]]:
        (small,) = [one for one in registry.engines(device="cpu") if one.route == found.route]
        return [(one.threads, one.p50_ms) for one in small.latencies if one.batch == 1]

    expected = {(1, 2.0), (4, 0.5)}
    assert set(latencies()) == expected
    with registry.changing():
        pass
    good.unlink()
    assert set(latencies()) == expected


KILLED = """
import os, signal, sys
from pathlib import Path
from klas_zoo.registry import schema
from klas_zoo.registry import Registry
root, after = Path(sys.argv[1]), int(sys.argv[2])
class Deadly(schema.Migration):
    def statements(self):
        for number, statement in enumerate(super().statements()):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield statement
from klas_zoo.registry import database
last = schema.STEPS[-1]
defaults = schema.upgrade.__defaults__
schema.upgrade.__defaults__ = ((*schema.STEPS[:-1], Deadly(last.purpose, last.sql)), *defaults[1:])
with database.transaction(root / "registry.sqlite"):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", range(len(list(STEPS[-1].statements()))))
def test_an_upgrade_that_is_killed_changes_nothing_and_the_next_one_succeeds(after: int, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", SCHEMA_VERSION - 1)
    before = dump(registry)
    done = subprocess.run([sys.executable, "-c", KILLED, registry.root, str(after)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert dump(registry) == before
    with database.transaction(registry.root / "registry.sqlite") as connection:
        assert version_of(connection) == SCHEMA_VERSION


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", SCHEMA_VERSION - 1)
    before = dump(registry)
    steps = (*STEPS[:-1], Migration("bad", "CREATE TABLE fine (x);\nINSERT INTO nowhere VALUES (1);"))
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            upgrade(connection, steps)
        assert not connection.in_transaction
        assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    assert dump(registry) == before


def test_a_step_may_make_a_table_anew_to_which_others_refer(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", 1)
    anew = """
    CREATE TABLE replaced AS SELECT * FROM builds;
    DROP TABLE builds;
    ALTER TABLE replaced RENAME TO builds;
    """
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        upgrade(connection, (STEPS[0], Migration("anew", anew)))
        assert connection.execute("SELECT count(*) FROM builds").fetchone()[0] == 3
        assert connection.execute("SELECT count(*) FROM engines").fetchone()[0] == 5


def test_a_step_that_ends_within_a_statement_is_a_bug() -> None:
    with pytest.raises(ValueError, match="middle of a statement"):
        list(Migration("half", "CREATE TABLE a (x);\nCREATE TABLE b (").statements())


def test_processes_that_upgrade_at_once_all_succeed(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", 1)
    script = (
        "import sys; from pathlib import Path; from klas_zoo.registry import database\n"
        "sys.stdin.readline()\n"
        "with database.transaction(Path(sys.argv[1]) / 'registry.sqlite') as c:\n"
        "    c.execute('UPDATE builds SET command = command || 1 WHERE id = 1')\n"
    )
    command = [sys.executable, "-c", script, str(registry.root)]
    pipe = subprocess.PIPE
    started = [subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) for _ in range(3)]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert registry.build(1).command.endswith("deit-micro111")


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    registry = made_up.filled_registry(tmp_path)
    before = dump(registry)
    with pytest.raises(KeyError), database.transaction(tmp_path / "registry.sqlite") as connection:
        connection.execute("DELETE FROM latencies")
        raise KeyError
    assert dump(registry) == before


def test_a_registry_that_a_newer_version_upgrades_meanwhile_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = made_up.filled_registry(tmp_path)
    real = schema.version_of

    def upgraded_after_the_first_look(connection: sqlite3.Connection) -> int:
        found = real(connection)
        monkeypatch.setattr(database, "version_of", real)
        if not connection.in_transaction:
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        return found

    monkeypatch.setattr(database, "version_of", upgraded_after_the_first_look)
    with pytest.raises(NewerRegistry):
        made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a")])


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_an_older_registry_in_a_folder_that_cannot_be_written_is_read(tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", 1)
    with closing(database._attach(registry.root / "registry.sqlite", "immutable=1", 1)) as connection:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            upgrade(connection)
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            connection.backup(copy)
            upgrade(copy)
            assert copy.execute("SELECT count(*) FROM builds").fetchone()[0] == 3


@pytest.mark.parametrize("version", range(2, SCHEMA_VERSION))
def test_tags_of_an_older_registry_still_point_where_they_did(version: int, tmp_path: Path) -> None:
    registry = old_registry(tmp_path / "old", version)
    found = registry.engines("deit-micro@prod")
    assert [(str(e.route), e.device) for e in found] == [("old", "cpu"), ("tiny", "a100")]
    assert [(m.name, m.device, m.build_id) for m in history(registry)] == [
        ("deit-micro@gone", "cpu", None), ("deit-micro@gone", "a100", None),
        ("deit-micro@gone", "cpu", 2), ("deit-micro@gone", "a100", 3),
        ("deit-micro@prod", "cpu", 1), ("deit-micro@prod", "cpu", 2), ("deit-micro@prod", "a100", 3),
    ]  # fmt: skip

"""The registry, above all what is left of it when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import made_up
import pytest

from klas_zoo.errors import DamagedRegistry, NewerRegistry, RegistryError, VerificationError
from klas_zoo.profiles.records import CascadeLatency, Conditions, EstimatedLatency
from klas_zoo.registry import Registry, database, default_root, rows
from klas_zoo.registry.records import BuildRecord, EngineRecord
from klas_zoo.registry.schema import SCHEMA_VERSION
from klas_zoo.registry.store import check_file

TESTS = Path(__file__).parent
NEWER = SCHEMA_VERSION + 1
PREAMBLE = f"""
import os, shutil, signal, sqlite3, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
import made_up
from klas_zoo.registry import database, store as registry
from klas_zoo.errors import RegistryError
from klas_zoo.registry import Registry
root, work = Path(sys.argv[1]), Path(sys.argv[2])
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def registry(root: Path) -> Registry:
    return Registry.open(root, create=True)


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a Python of its own that runs `script`."""
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def files_in(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time it was written, nanoseconds."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def names_of(registry: Registry) -> list[str]:
    return [str(engine.route) for engine in registry.engines()]


def assert_intact(registry: Registry) -> None:
    for engine in registry.engines():
        check_file(engine, content=True)
        assert engine.latencies


# what is registered comes back


def test_a_registered_engine_comes_back_with_everything_that_was_said_of_it(
    registry: Registry, work: Path
) -> None:
    latencies = (made_up.latency(1.5), made_up.latency(9.0, batch=8, shape=(8, 3, 8, 8)))
    new = made_up.new_engine(work / "a.onnx", "tiny", 71.25, latencies, macs=2**40)
    build_id = made_up.register(registry, made_up.build(), [new])
    (found,) = registry.engines()
    for field in fields(EngineRecord):
        if hasattr(new, field.name) and field.name != "size_bytes":
            assert getattr(found, field.name) == getattr(new, field.name), field.name
    assert found.path.read_bytes() == b"tiny"
    assert found.size_bytes == 4
    # an independent way to it: printf tiny | sha256sum
    assert found.sha256 == "8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c"
    manifest = found.path.parent / "manifest.json"
    assert found.package == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert found.path == registry.root / "packages" / found.package / "a.onnx"
    assert (found.build_id, found.built_at) == (build_id, made_up.build().finished_at)
    assert registry.build(build_id) == made_up.build()


def test_latencies_are_found_by_percentile_and_batch(registry: Registry, work: Path) -> None:
    latencies = (made_up.latency(1.5, p90_ms=1.75), made_up.latency(9.0, batch=8))
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a", latencies=latencies)])
    (found,) = registry.engines()
    assert found.latency_ms("p90", 1) == 1.75
    assert found.latency_ms("p50", 8) == 9.0
    assert found.latency_ms("p50", 2) is None


def test_engines_come_sorted_by_macs(registry: Registry, work: Path) -> None:
    new = [made_up.new_engine(work / n, n, macs=m) for n, m in (("b", 30), ("a", 10), ("c", 20))]
    made_up.register(registry, made_up.build(), new)
    assert names_of(registry) == ["a", "c", "b"]


def test_a_build_replaces_the_one_before_it_of_the_same_family_and_device_only(
    registry: Registry, work: Path
) -> None:
    for family, device, name in (("f", "cpu", "a"), ("f", "gpu", "b"), ("g", "cpu", "c"), ("f", "cpu", "d")):
        new = made_up.new_engine(work / name, name, family=family, device=device)
        made_up.register(registry, made_up.build(family=family, device=device), [new])
    assert sorted(names_of(registry)) == ["b", "c", "d"]
    assert [str(e.route) for e in registry.engines(family="f", device="cpu")] == ["d"]
    assert [str(e.route) for e in registry.engines(device="gpu")] == ["b"]
    assert registry.engines(family="nobody") == []
    assert registry.build(1).family == "f"


def test_a_registry_that_was_moved_finds_its_engines(registry: Registry, work: Path, tmp_path: Path) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    moved = registry.root.rename(tmp_path / "moved #1?")
    (found,) = Registry.open(moved, create=False).engines()
    assert found.path.is_relative_to(moved)
    check_file(found, content=True)


def test_the_same_package_is_stored_once_and_repaired_when_it_was_damaged(
    registry: Registry, work: Path
) -> None:
    new = made_up.new_engine(work / "a")
    made_up.register(registry, made_up.build(), [new])
    (before,) = registry.engines()
    written = before.path.stat().st_mtime_ns
    made_up.register(registry, made_up.build(), [new])
    assert before.path.stat().st_mtime_ns == written
    before.path.write_bytes(b"TINY")
    with pytest.raises(DamagedRegistry):
        check_file(before, content=True)
    made_up.register(registry, made_up.build(), [new])
    check_file(before, content=True)
    assert len(list((registry.root / "packages").iterdir())) == 1


def test_registering_leaves_no_temporary_files_and_reading_leaves_none(
    registry: Registry, work: Path
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    registry.engines()
    left = {path.name for path in registry.root.rglob("*") if path.is_file()}
    assert left == {"registry.sqlite", "store.lock", "manifest.json", registry.engines()[0].path.name}


def test_the_tables_have_a_column_for_every_field_of_the_records(registry: Registry) -> None:
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        columns = {
            table: {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")}
            for table in ("builds", "latencies", "conditions")
        }
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert columns["builds"] == {f.name for f in fields(BuildRecord)} | {"id", "current", "removed_at"}
    assert columns["conditions"] == {f.name for f in fields(Conditions)} | {"id", "device"}
    of_latencies = {f.name for kind in (EstimatedLatency, CascadeLatency) for f in fields(kind)} - columns["conditions"]
    assert columns["latencies"] == of_latencies | {"engine_id", "conditions_id", "from_profile"}


# what is refused


@pytest.mark.parametrize(
    "found", [{"max_abs_difference": 1.0}, {"top1_agreement": 0.5}, {"max_abs_difference": float("nan")}]
)
def test_an_engine_that_is_not_its_route_is_refused_before_anything_is_written(
    registry: Registry, work: Path, found: dict[str, float]
) -> None:
    good = made_up.new_engine(work / "a", "good")
    bad = made_up.new_engine(work / "b", "bad", verification=made_up.verification(**found))
    before = files_in(registry.root)
    with pytest.raises(VerificationError, match="The engine bad of deit-micro was not registered, nor any other"):
        made_up.register(registry, made_up.build(), [good, bad])
    assert files_in(registry.root) == before


def test_a_build_without_engines_is_a_bug(registry: Registry) -> None:
    with pytest.raises(ValueError, match="without engines"):
        made_up.register(registry, made_up.build(), [])


@pytest.mark.parametrize("name", ["family", "device", "weights"])
def test_an_engine_of_another_build_is_a_bug(registry: Registry, work: Path, name: str) -> None:
    changes: dict[str, Any] = {name: "random"}
    with pytest.raises(ValueError, match=f"differ in {name}"):
        made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a", **changes)])


@pytest.mark.parametrize("top1", [-1.0, 100.5, float("nan")])
def test_an_accuracy_that_is_none_is_a_bug(work: Path, top1: float) -> None:
    with pytest.raises(ValueError, match="top1"):
        made_up.new_engine(work / "a", top1=top1)


@pytest.mark.parametrize("p50_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_latency_that_is_none_is_a_bug(work: Path, p50_ms: float) -> None:
    with pytest.raises(ValueError, match="finite and above zero"):
        made_up.new_engine(work / "a", latencies=p50_ms)


def test_two_latencies_at_one_batch_size_are_a_bug(work: Path) -> None:
    with pytest.raises(ValueError, match="two latencies"):
        made_up.new_engine(work / "a", latencies=(made_up.latency(1.0), made_up.latency(2.0)))


# where there is no registry, or no good one


def test_without_a_registry_the_message_says_what_to_run_and_nothing_is_made(root: Path) -> None:
    with pytest.raises(RegistryError, match=f"No registry at {root}: run klas-zoo build, add or install first"):
        Registry.open(root, create=False)
    assert not root.exists()


def test_a_database_that_was_only_begun_counts_as_none(root: Path) -> None:
    root.mkdir()
    (root / "registry.sqlite").touch()
    with pytest.raises(RegistryError, match="run klas-zoo build, add or install first"):
        Registry.open(root, create=False)
    assert Registry.open(root, create=True).engines() == []


def test_the_log_of_a_deleted_database_is_not_played_into_a_new_one(root: Path, work: Path) -> None:
    registry = Registry.open(root, create=True)
    holder = sqlite3.connect(root / "registry.sqlite")  # keeps the log from being tidied away
    holder.execute("SELECT * FROM builds").fetchall()
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    log = (root / "registry.sqlite-wal").read_bytes()
    holder.close()
    assert log
    (root / "registry.sqlite").unlink()
    shutil.rmtree(root / "packages")
    (root / "registry.sqlite-wal").write_bytes(log)
    assert Registry.open(root, create=True).engines() == []


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_lost_database_is_no_reason_to_begin_anew_beside_its_engines(
    registry: Registry, work: Path, lost: str
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    file = registry.root / "registry.sqlite"
    content = file.read_bytes()
    file.unlink()
    if lost == "empty":
        file.touch()
    with pytest.raises(DamagedRegistry, match=r"holds engines, but .* is missing or empty: put it back from a backup"):
        Registry.open(registry.root, create=True)
    file.write_bytes(content)
    assert_intact(Registry.open(registry.root, create=True))


@pytest.mark.parametrize("content", [b"x", b"not a database at all" * 100, b"SQLite format 3\0"])
@pytest.mark.parametrize("create", [True, False])
def test_garbage_in_place_of_the_database_is_named_and_left_alone(
    root: Path, content: bytes, create: bool
) -> None:
    root.mkdir()
    (root / "registry.sqlite").write_bytes(content)
    with pytest.raises(DamagedRegistry, match="no SQLite database"):
        Registry.open(root, create=create)
    assert files_in(root)["registry.sqlite"][0] == content


def test_a_database_of_another_program_is_left_alone(root: Path) -> None:
    root.mkdir()
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection:
        connection.executescript("CREATE TABLE theirs (x); PRAGMA user_version = 1;")
    before = files_in(root)
    with pytest.raises(DamagedRegistry, match="not a registry of klas-zoo"):
        Registry.open(root, create=True)
    assert files_in(root) == before


def test_pages_that_were_overwritten_are_called_damage(registry: Registry, work: Path) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    file = registry.root / "registry.sqlite"
    content = file.read_bytes()
    file.write_bytes(content[:100] + b"\xff" * (len(content) - 100))
    with pytest.raises(DamagedRegistry, match="is damaged"):
        registry.engines()


def test_a_schema_that_is_no_text_any_more_is_called_damage(registry: Registry) -> None:
    file = registry.root / "registry.sqlite"
    content = file.read_bytes()
    assert b"versions TEXT NOT NULL" in content
    file.write_bytes(content.replace(b"versions TEXT NOT NULL", b"versions TEXT NOT \x80ULL"))
    with pytest.raises(DamagedRegistry, match="is damaged"):
        registry.engines()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE engines SET route = 'tiny'",
        "UPDATE engines SET route = '[]'",
        "UPDATE engines SET verification = '{}'",
        "UPDATE engines SET top1 = 400",
        "UPDATE conditions SET shape = '3'",
        "UPDATE conditions SET threads = 'many'",
        "DROP TABLE latencies",
    ],
)
def test_an_entry_that_cannot_be_understood_is_called_damage(
    registry: Registry, work: Path, damage: str
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        connection.execute(damage)
    with pytest.raises(DamagedRegistry):
        registry.engines()


@pytest.mark.parametrize("create", [True, False])
def test_a_newer_registry_is_left_byte_for_byte_as_it_was(
    registry: Registry, work: Path, create: bool
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
    with closing(sqlite3.connect(registry.root / "registry.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
    before = files_in(registry.root)
    with pytest.raises(NewerRegistry, match=rf"its schema is {NEWER}, this one knows up to {NEWER - 1}\. Upgrade"):
        Registry.open(registry.root, create=create)
    assert files_in(registry.root) == before


def test_a_newer_registry_keeps_even_the_log_that_a_killed_build_left(registry: Registry) -> None:
    file = registry.root / "registry.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE newer (x)")
        killed = {path: path.read_bytes() for path in registry.root.glob("registry.sqlite*")}
    for path, content in killed.items():
        path.write_bytes(content)
    before = files_in(registry.root)
    assert before["registry.sqlite-wal"][0]
    with pytest.raises(NewerRegistry):
        Registry.open(registry.root, create=True)
    assert files_in(registry.root) == before


def test_a_newer_registry_is_recognised_while_its_version_is_still_in_the_log(registry: Registry) -> None:
    with closing(sqlite3.connect(registry.root / "registry.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {NEWER}")
        before = (registry.root / "registry.sqlite").read_bytes()
        assert int.from_bytes(before[60:64], "big") == NEWER - 1
        with pytest.raises(NewerRegistry):
            Registry.open(registry.root, create=True)
        with pytest.raises(NewerRegistry):
            registry.engines()
        assert (registry.root / "registry.sqlite").read_bytes() == before


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RegistryError, match="cannot be opened: Not a directory"):
        Registry.open(tmp_path / "file", create=True)


def test_a_file_of_a_package_that_is_not_there_is_one_sentence(registry: Registry, work: Path) -> None:
    new = made_up.new_engine(work / "a.onnx")
    made_up.write_manifest(work)
    new.file.unlink()
    with pytest.raises(RegistryError, match="No such file"):
        registry.register(made_up.build(), [new])
    assert list((registry.root / "packages").iterdir()) == []


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KLAS_ZOO_REGISTRY", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.setenv("KLAS_ZOO_REGISTRY", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_root().name == "klas-zoo"
    assert default_root().is_absolute()


# disks and permissions


def test_a_full_disk_while_an_engine_is_copied_keeps_the_build_before(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a", "old")])

    new = made_up.new_engine(work / "b", "new")
    made_up.write_manifest(work)

    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(
        RegistryError, match=r"No space left on device\. Free some space; what was registered"
    ):
        registry.register(made_up.build(), [new])
    assert names_of(registry) == ["old"]
    assert len(list((registry.root / "packages").iterdir())) == 1


def test_a_full_disk_while_the_database_grows_keeps_the_build_before(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a", "old")])
    attach = database._attach

    def attach_on_a_full_disk(file: Path, how: str, timeout_s: float) -> sqlite3.Connection:
        connection = attach(file, how, timeout_s)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(database, "_attach", attach_on_a_full_disk)
    with pytest.raises(RegistryError, match=r"database or disk is full\. Free some space"):
        made_up.register(registry, made_up.build(command="x" * 100_000), [made_up.new_engine(work / "b", "new")])
    assert names_of(registry) == ["old"]


@pytest.mark.parametrize("changed", ["a.onnx", "manifest.json"])
def test_a_file_that_changes_after_it_was_verified_is_not_registered(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    new = made_up.new_engine(work / "a.onnx")
    made_up.write_manifest(work)
    copy = shutil.copyfile

    def change_and_copy(source: Path, target: Path) -> None:
        if source.name == changed:
            source.write_bytes(source.read_bytes() + b" ")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", change_and_copy)
    with pytest.raises(RegistryError, match=f"{changed} changed"):
        registry.register(made_up.build(), [new])
    assert registry.engines() == []
    assert list((registry.root / "packages").iterdir()) == []


def test_files_are_linked_only_where_that_was_asked_for(registry: Registry, work: Path) -> None:
    new = made_up.new_engine(work / "a.onnx")
    made_up.write_manifest(work)
    registry.register(made_up.build(), [new])
    (copied,) = registry.engines()
    new.file.write_bytes(b"ours again")  # by whoever owns the folder, in place
    check_file(copied, content=True)
    made_up.write_manifest(work)
    registry.register(made_up.build(), [new], link=True)
    (linked,) = registry.engines()
    assert linked.path.samefile(new.file)


def test_a_link_in_a_package_is_copied_as_a_file(registry: Registry, work: Path, tmp_path: Path) -> None:
    new = made_up.new_engine(work / "a.onnx")
    made_up.write_manifest(work)
    new.file.rename(tmp_path / "elsewhere")
    new.file.symlink_to(tmp_path / "elsewhere")
    registry.register(made_up.build(), [new], link=True)
    (found,) = registry.engines()
    (tmp_path / "elsewhere").write_bytes(b"changed")
    assert not found.path.is_symlink()
    check_file(found, content=True)


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder that another user can reach, whose own permissions a test may take away."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)


AS_NOBODY = """
import fcntl, hashlib  # before this Python's own files may be out of reach
if os.getuid() == 0:  # root may write whatever the permissions say
    os.setgid(65534)
    os.setuid(65534)
for path in work.iterdir():
    assert not os.access(path, os.W_OK), path
found = Registry.open(root, create=False)
print([str(engine.route) for engine in found.engines()], os.access(found.engines()[0].path, os.R_OK))
def refused():
    with found.writing():
        pass
def refused_too():
    found.register(made_up.build(), [made_up.new_engine(next(root.glob("packages/*/manifest.json")))])
for attempt in (refused, refused_too):
    try:
        attempt()
    except RegistryError as error:
        print(error)
"""


@pytest.mark.parametrize("log", ["no log", "a log that a killed build left", "a log in use"])
def test_a_folder_that_cannot_be_written_can_be_read(foreign_folder: Path, tmp_path: Path, log: str) -> None:
    root = foreign_folder / "registry"
    old_umask = os.umask(0o022)
    try:
        registry = Registry.open(root, create=True)
        made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a", "old")])
    finally:
        os.umask(old_umask)
    expected = "old"
    holder = sqlite3.connect(root / "registry.sqlite") if log != "no log" else None
    if holder:
        expected = "new"
        holder.execute("SELECT * FROM builds").fetchall()
        made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "b", "new")])
        assert (root / "registry.sqlite-wal").stat().st_size
    if log == "a log that a killed build left":
        assert holder
        kept = {path: path.read_bytes() for path in root.glob("registry.sqlite*")}
        holder.close()
        for path, content in kept.items():
            path.write_bytes(content)
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output, errors = child(AS_NOBODY, root, root).communicate(timeout=60)
    assert errors == ""
    lines = output.splitlines()
    assert lines[0] == f"['{expected}'] True"
    assert "cannot be locked: Permission denied" in lines[1]
    assert "cannot be locked: Permission denied" in lines[2]
    assert len(lines) == 3
    if holder:
        holder.close()


def test_a_log_that_cannot_be_read_is_refused_rather_than_ignored(
    foreign_folder: Path, tmp_path: Path
) -> None:
    root = foreign_folder / "registry"
    registry = Registry.open(root, create=True)
    holder = sqlite3.connect(root / "registry.sqlite")
    holder.execute("SELECT * FROM builds").fetchall()
    made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a", "only in the log")])
    log = (root / "registry.sqlite-wal").read_bytes()
    holder.close()
    (root / "registry.sqlite-wal").write_bytes(log)  # and no -shm beside it
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    output, errors = child(AS_NOBODY, root, root).communicate(timeout=60)
    assert output == ""
    assert "cannot be read: unable to open database file. Check who may write to that folder." in errors


AS_A_MEMBER = """
import grp, fcntl, hashlib, shutil
from klas_zoo.registry import rows, latencies, picking, upkeep, checking
name, umask = sys.argv[3], int(sys.argv[4], 8)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)  # both are members of one group
    os.setuid(int(sys.argv[5]))
os.umask(umask)
registry = Registry.open(root, create=True)
made_up.register(registry, made_up.build(), [made_up.planned(1, name)])
found = picking.pick("5ms", registry=registry)
print(found.engine.route, [one.what for one in checking.check(registry)])
upkeep.collect(registry, old_builds=name == "last")
print([path.name for path in root.glob("packages/*/*.onnx")])
"""


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="becomes other users: needs root")
def test_members_of_a_group_share_a_registry_whatever_their_umask(foreign_folder: Path) -> None:
    root = foreign_folder / "registry"
    root.mkdir()
    os.chown(root, 0, 65534)
    root.chmod(0o2770)
    first = child(AS_A_MEMBER, root, root, "first", "002", "65001").communicate(timeout=60)
    assert first == ("first []\n['first.onnx']\n", "")
    second = child(AS_A_MEMBER, root, root, "second", "077", "65002").communicate(timeout=60)
    assert second[1] == "" and second[0].startswith("second []\n")
    (package,) = [path.parent for path in root.glob("packages/*/second.onnx")]
    assert stat.S_IMODE(package.stat().st_mode) & 0o770 == 0o770
    assert stat.S_IMODE((package / "second.onnx").stat().st_mode) == 0o664  # as the first one's database
    last = child(AS_A_MEMBER, root, root, "last", "077", "65003").communicate(timeout=60)
    assert last == ("last []\n['last.onnx']\n", "")


def test_files_of_a_package_that_only_their_owner_may_read_become_as_readable_as_the_database(
    registry: Registry, work: Path
) -> None:
    new = made_up.new_engine(work / "a.onnx")
    (work / "weights.safetensors").write_bytes(b"weights")
    made_up.write_manifest(work)
    for path in work.iterdir():
        path.chmod(0o600)  # as safetensors writes them
    registry.database_path.chmod(0o644)
    registry.register(made_up.build(), [new], link=True)
    folder = registry.engines()[0].path.parent
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


# deaths

DIE_IN_THE_DATABASE = """
before = sys.argv[3]
class Mortal(sqlite3.Connection):
    def execute(self, sql, *arguments):
        if sql.startswith(before):
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().execute(sql, *arguments)
        if before == "after COMMIT" and sql == "COMMIT":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
connect = sqlite3.connect
sqlite3.connect = lambda *a, **k: connect(*a, factory=Mortal, **k)
new = [made_up.new_engine(work / name, name) for name in ("new1", "new2")]
made_up.register(Registry.open(root, create=True), made_up.build(), new)
"""
DIE_IN_A_FILE = """
number, where = int(sys.argv[3]), sys.argv[4]
copied = 0
copyfile, rename, replace = shutil.copyfile, Path.rename, Path.replace
def die_at(place):
    if place == where and (copied == number or "renamed" in place):
        os.kill(os.getpid(), signal.SIGKILL)
def copy(source, target):
    global copied
    if target.is_relative_to(root):
        copied += 1
        if copied == number and where == "in the middle":
            target.write_bytes(source.read_bytes()[:1])
            die_at("in the middle")
    copyfile(source, target)
    die_at("after a file")
def renamed(self, target):
    die_at("before it is renamed")
    rename(self, target)
    die_at("after it is renamed")
shutil.copyfile, Path.rename = copy, renamed
new = [made_up.new_engine(work / name, name) for name in ("new1", "new2")]
made_up.register(Registry.open(root, create=True), made_up.build(), new)
"""


def register_old(registry: Registry, work: Path) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / n, n) for n in ("old1", "old2")])


def assert_that_the_next_build_succeeds(registry: Registry, work: Path) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / n, n) for n in ("new1", "new2", "new3")])
    assert names_of(registry) == ["new1", "new2", "new3"]
    assert_intact(registry)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "current"),
    [
        ("BEGIN", "old"),
        ("UPDATE builds", "old"),
        ("INSERT INTO builds", "old"),
        ("INSERT INTO engines", "old"),
        ("INSERT INTO latencies", "old"),
        ("COMMIT", "old"),
        ("after COMMIT", "new"),
    ],
)
def test_a_build_killed_in_its_transaction_changes_all_or_nothing(
    registry: Registry, work: Path, before: str, current: str
) -> None:
    register_old(registry, work)
    process = child(DIE_IN_THE_DATABASE, registry.root, work, before)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert names_of(registry) == [f"{current}1", f"{current}2"]
    assert_intact(registry)
    assert_that_the_next_build_succeeds(registry, work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (1, "in the middle"),
        (2, "in the middle"),
        (3, "in the middle"),  # the manifest
        (2, "after a file"),
        (3, "after a file"),
        (0, "before it is renamed"),
        (0, "after it is renamed"),
    ],
)
def test_a_build_killed_while_it_copies_a_package_changes_nothing(
    registry: Registry, work: Path, number: int, where: str
) -> None:
    register_old(registry, work)
    process = child(DIE_IN_A_FILE, registry.root, work, number, where)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    assert names_of(registry) == ["old1", "old2"]
    assert_intact(registry)
    assert_that_the_next_build_succeeds(registry, work)


@pytest.mark.slow
def test_a_death_while_the_registry_is_made_leaves_none(root: Path, work: Path) -> None:
    script = """
class Mortal(sqlite3.Connection):
    def execute(self, sql, *arguments):
        if sql.startswith("CREATE TABLE engines"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(sql, *arguments)
connect = sqlite3.connect
sqlite3.connect = lambda *a, **k: connect(*a, factory=Mortal, **k)
Registry.open(root, create=True)
"""
    process = child(script, root, work)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    with pytest.raises(RegistryError, match="run klas-zoo build, add or install first"):
        Registry.open(root, create=False)
    assert_that_the_next_build_succeeds(Registry.open(root, create=True), work)


# several at once

HOLD = """
with Registry.open(root, create=False).writing():
    print("held", flush=True)
    sys.stdin.readline()
    (work / "done").touch()
"""


def test_a_second_build_says_once_that_it_waits_and_waits(registry: Registry, work: Path) -> None:
    holder = child(HOLD, registry.root, work)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    waits = []

    def on_wait() -> None:
        waits.append((work / "done").exists())
        assert holder.stdin
        holder.stdin.write("go on\n")
        holder.stdin.flush()

    with registry.writing(on_wait):
        assert (work / "done").exists()
    assert waits == [False]
    holder.communicate(timeout=60)


def test_a_build_that_was_killed_frees_the_lock(registry: Registry, work: Path) -> None:
    holder = child(HOLD, registry.root, work)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with registry.writing(on_wait=holder.kill):
        assert not (work / "done").exists()
    assert holder.wait(timeout=60) == -signal.SIGKILL
    holder.communicate()


def test_nobody_waits_for_a_lock_that_is_free(registry: Registry) -> None:
    for _ in range(2):
        with registry.writing(on_wait=lambda: pytest.fail("it waited")):
            pass


def test_the_lock_is_freed_when_a_build_fails(registry: Registry) -> None:
    with pytest.raises(KeyError), registry.writing():
        raise KeyError("the build's own error stays what it is")
    with registry.writing(on_wait=lambda: pytest.fail("it waited")):
        pass


def test_processes_that_make_and_fill_a_registry_at_once_all_succeed(root: Path, work: Path) -> None:
    script = """
sys.stdin.readline()
for _ in range(3):
    new = made_up.new_engine(work / sys.argv[3], sys.argv[3])
    made_up.register(Registry.open(root, create=True), made_up.build(), [new])
"""
    started = [child(script, root, work, name) for name in ("a", "b", "c")]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    registry = Registry.open(root, create=False)
    (current,) = registry.engines()
    assert current.build_id == 9
    assert_intact(registry)


def test_a_registry_that_another_process_made_meanwhile_is_kept(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a", "theirs")])
    is_there, looks = database.is_there, iter([False])
    monkeypatch.setattr(database, "is_there", lambda file: next(looks, None) is None and is_there(file))
    assert names_of(Registry.open(registry.root, create=True)) == ["theirs"]


def test_a_reader_sees_one_moment_though_a_build_commits_meanwhile(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_old(registry, work)
    read = rows.read_latency
    commits = iter([True])

    def commit_meanwhile(row: sqlite3.Row) -> object:
        if next(commits, False):
            made_up.register(registry, made_up.build(), [made_up.new_engine(work / "new", "new")])
        return read(row)

    monkeypatch.setattr(rows, "read_latency", commit_meanwhile)
    seen = registry.engines()
    assert [str(engine.route) for engine in seen] == ["old1", "old2"]
    assert all(engine.latencies for engine in seen)
    assert names_of(registry) == ["new"]


def test_a_database_that_stays_locked_is_one_sentence(
    registry: Registry, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = database._attach
    monkeypatch.setattr(database, "_attach", lambda file, how, timeout_s: attach(file, how, 0.05))
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match=r"database is locked\. Another process is writing to it"):
            made_up.register(registry, made_up.build(), [made_up.new_engine(work / "a")])
        assert registry.engines() == []  # readers do not wait for writers

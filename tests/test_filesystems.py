"""Registries on file systems that machines share, and on those without locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import pytest

from klas_zoo import filesystems
from klas_zoo.errors import RegistryError
from klas_zoo.files import locked
from klas_zoo.registry import Registry, database
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 22 0:45 / /shared rw,noatime master:3 propagate_from:2 - nfs4 server:/x rw,vers=4.2
41 22 0:46 / /bucket rw - fuse.s3fs s3fs rw
42 22 0:47 / /usb rw - fuseblk /dev/sdb1 rw
43 22 0:48 / /containers rw - fuse.fuse-overlayfs x rw
"""


@pytest.mark.parametrize(
    ("device", "wanted"),
    [((8, 1), None), ((0, 45), "nfs4"), ((0, 46), "fuse.s3fs"), ((0, 47), None), ((0, 48), None), ((0, 99), None)],
)
def test_the_mount_table_says_which_file_systems_are_shared(
    device: tuple[int, int], wanted: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Folder:
        def stat(self) -> Any:
            return type("", (), {"st_dev": os.makedev(*device)})

    class Table:
        def __init__(self, path: str) -> None:
            assert path == "/proc/self/mountinfo"

        def read_text(self, **_: Any) -> str:
            return MOUNTS

    filesystems._type_of.cache_clear()
    monkeypatch.setattr(filesystems, "Path", Table)
    assert filesystems.network_file_system(Folder()) == wanted
    filesystems._type_of.cache_clear()


def test_this_folder_is_on_a_local_disk(tmp_path: Path) -> None:
    assert filesystems.network_file_system(tmp_path) is None
    assert filesystems.network_file_system(tmp_path / "missing") is None


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Every folder is on such a file system from now on."""

    def on(kind: str | None) -> None:
        monkeypatch.setattr(database, "network_file_system", lambda folder: kind)

    on("nfs4")
    return on


def journal(registry: Registry) -> str:
    return {1: "delete", 2: "wal"}[registry.database_path.read_bytes()[18]]


def _register(root: Path, name: str, folder: Path) -> None:
    for turn in range(3):
        made = [made_up.new_engine(folder / f"{name}{turn}", name)]
        made_up.register(Registry.open(root, create=True), made_up.build(family=name), [one_of(name, made)])
        pick("5ms", family=name, registry=Registry.open(root, create=False))


def one_of(family: str, engines: list[Any]) -> Any:
    return replace(engines[0], family=family)


def test_a_registry_that_machines_share_keeps_no_log_and_serves_several_processes(
    shared: Callable[[str | None], None], tmp_path: Path
) -> None:
    root = tmp_path / "registry"
    registry = Registry.open(root, create=True)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_register, args=(root, name, tmp_path)) for name in ("ant", "bee", "cat")]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
        assert one.exitcode == 0
    assert {one.family for one in registry.engines()} == {"ant", "bee", "cat"}
    assert journal(registry) == "delete"
    assert not [one for one in check(registry) if not one.harmless]
    assert not list(root.glob("registry.sqlite-*"))


def test_a_registry_that_is_moved_between_disks_changes_its_journal_when_it_is_written(
    shared: Callable[[str | None], None], tmp_path: Path
) -> None:
    shared(None)
    registry = Registry.open(tmp_path / "registry", create=True)
    made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a")])
    for kind, wanted in (("nfs4", "delete"), (None, "wal")):
        shared(kind)
        before = registry.engines()
        assert before and journal(registry) != wanted
        with registry.changing():
            pass
        assert journal(registry) == wanted
        assert registry.engines() == before


def test_changes_that_are_only_in_the_log_of_another_machine_are_not_passed_over(
    shared: Callable[[str | None], None], tmp_path: Path
) -> None:
    shared(None)
    registry = Registry.open(tmp_path / "registry", create=True)
    holder = sqlite3.connect(registry.database_path)
    holder.execute("SELECT * FROM builds").fetchall()
    made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a")])
    there = Registry(Path(shutil.copytree(registry.root, tmp_path / "there")))
    holder.close()
    shared("nfs4")
    with pytest.raises(RegistryError, match=r"machines share \(nfs4\), and registry\.sqlite-wal holds"):
        there.engines()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_flock_is_missing_posix_locks_do(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", missing)
    waited: list[bool] = []
    fork = multiprocessing.get_context("fork")
    inside, done = fork.Event(), fork.Event()

    def hold() -> None:
        with locked(tmp_path / "lock"):
            inside.set()
            done.wait(60)

    other = fork.Process(target=hold)
    other.start()
    assert inside.wait(60)
    with locked(tmp_path / "lock", on_wait=lambda: (waited.append(True), done.set())):  # type: ignore[arg-type]
        pass
    other.join()
    assert waited == [True]
    registry = Registry.open(tmp_path / "registry", create=True)
    made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "a")])
    assert registry.engines()

    monkeypatch.setattr(fcntl, "lockf", missing)
    with pytest.raises(RegistryError, match="cannot be locked: this file system has no locks: use a folder on a local"):
        made_up.register(registry, made_up.build(), [made_up.new_engine(tmp_path / "b")])

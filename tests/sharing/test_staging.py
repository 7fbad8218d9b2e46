"""Where a pull collects files: nothing that another user plants is written to, read or kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import PIECE, content, forged, run, size

from klas_zoo.errors import PackageError, RemoteError
from klas_zoo.exporters.package import Package
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.store import StoredPackage


class Stopped(Exception):
    pass


@pytest.fixture
def left(package: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of files that a pull into `pulled` left when it was stopped at its end."""
    push(package, str(shared))
    with monkeypatch.context() as patch:
        patch.setattr(Package, "open", lambda folder: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            pull(str(shared), tmp_path / "pulled")
    (outer,) = tmp_path.glob(".pulled.*.part")
    return outer / "package"


def victim_of(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.write_bytes(b"do not touch")
    return victim


def test_the_name_of_the_folder_cannot_be_foreseen_and_others_cannot_enter_it(left: Path, tmp_path: Path) -> None:
    outer = left.parent
    assert outer.stat().st_mode & 0o777 == 0o700
    version = outer.name.split(".")[2]
    assert len(outer.name.removeprefix(f".pulled.{version}.").removesuffix(".part")) == 16


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755])
def test_a_folder_that_others_may_enter_is_not_taken_up(
    mode: int, left: Path, package: Path, shared: Path, tmp_path: Path
) -> None:
    (left / "evil.py").write_text("evil")
    left.parent.chmod(mode)
    assert pull(str(shared), tmp_path / "pulled").received_bytes == size(package)
    assert content(tmp_path / "pulled") == content(package)
    assert (left / "evil.py").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_not_taken_up(left: Path, package: Path, shared: Path, tmp_path: Path) -> None:
    victim = victim_of(tmp_path)
    (left / "weights.bin").unlink()
    (left / "weights.bin").symlink_to(victim)
    os.chown(left.parent, 1002, 1002)
    assert pull(str(shared), tmp_path / "pulled").received_bytes == size(package)
    assert victim.read_bytes() == b"do not touch"
    assert content(tmp_path / "pulled") == content(package)


@pytest.mark.parametrize("what", ["link", "hard link", "pipe", "folder"])
def test_nothing_but_a_file_that_a_pull_made_is_written_to(
    what: str, left: Path, shared: Path, tmp_path: Path
) -> None:
    victim, planted = victim_of(tmp_path), left / "weights.bin"
    planted.unlink()
    if what == "link":
        planted.symlink_to(victim)
    elif what == "hard link":
        planted.hardlink_to(victim)
    elif what == "pipe":
        os.mkfifo(planted)
    else:
        planted.mkdir()
    with pytest.raises(PackageError, match=r"weights\.bin"):
        pull(str(shared), tmp_path / "pulled")
    assert victim.read_bytes() == b"do not touch"
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("inner", [True, False], ids=["the inner folder", "the outer folder"])
def test_a_link_in_place_of_a_folder_is_not_followed(
    inner: bool, left: Path, package: Path, shared: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    replaced = left if inner else left.parent
    replaced.rename(tmp_path / "aside")
    replaced.symlink_to(elsewhere)
    if inner:
        with pytest.raises(PackageError, match="cannot be written"):
            pull(str(shared), tmp_path / "pulled")
    else:
        pull(str(shared), tmp_path / "pulled")
        assert content(tmp_path / "pulled") == content(package)
    assert list(elsewhere.iterdir()) == []


def test_a_file_that_the_package_does_not_have_is_refused_by_name(left: Path, shared: Path, tmp_path: Path) -> None:
    (left / "sitecustomize.py").write_text("evil")
    with pytest.raises(PackageError, match=r"holds 'sitecustomize\.py', which is not of the package: remove it"):
        pull(str(shared), tmp_path / "pulled")
    (left / "sitecustomize.py").unlink()
    pull(str(shared), tmp_path / "pulled")
    assert not left.parent.exists()


def test_a_file_that_appears_during_a_pull_is_refused(
    package: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(package, str(shared))
    real = StoredPackage.receive

    def receive(self: StoredPackage, names: list[str], staging: object, on_bytes: object) -> int:
        (staging.folder / "evil.py").write_text("evil")  # type: ignore[attr-defined]
        return real(self, names, staging, on_bytes)  # type: ignore[arg-type]

    monkeypatch.setattr(StoredPackage, "receive", receive)
    with pytest.raises(PackageError, match=r"evil\.py"):
        pull(str(shared), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


# sizes


def test_an_index_that_names_one_object_over_and_over_is_refused_before_anything_is_fetched(
    package: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(package, str(shared))
    (piece,) = [{"sha256": one.name, "size_bytes": PIECE} for one in (shared / "objects").rglob("*")
                if one.is_file() and one.stat().st_size == PIECE][:1]  # fmt: skip
    times = 2_000_000_000_000 // PIECE // 1000
    table = [{"name": f"f{number}", "size_bytes": PIECE * times, "chunks": [piece] * times} for number in range(2)]
    forged(shared, table)
    with pytest.raises(RemoteError, match=r"names a package of 4\.00 GB, more than the 3\.00 GB that are allowed"):
        pull(str(shared), tmp_path / "pulled", largest_bytes=3 * 10**9)
    real = os.fstatvfs

    def nearly_full(descriptor: int) -> os.statvfs_result:
        return os.statvfs_result((*real(descriptor)[:4], 1, *real(descriptor)[5:]))

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with pytest.raises(PackageError, match=r"pulled cannot be written: 4\.00 GB are to come, and .* are free"):
        pull(str(shared), tmp_path / "pulled")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "shared"]


def test_bytes_that_are_there_already_need_no_more_space(
    left: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fstatvfs
    monkeypatch.setattr(
        os, "fstatvfs", lambda one: os.statvfs_result((*real(one)[:4], 0, *real(one)[5:]))
    )
    assert pull(str(shared), tmp_path / "pulled").received_bytes == 0


def test_the_limit_is_an_option(package: Path, shared: Path, tmp_path: Path) -> None:
    push(package, str(shared))
    code, _, errors = run("pull", shared, tmp_path / "pulled", "--max-size", "10kB")
    assert code == 1 and "more than the 10 kB that are allowed: pass --max-size if that is right" in errors
    assert run("pull", shared, tmp_path / "pulled", "--max-size", "10MB")[0] == 0


# remotes that never answer

PULL = """
import sys
from klas_zoo.errors import KlasZooError
from klas_zoo.sharing.pull import pull
try:
    pull(sys.argv[1], sys.argv[2])
except KlasZooError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["pipe", "device"])
@pytest.mark.parametrize("where", ["the name", "the index", "an object"])
def test_a_pipe_or_device_in_a_folder_is_refused_at_once(
    what: str, where: str, package: Path, shared: Path, tmp_path: Path
) -> None:
    version = push(package, str(shared)).version
    replaced = {
        "the name": shared / "packages" / "made-up" / "latest.json",
        "the index": shared / "packages" / "made-up" / f"{version}.json",
        "an object": next(one for one in (shared / "objects").rglob("*") if one.is_file()),
    }[where]
    replaced.unlink()
    if what == "pipe":
        os.mkfifo(replaced)
    else:
        replaced.symlink_to("/dev/zero")
    done = subprocess.run(
        [sys.executable, "-c", PULL, str(shared), str(tmp_path / "pulled")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "it is no regular file" in done.stdout
    assert not (tmp_path / "pulled").exists()


def test_a_name_that_points_into_the_index_of_another_size_is_refused(
    package: Path, shared: Path, tmp_path: Path
) -> None:
    version = push(package, str(shared)).version
    table = json.loads((shared / "packages" / "made-up" / f"{version}.json").read_text())
    for file in table["files"]:
        if file["name"] == "weights.bin":
            file["chunks"] = file["chunks"][:1]
            file["size_bytes"] = file["chunks"][0]["size_bytes"]
    forged(shared, table["files"])
    with pytest.raises(RemoteError, match=r"holds weights\.bin in another size than its manifest says"):
        pull(str(shared), tmp_path / "pulled")

"""Folders that become packages, and what killed processes leave of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from klas_zoo.errors import PackageError
from klas_zoo.exporters.package_writing import scratch, staging

_KILLED = """
import os, signal, sys
from pathlib import Path
from klas_zoo.exporters.package_writing import staging

with staging(Path(sys.argv[1])) as folder:
    (folder / "weights.bin").write_bytes(bytes(1000))
    if len(sys.argv) > 2:
        print(folder, flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def left_by_a_killed_process(out: Path) -> Path:
    subprocess.run([sys.executable, "-c", _KILLED, out], check=False, timeout=60)
    (found,) = out.parent.iterdir()
    assert found.is_dir() and not out.exists()
    return found


def test_a_folder_is_named_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "package"
    with staging(out) as folder:
        (folder / "a").write_text("a")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["package"] and (out / "a").read_text() == "a"
    with pytest.raises(PackageError, match="is there already"), staging(out):
        pass


def test_nothing_is_left_of_one_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError), staging(tmp_path / "package") as folder:
        (folder / "a").write_text("a")
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "package[1]"
    left = left_by_a_killed_process(out)
    with staging(tmp_path / "other"):
        assert left.exists()  # of another package
    with staging(out):
        assert left.exists()  # it may be about to be locked
    out.rmdir()
    age(left)
    with staging(out):
        assert not left.exists()


def test_what_a_running_process_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "package"
    command = [sys.executable, "-c", _KILLED, out, "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        age(folder)
        with scratch(out) as own:
            age(own)
            with scratch(out):
                assert folder.exists() and own.exists()
        process.communicate("", timeout=60)
    with scratch(out):  # it was killed
        assert not folder.exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "a").write_text("a")
    age(target)
    (tmp_path / ".package.0123abcd.unfinished").symlink_to(target)
    with scratch(tmp_path / "package"):
        pass
    assert (target / "a").exists()

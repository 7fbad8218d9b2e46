"""Pushes and pulls that are cut short, killed, or run at once."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import PIECE, PUSH, at_once, content, lasting, pieces_of, quick, size

from klas_zoo.errors import RemoteError
from klas_zoo.exporters.package import Package
from klas_zoo.sharing import index as index_module
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.remote import Remote


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> None:
    """The remote fails for good once `method` was called `after` times."""
    real, calls = getattr(Remote, method), itertools.count()

    def cut(self: Remote, *arguments: Any) -> Any:
        if next(calls) >= after:
            raise Interrupted
        return real(self, *arguments)

    monkeypatch.setattr(Remote, method, cut)


@quick
@pytest.mark.parametrize("after", [0, 1, 2], ids=["the first object", "the index", "the name"])
def test_a_push_that_was_cut_short_goes_on_and_leaves_the_version_before(
    package: Path, other: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    before = push(other, url)
    assert len(set(pieces_of(package)) - set(pieces_of(other))) == 1
    with monkeypatch.context() as patch:
        interrupt(patch, "write", after)
        with pytest.raises(Interrupted):
            push(package, url)
    assert pull(url, tmp_path / "before").version == before.version
    assert content(tmp_path / "before") == content(other)
    after_all = push(package, url)
    assert pull(url, tmp_path / "after").version == after_all.version
    assert content(tmp_path / "after") == content(package)


def test_a_push_that_was_cut_short_does_not_send_again_what_is_there(
    package: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "write", 2)
        with pytest.raises(Interrupted):
            push(package, url)
    there = Remote(url)
    done = sum(
        pieces_of(package)[name] for folder in there.names("objects") for name in there.names(f"objects/{folder}")
    )
    assert done > 0
    assert push(package, url).sent_bytes == sum(pieces_of(package).values()) - done


@quick
@pytest.mark.parametrize("after", [2, 4, 7])
def test_a_pull_that_was_cut_short_goes_on_where_it_was(
    package: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    push(package, url)
    target = tmp_path / "pulled"
    with monkeypatch.context() as patch:
        interrupt(patch, "read", after)
        with pytest.raises(Interrupted):
            pull(url, target)
    assert not target.exists()
    (staging,) = tmp_path.glob(".pulled.*.part")
    had = size(staging / "package")
    pulled = pull(url, target)
    assert pulled.received_bytes == size(package) - had
    assert content(target) == content(package)
    assert not staging.exists()


def test_what_is_damaged_or_half_written_in_a_pull_that_was_cut_short_is_fetched_anew(
    package: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(package, str(shared))
    target = tmp_path / "pulled"
    with monkeypatch.context() as patch:
        patch.setattr(Package, "open", lambda folder: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            pull(str(shared), target)
    (inner,) = tmp_path.glob(".pulled.*.part/package")
    weights = inner / "weights.bin"
    damaged = bytearray(weights.read_bytes())
    damaged[PIECE + 5] ^= 1
    weights.write_bytes(damaged[:-7])
    graph = inner / "wide.onnx"
    graph.write_bytes(graph.read_bytes() + b"more than there is")
    (inner / "slim.onnx").unlink()
    pulled = pull(str(shared), target)
    assert content(target) == content(package)
    assert 0 < pulled.received_bytes < size(package)


KILLED = """
import sys
from pathlib import Path
from klas_zoo.sharing import index
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push

what, source, target, piece, after, half = sys.argv[1:]
index.CHUNK_BYTES = int(piece)
seen = 0

def on_bytes(size):
    # is killed somewhere after a piece, but never at the end: a few pieces later it waits
    global seen
    seen += 1
    if seen == int(after):
        print("now", flush=True)
    if seen == int(after) + 3:
        sys.stdin.read()

def write_half(path, content):
    with path.open("wb") as file:
        file.write(content[: len(content) // 2])
    print("now", flush=True)
    sys.stdin.read()

if half == "half":
    whole, on_bytes = Path.write_bytes, lambda size: globals().update(seen=seen + 1)
    Path.write_bytes = lambda path, content: (write_half if seen == int(after) else whole)(path, content)
{"push": push, "pull": pull}[what](source, target, on_bytes=on_bytes)
"""


def kill(what: str, source: Path | str, target: Path | str, after: int, half: bool = False) -> None:
    """Kills a push or a pull after so many pieces, or with the next one half written."""
    words = [what, str(source), str(target), str(PIECE // 4), str(after), "half" if half else "whole"]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", KILLED, *words], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout and process.stdout.readline() == b"now\n", process.communicate()
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@lasting
@pytest.mark.parametrize(("after", "half"), [(1, False), (5, False), (3, True)])
def test_a_push_that_is_killed_leaves_nothing_that_passes_for_whole_and_a_repeat_completes_it(
    after: int, half: bool, url: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half and "://" in url:
        pytest.skip("an object store has no halves: the server sees the whole object or none")
    monkeypatch.setattr(index_module, "CHUNK_BYTES", PIECE // 4)
    kill("push", package, url, after, half)
    there = objects(Remote(url))
    assert there
    assert all(hashlib.sha256(found).hexdigest() == name for name, found in there.items())
    with pytest.raises(RemoteError, match="There is no package at"):
        pull(url, tmp_path / "early")
    again = push(package, url)
    assert again.sent_bytes < again.size_bytes
    assert again.sent_bytes == sum(map(len, objects(Remote(url)).values())) - sum(map(len, there.values()))
    assert pull(url, tmp_path / "after").version == again.version
    assert content(tmp_path / "after") == content(package)


@pytest.mark.slow
def test_what_a_killed_push_left_half_written_is_removed_by_a_push_a_day_later(
    shared: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHUNK_BYTES", PIECE // 4)
    kill("push", package, shared, 3, half=True)
    (left,) = shared.rglob("*.part")
    assert left.name.startswith(".") and left.parent.parent == shared / "objects"
    push(package, str(shared))
    assert left.is_file()  # perhaps another push is at it
    for path in (shared / "packages" / "made-up" / ".latest.json.0123abcd.part", left.parent / ".notes.part"):
        path.write_text("x")
    day_ago = left.stat().st_mtime - 100_000
    for path in shared.rglob("*.part"):
        os.utime(path, (day_ago, day_ago))
    written = {path for path in shared.rglob("*") if path.is_file() and path.suffix != ".part"}
    push(package, str(shared))
    assert {path for path in shared.rglob("*") if path.is_file()} == {*written, left.parent / ".notes.part"}


@pytest.mark.slow
@lasting
@pytest.mark.parametrize("after", [1, 6])
def test_a_pull_that_is_killed_leaves_no_folder_and_a_repeat_completes_it(
    after: int, url: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHUNK_BYTES", PIECE // 4)
    pushed, target = push(package, url), tmp_path / "pulled"
    kill("pull", url, target, after)
    assert not target.exists()
    (staging,) = tmp_path.glob(".pulled.*.part")
    again = pull(url, target)
    assert again.version == pushed.version
    assert again.received_bytes < size(package)  # what had come before the kill was whole, and is kept
    assert content(target) == content(package)
    assert not staging.exists()


def objects(remote: Remote) -> dict[str, bytes]:
    """What a place holds under names that a pull would ask for, by name."""
    folders = {folder: remote.names(f"objects/{folder}") for folder in remote.names("objects")}
    paths = {name: f"objects/{folder}/{name}" for folder, names in folders.items() for name in names}
    return {name: remote.read(path, PIECE) or b"" for name, path in paths.items() if not name.startswith(".")}


@pytest.mark.slow
@lasting
def test_processes_that_push_at_once_all_succeed_and_every_version_is_whole(
    url: str, package: Path, other: Path, tmp_path: Path
) -> None:
    versions = at_once(PUSH, [[str(one), url, str(PIECE)] for one in (package, other, package, other)])
    assert len(set(versions)) == 2
    assert pull(url, tmp_path / "latest").version in versions
    for version, pushed in zip(versions[:2], (package, other), strict=True):
        pull(url, tmp_path / version, version=version)
        assert content(tmp_path / version) == content(pushed)
    assert not list((tmp_path / "shared").rglob("*.part"))


@quick
def test_whoever_pulls_while_another_pushes_gets_a_whole_version(
    package: Path, other: Path, url: str, tmp_path: Path
) -> None:
    push(package, url)
    failures: list[BaseException] = []

    def keep_pushing() -> None:
        try:
            for one in (other, package, other):
                push(one, url)
        except BaseException as error:
            failures.append(error)

    pusher = threading.Thread(target=keep_pushing)
    pusher.start()
    number = 0
    while pusher.is_alive() or number == 0:
        target = tmp_path / f"pulled{number}"
        pull(url, target)
        assert content(target) in (content(package), content(other))
        number += 1
    pusher.join()
    assert failures == []


def test_pulls_to_one_folder_at_once_all_succeed_and_fetch_once(package: Path, shared: Path, tmp_path: Path) -> None:
    push(package, str(shared))
    script = PUSH.replace("klas_zoo.sharing.push import push", "klas_zoo.sharing.pull import pull").replace(
        "push(sys.argv[1], sys.argv[2]).version", "pull(sys.argv[1], sys.argv[2]).received_bytes"
    )
    target = tmp_path / "pulled"
    received = at_once(script, [[str(shared), str(target), str(PIECE)]] * 3)
    assert sorted(map(int, received)) == [0, 0, size(package)]
    assert content(target) == content(package)
    assert not list(tmp_path.glob(".*.part"))

"""Pushing and pulling packages: folders, memory and real object stores; interruptions, damage, many at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packages
import pytest
import stores
from click.testing import CliRunner

from klas_zoo.cli import main
from klas_zoo.errors import DamagedPackage, KlasZooError, PackageError, RemoteError, UnknownName, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.sharing import index as index_module
from klas_zoo.sharing.index import MOST_INDEX_BYTES, index_of, read_index
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import latest_path, push, version_path
from klas_zoo.sharing.remote import Remote

PIECE = 40_000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK_BYTES", PIECE)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that nobody changes."""
    folder = tmp_path_factory.mktemp("made") / "package"
    packages.write_package(folder)
    return folder


@pytest.fixture
def package(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "package"))


@pytest.fixture
def other(made: Path, tmp_path: Path) -> Path:
    """Another version of the same package: one number of its manifest differs."""
    folder = Path(shutil.copytree(made, tmp_path / "other"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"]["build_id"] = 8
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[None]:
    with stores.serve("s3"):
        yield


@pytest.fixture(scope="session")
def gs() -> Iterator[None]:
    with stores.serve("gs"):
        yield


_numbers = itertools.count()


@pytest.fixture(params=["folder", "memory", *stores.STORES])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind, with nothing there yet."""
    if request.param in stores.STORES:
        request.getfixturevalue(request.param)
        return f"{request.param}://{stores.BUCKET}/test{next(_numbers)}"
    return f"memory://test{next(_numbers)}" if request.param == "memory" else str(tmp_path / "shared")


quick = pytest.mark.parametrize("url", ["folder", "memory"], indirect=True)
"""Servers take their time: what does not depend on them goes without."""
lasting = pytest.mark.parametrize("url", ["folder", *stores.STORES], indirect=True)
"""Several processes see these."""


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size(folder: Path) -> int:
    return sum(map(len, content(folder).values()))


def pieces_of(folder: Path) -> dict[str, int]:
    """Every different piece with its size."""
    cut = (data[i : i + PIECE] for data in content(folder).values() for i in range(0, len(data), PIECE))
    return {hashlib.sha256(piece).hexdigest(): len(piece) for piece in cut}


# what is pushed comes back


def test_a_package_comes_back_as_it_was(package: Path, url: str, tmp_path: Path) -> None:
    pushed = push(package, url)
    assert pushed.name == "made-up"
    assert pushed.size_bytes == size(package)
    assert pushed.sent_bytes == sum(pieces_of(package).values())
    pulled = pull(url, tmp_path / "deep" / "pulled")
    assert content(tmp_path / "deep" / "pulled") == content(package)
    assert (pulled.name, pulled.version) == ("made-up", pushed.version)
    assert pulled.size_bytes == pulled.received_bytes == size(package)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pulled"]


def test_pushing_again_sends_nothing_and_pulling_again_fetches_nothing(package: Path, url: str, tmp_path: Path) -> None:
    first = push(package, url)
    for trust_sizes in (False, True):
        again = push(package, url, trust_sizes=trust_sizes)
        assert (again.version, again.sent_bytes) == (first.version, 0)
    pull(url, tmp_path / "pulled")
    assert pull(url, tmp_path / "pulled").received_bytes == 0


@quick
def test_versions_share_what_they_have_in_common_and_can_be_named(
    package: Path, other: Path, url: str, tmp_path: Path
) -> None:
    old, new = push(package, url), push(other, url)
    assert new.version != old.version
    assert new.sent_bytes == (other / "manifest.json").stat().st_size
    assert pull(url, tmp_path / "new").version == new.version
    assert pull(url, tmp_path / "old", version=old.version[:8]).version == old.version
    assert content(tmp_path / "old") == content(package)
    assert content(tmp_path / "new") == content(other)


@quick
def test_several_names_lie_at_one_place(package: Path, other: Path, url: str, tmp_path: Path) -> None:
    push(package, url)
    push(other, url, name="made-up@prod")
    with pytest.raises(UsageError, match="holds several packages, made-up, made-up@prod: say --name"):
        pull(url, tmp_path / "pulled")
    pull(url, tmp_path / "pulled", name="made-up@prod")
    assert content(tmp_path / "pulled") == content(other)


def test_the_version_is_the_hash_of_the_index_and_objects_are_their_own(package: Path, shared: Path) -> None:
    pushed = push(package, str(shared))
    stored = content(shared)
    index = stored.pop(version_path("made-up", pushed.version))
    assert hashlib.sha256(index).hexdigest() == pushed.version
    assert json.loads(stored.pop(latest_path("made-up"))) == {"schema_version": 1, "version": pushed.version}
    assert {Path(path).name: len(data) for path, data in stored.items()} == pieces_of(package)
    assert all(hashlib.sha256(data).hexdigest() == Path(path).name for path, data in stored.items())


# interruptions


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


# damage


def corrupt(path: Path, how: str) -> None:
    data = path.read_bytes()
    changed = {
        "a flipped bit": bytes([data[0] ^ 1]) + data[1:],
        "cut short": data[:-1],
        "too long": data + b"x",
        "empty": b"",
        "huge": data + b"x" * 10_000_000,
    }
    path.unlink()
    if how != "missing":
        path.write_bytes(changed[how])


HOW = ["a flipped bit", "cut short", "too long", "empty", "huge", "missing"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_object_is_refused_and_mended_by_another_push(
    package: Path, shared: Path, tmp_path: Path, how: str
) -> None:
    pushed = push(package, str(shared))
    damaged = max((shared / "objects").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    corrupt(damaged, how)
    says = "is missing" if how == "missing" else "is not what was pushed"
    with pytest.raises(RemoteError, match=f"{damaged.name} {says}: push the package again"):
        pull(str(shared), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    assert push(package, str(shared)).version == pushed.version
    pull(str(shared), tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(package)


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_index_is_refused_and_mended_by_another_push(
    package: Path, shared: Path, tmp_path: Path, how: str
) -> None:
    pushed = push(package, str(shared))
    corrupt(shared / version_path("made-up", pushed.version), how)
    with pytest.raises(RemoteError, match="push the package again"):
        pull(str(shared), tmp_path / "pulled")
    push(package, str(shared))
    assert pull(str(shared), tmp_path / "pulled").version == pushed.version


@pytest.mark.parametrize(
    ("pointer", "says"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "was not written by klas-zoo"),
        (b'{"schema_version": true}', "was not written by klas-zoo"),
        (b'{"schema_version": 2}', "newer klas-zoo: its schema is 2, this one knows up to 1"),
        (b'{"schema_version": 1}', "names no version"),
        (b'{"schema_version": 1, "version": "../../../etc/passwd"}', "names no version"),
        (json.dumps({"schema_version": 1, "version": "0" * 64}).encode(), "is missing: push"),
    ],
)
def test_a_name_that_points_nowhere_is_refused(
    package: Path, shared: Path, tmp_path: Path, pointer: bytes, says: str
) -> None:
    push(package, str(shared))
    (shared / latest_path("made-up")).write_bytes(pointer)
    with pytest.raises(RemoteError, match=says):
        pull(str(shared), tmp_path / "pulled")


def forged(shared: Path, files: list[dict[str, Any]]) -> None:
    """Makes the name point at an index that says what somebody wants it to."""
    index = json.dumps({"schema_version": 1, "files": files}).encode()
    version = hashlib.sha256(index).hexdigest()
    (shared / version_path("made-up", version)).write_bytes(index)
    (shared / latest_path("made-up")).write_text(json.dumps({"schema_version": 1, "version": version}))


PIECES = [{"sha256": "0" * 64, "size_bytes": 5}]


@pytest.mark.parametrize(
    "file",
    [
        {"name": "../evil", "size_bytes": 5, "chunks": PIECES},
        {"name": "/etc/evil", "size_bytes": 5, "chunks": PIECES},
        {"name": "..", "size_bytes": 5, "chunks": PIECES},
        {"name": "a/b", "size_bytes": 5, "chunks": PIECES},
        {"name": "a\\b", "size_bytes": 5, "chunks": PIECES},
        {"name": "a\0b", "size_bytes": 5, "chunks": PIECES},
        {"name": "", "size_bytes": 5, "chunks": PIECES},
        {"name": 7, "size_bytes": 5, "chunks": PIECES},
        {"name": "a", "size_bytes": 6, "chunks": PIECES},
        {"name": "a", "size_bytes": 5.0, "chunks": PIECES},
        {"name": "a", "size_bytes": -5, "chunks": [{"sha256": "0" * 64, "size_bytes": -5}]},
        {"name": "a", "size_bytes": 2**60, "chunks": [{"sha256": "0" * 64, "size_bytes": 2**60}]},
        {"name": "a", "size_bytes": 5, "chunks": [{"sha256": "../../x", "size_bytes": 5}]},
        {"name": "a", "size_bytes": 5, "chunks": 5},
        {"name": "a", "size_bytes": 5},
        "a",
    ],
)
def test_an_index_that_names_what_cannot_be_is_refused(package: Path, shared: Path, tmp_path: Path, file: Any) -> None:
    push(package, str(shared))
    forged(shared, [file])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RemoteError, match="is no index of a package"):
        pull(str(shared), tmp_path / "pulled")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_names_a_file_twice_or_none_is_refused() -> None:
    file = {"name": "a", "size_bytes": 0, "chunks": []}
    for files in ([], [file, file], [file, {**file, "name": "A"}]):
        with pytest.raises(RemoteError, match="names no file, too many, or one twice"):
            read_index(json.dumps({"schema_version": 1, "files": files}).encode(), "there")


def test_an_index_gives_back_what_it_was_made_of(package: Path) -> None:
    index = index_of(package, [path.name for path in package.iterdir()])
    assert read_index(index.to_bytes(), "there") == index
    assert len(index.to_bytes()) < MOST_INDEX_BYTES
    assert index.size_bytes == size(package)


def test_files_that_the_manifest_does_not_name_are_refused(package: Path, shared: Path, tmp_path: Path) -> None:
    pushed = push(package, str(shared))
    table = json.loads((shared / version_path("made-up", pushed.version)).read_text())
    table["files"].append({**table["files"][0], "name": "sitecustomize.py"})
    forged(shared, table["files"])
    with pytest.raises(RemoteError, match="holds other files than its manifest names"):
        pull(str(shared), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_sound_copy_of_an_unsound_package_is_refused(package: Path, shared: Path, tmp_path: Path) -> None:
    push(package, str(shared))
    (package / "weights.bin").write_bytes(b"other weights")
    index = index_of(package, [path.name for path in package.iterdir()])
    for data in content(package).values():
        for piece in (data[i : i + PIECE] for i in range(0, len(data), PIECE)):
            name = hashlib.sha256(piece).hexdigest()
            (shared / "objects" / name[:2]).mkdir(exist_ok=True)
            (shared / "objects" / name[:2] / name).write_bytes(piece)
    forged(shared, json.loads(index.to_bytes())["files"])
    with pytest.raises(DamagedPackage, match=r"weights\.bin is cut short"):
        pull(str(shared), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_damaged_package_is_not_pushed(package: Path, shared: Path) -> None:
    weights = package / "weights.bin"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    with pytest.raises(DamagedPackage, match=r"weights\.bin"):
        push(package, str(shared))
    with pytest.raises(PackageError, match="is no package"):
        push(shared, str(shared))
    assert not shared.exists()


def test_what_reads_back_as_something_else_is_not_given_its_name(
    package: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Remote.write
    monkeypatch.setattr(Remote, "write", lambda self, path, data: real(self, path, data[:-1] + b"?"))
    with pytest.raises(RemoteError, match="reads back as something else than was written: push again"):
        push(package, url)
    assert Remote(url).names("packages") == []


# many at once

PUSH = """
import sys
from klas_zoo.sharing import index
from klas_zoo.sharing.push import push
index.CHUNK_BYTES = int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
print(push(sys.argv[1], sys.argv[2]).version)
"""


def at_once(script: str, arguments: list[list[str]]) -> list[str]:
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([sys.executable, "-c", script, *one], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for one in arguments
    ]
    for process in started:
        assert process.stdout and process.stdout.readline() == "ready\n", process.communicate()
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = []
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        answers.append(output.strip())
    return answers


# processes that are killed with SIGKILL

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


# what cannot be


def test_a_folder_with_something_else_in_it_is_left_alone(package: Path, shared: Path, tmp_path: Path) -> None:
    push(package, str(shared))
    target = tmp_path / "mine"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already and is not this package: name another folder"):
        pull(str(shared), target)
    assert content(target) == {"notes.txt": b"mine"}
    assert not list(tmp_path.glob(".*.part"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        pull(str(shared), tmp_path / "file")
    pull(str(shared), tmp_path / "pulled")
    (tmp_path / "pulled" / "weights.bin").write_bytes(b"")
    with pytest.raises((UsageError, DamagedPackage)):
        pull(str(shared), tmp_path / "pulled")


def test_names_and_versions_that_nobody_pushed_are_named(package: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"There is no package at .*: klas-zoo push puts one there"):
        pull(url, tmp_path / "pulled")
    version = push(package, url).version
    with pytest.raises(UnknownName, match="Unknown package 'made-app': did you mean made-up"):
        pull(url, tmp_path / "pulled", name="made-app")
    with pytest.raises(UnknownName, match=rf"Unknown version '0000': .*{version[:12]}"):
        pull(url, tmp_path / "pulled", version="0000")
    for name in ("../x", "a/b", "", "x" * 200):
        with pytest.raises(UsageError, match="is no name of a package"):
            pull(url, tmp_path / "pulled", name=name)
        with pytest.raises(UsageError, match="is no name of a package"):
            push(package, url, name=name)


@pytest.mark.parametrize(("scheme", "said"), [("s3", "The specified bucket"), ("gs", "nowhere")])
def test_a_bucket_that_is_not_there_is_one_sentence(
    scheme: str, said: str, package: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(scheme)
    with pytest.raises(RemoteError, match=rf"{scheme}://nowhere/x/objects.*cannot be written: .*{said}"):
        push(package, f"{scheme}://nowhere/x")
    with pytest.raises(RemoteError, match=f"There is no package at {scheme}://nowhere/x"):
        pull(f"{scheme}://nowhere/x", tmp_path / "pulled")


@pytest.mark.usefixtures("s3")
def test_a_server_that_is_not_there_is_one_sentence(package: Path) -> None:
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    with pytest.raises(RemoteError, match=r"cannot be read: .*127\.0\.0\.1:9.*The same command goes on"):
        push(package, "s3://zoo/x", options=options)


@pytest.mark.parametrize("module", ["s3fs", "gcsfs"])
def test_a_missing_extra_names_what_to_install(module: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"s3fs": "s3", "gcsfs": "gs"}[module]
    pytest.importorskip("fsspec", reason="needs fsspec: pip install fsspec")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, extra, raising=False)  # it remembers what it found
    with pytest.raises(RemoteError, match=rf"pip install 'klas-zoo\[{extra}\]'"):
        push(package, f"{extra}://bucket/x")


def test_a_protocol_that_nobody_speaks_is_one_sentence(package: Path) -> None:
    with pytest.raises(RemoteError, match="nonsense://x cannot be reached: Protocol not known: nonsense"):
        push(package, "nonsense://x")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(package: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o555)
    with pytest.raises(RemoteError, match="Permission denied"):
        push(package, str(tmp_path / "shared"))


def test_a_file_in_place_of_the_folder_is_one_sentence(package: Path, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RemoteError, match="cannot be"):
        push(package, str(tmp_path / "file"))
    push(package, str(shared))
    with pytest.raises(PackageError, match="cannot be written: File exists"):
        pull(str(shared), tmp_path / "file" / "pulled")


# the command line


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_commands_say_what_they_did(package: Path, shared: Path, tmp_path: Path) -> None:
    code, out, err = run("push", package, shared)
    assert (code, err) == (0, "")
    assert out.startswith("made-up ") and f"at {shared}: " in out
    code, out, _ = run("push", package, shared, "--json", "--trust-sizes", "--name", "made-up@prod")
    assert json.loads(out)["sent_bytes"] == 0
    code, out, err = run("pull", shared, tmp_path / "pulled", "--name", "made-up")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'pulled'}: made-up ")
    code, out, _ = run("pull", shared, tmp_path / "pulled", "--name", "made-up", "--json")
    assert (json.loads(out)["received_bytes"], json.loads(out)["folder"]) == (0, str(tmp_path / "pulled"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["push", "nowhere", "there"], 1, "is no package"),
        (["pull", "nowhere", "here"], 1, "There is no package at nowhere"),
        (["pull", "nowhere", "here", "--name", "a/b"], 2, "is no name of a package"),
        (["pull", "nonsense://x", "here"], 1, "Protocol not known"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert says in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_error_of_this_module_is_one_of_ours() -> None:
    assert issubclass(RemoteError, KlasZooError)

"""Damaged and forged places, and packages that are not sound."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import PIECE, content, forged, size

from klas_zoo.errors import DamagedPackage, PackageError, RemoteError
from klas_zoo.sharing import index as index_module
from klas_zoo.sharing.index import MOST_INDEX_BYTES, index_of, read_index
from klas_zoo.sharing.names import latest_path, version_path
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.remote import Remote


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
        (b"[]", "its outermost value is no object"),
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
    with pytest.raises(RemoteError, match="is not valid: "):
        pull(str(shared), tmp_path / "pulled")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_names_a_file_twice_or_none_is_refused() -> None:
    file = {"name": "a", "size_bytes": 0, "chunks": []}
    for files in ([], [file, file], [file, {**file, "name": "A"}]):
        with pytest.raises(RemoteError, match="names no file, too many, or one twice"):
            read_index(json.dumps({"schema_version": 1, "files": files}).encode(), "there")


def test_the_size_of_pieces_is_a_limit_of_what_is_written_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of what is read was once looked up when the first index was read, whatever it was by then."""
    limit = get_type_hints(index_module.Chunk, include_extras=True)
    monkeypatch.setattr(index_module, "CHUNK_BYTES", 1)
    assert get_type_hints(index_module.Chunk, include_extras=True) == limit


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
    with pytest.raises(RemoteError, match=r"weights\.bin in another size than its manifest says"):
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

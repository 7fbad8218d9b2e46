"""Places that are missing, taken, or cannot be reached."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import content

from klas_zoo.errors import DamagedPackage, PackageError, RemoteError, UsageError
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push


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
    with pytest.raises(RemoteError, match=r"cannot be read: .*127\.0\.0\.1:9.*Rerun the command"):
        push(package, "s3://zoo/x", options=options)


@pytest.mark.parametrize("module", ["s3fs", "gcsfs"])
def test_a_missing_extra_names_what_to_install(module: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"s3fs": "s3", "gcsfs": "gs"}[module]
    pytest.importorskip("fsspec", reason="needs fsspec: pip install fsspec")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, extra, raising=False)  # it remembers what it found
    with pytest.raises(RemoteError, match=rf"pip install 'klas-zoo\[{extra}\]'"):
        push(package, f"{extra}://bucket/x")


def test_an_unknown_protocol_is_one_sentence(package: Path) -> None:
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

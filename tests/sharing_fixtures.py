"""Packages, and places to push them to: folders, memory, real object stores."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import packages
import pytest
import stores
from sharing_places import PIECE, SERVED

from klas_zoo.sharing import index as index_module


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK_BYTES", PIECE)


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "package"))


@pytest.fixture
def other(whole: Path, tmp_path: Path) -> Path:
    """Another version of the same package: one number of its manifest differs."""
    folder = Path(shutil.copytree(whole, tmp_path / "other"))
    packages.edit(folder, lambda manifest: manifest["provenance"].update(build_id=8))
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


@pytest.fixture(params=["folder", "memory", *SERVED])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind, with nothing there yet."""
    if request.param in stores.STORES:
        request.getfixturevalue(request.param)
        return f"{request.param}://{stores.BUCKET}/test{next(_numbers)}"
    return f"memory://test{next(_numbers)}" if request.param == "memory" else str(tmp_path / "shared")


quick = pytest.mark.parametrize("url", ["folder", "memory"], indirect=True)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"

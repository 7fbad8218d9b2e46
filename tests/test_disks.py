"""A disk that is really full and really read-only: a small tmpfs, where one can be mounted."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import made_up
import pytest

from klas_zoo.errors import RegistryError
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import move_tag

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "klas-zoo-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs a tmpfs of its own, which only root may mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, *, but_pages: int) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * PAGE)
            except OSError:
                break
        file.truncate(max(0, file.tell() - but_pages * PAGE))
    return filler


def register(registry: Registry, work: Path) -> None:
    engines = []
    for index in range(4):
        (work / f"e{index}").write_bytes(os.urandom(30_000))
        engines.append(made_up.new_engine(work / f"e{index}", f"new{index}"))
    made_up.register(registry, made_up.build(command="x" * 20_000), engines)


@pytest.mark.parametrize("free", [0, 3, 9, 12, 16, 24, 34, 42])
def test_a_full_disk_is_called_full_and_loses_nothing(disk: Path, tmp_path: Path, free: int) -> None:
    registry = made_up.filled_registry(disk / "registry")
    move_tag(registry, "deit-micro@prod")
    before = registry.engines()
    filler = fill(disk, but_pages=free)
    with pytest.raises(RegistryError, match="Free some space; what was registered before is unchanged"):
        register(registry, tmp_path)
    assert registry.engines() == before
    assert pick("1s", registry=registry.root).engine in before
    filler.unlink()
    assert registry.engines("deit-micro@prod") == before
    assert not [one for one in check(registry) if not one.harmless]
    register(registry, tmp_path)
    assert len(registry.engines()) == 4


def test_a_build_that_does_not_fit_gives_the_space_back(disk: Path, tmp_path: Path) -> None:
    registry = made_up.filled_registry(disk / "registry")
    fill(disk, but_pages=16)
    free = shutil.disk_usage(disk).free
    with pytest.raises(RegistryError, match="No space left on device"):
        register(registry, tmp_path)
    assert check(registry) == []
    assert shutil.disk_usage(disk).free >= free - 3 * PAGE  # folders and locks stay


def test_a_read_only_disk_is_read_and_not_written(disk: Path, tmp_path: Path) -> None:
    registry = made_up.filled_registry(disk / "registry")
    before = registry.engines()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert registry.engines() == before
    assert check(registry) == []
    for attempt in (lambda: register(registry, tmp_path), lambda: move_tag(registry, "deit-micro@prod")):
        with pytest.raises(RegistryError, match="Check who may write to that folder"):
            attempt()
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert registry.engines() == before

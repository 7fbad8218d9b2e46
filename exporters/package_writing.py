"""What every package is written with: a folder that is named when complete, references, hashes. Needs no torch."""

from __future__ import annotations

import fcntl
import glob
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from klas_zoo.addresses import local_path
from klas_zoo.errors import PackageError
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.manifest import FileEntry
from klas_zoo.files import make_directory, sha256_of, sync_directory

_REFERENCE_BYTES = 2_500_000  # of images a package keeps, at least 2 and at most 16 of them
_SCRATCH = ".unfinished"
_FRESH_S = 60.0  # a folder as new may be about to be locked


def write_references(file: Path, reference: ReferenceLogits, routes: Iterable[str]) -> None:
    """Keeps the first few images and torch's logits for them."""
    images = reference.images
    count = min(len(images), 16, max(2, _REFERENCE_BYTES // (4 * math.prod(images.shape))))
    tensors = {f"logits/{name}": np.ascontiguousarray(reference.logits[name][:count]) for name in routes}
    # not save_file, which keeps the file from everybody but its owner
    file.write_bytes(save({"images": np.ascontiguousarray(images.read(0, count)), **tensors}))


def entries(folder: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file, each synced to the disk."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[path.name] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))
    return found


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the body is done, and is gone when it raises.

    Raises:
        PackageError: something stands at `out`.
    """
    out = local_path(out, "a package").absolute()
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise PackageError(f"{out} is there already and is no empty folder: name another --out.")
    make_directory(out.parent)
    with scratch(out) as folder:
        yield folder
        sync_directory(folder)
        folder.replace(out)  # an empty folder may be replaced
        sync_directory(out.parent)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards, and with it those that killed processes have left there."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * 8}{_SCRATCH}"):
        _remove_unless_in_use(left)
    folder = out.with_name(f".{out.name}.{os.urandom(4).hex()}{_SCRATCH}")
    folder.mkdir()
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # without locks folders that are left stay
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unless_in_use(folder: Path) -> None:
    with suppress(OSError):  # it is in use, or gone, or this file system has no locks
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(lock).st_mtime > _FRESH_S:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)

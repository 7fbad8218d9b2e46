"""Packages in the Hugging Face hub's cache, where every file is a link to a blob, which runtimes refuse to follow."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from klas_zoo.errors import PackageError
from klas_zoo.exporters.manifest import MANIFEST
from klas_zoo.files import make_directory
from klas_zoo.reading import is_plain_name

_MOST_BYTES = 64 * 2**20


def without_links(folder: Path) -> Path:
    """The folder itself; for a snapshot in the hub's cache, a folder in ours with copies of the same files.

    Not hard links, which onnx's checker refuses too. Links that lead anywhere but to the blobs of the same repository
    are not followed.

    Raises:
        PackageError: our cache cannot be written.
    """
    snapshot = Path(os.path.realpath(folder))
    blobs = snapshot.parent.parent / "blobs"
    if snapshot.parent.name != "snapshots" or not blobs.is_dir() or not (snapshot / MANIFEST).is_symlink():
        return folder
    manifest = _blob(snapshot / MANIFEST, blobs)
    if manifest is None or manifest.stat().st_size > _MOST_BYTES:
        return folder  # the check of its files says what is wrong
    import hashlib

    content = manifest.read_bytes()
    try:
        names = [MANIFEST, *json.loads(content)["files"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return folder
    import platformdirs

    target = platformdirs.user_cache_path("klas-zoo", appauthor=False) / "hub" / hashlib.sha256(content).hexdigest()
    if not target.is_dir():
        try:
            _fill(target, snapshot, blobs, names)
        except OSError as error:
            raise PackageError(f"{folder} holds links, and {target} cannot be written: {error.strerror}.") from error
    return target


def _fill(target: Path, snapshot: Path, blobs: Path, names: list[str]) -> None:
    make_directory(target.parent)
    staging = target.with_name(f".{target.name}.{os.urandom(8).hex()}.part")
    staging.mkdir(mode=0o700)
    try:
        for name in filter(is_plain_name, names):
            if (blob := _blob(snapshot / name, blobs)) is not None:
                shutil.copyfile(blob, staging / name)
        staging.chmod(0o755)
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _blob(link: Path, blobs: Path) -> Path | None:
    """The blob that a link in a snapshot leads to."""
    found = Path(os.path.realpath(link))
    return found if found.parent == blobs and found.is_file() else None

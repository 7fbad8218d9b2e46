"""klas-zoo with nothing but what `pip install klas-zoo` brings, in a process of its own.

A folder of links to the packages of the light installation is the whole path of modules besides the standard library:
Python is started without its site packages. So nothing that only another package brings can be imported, whatever
is installed where the tests run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from klas_zoo.doctor.checks import ONNXRUNTIMES

ROOT = Path(__file__).parent.parent


def requirements() -> list[Requirement]:
    """What klas-zoo needs without any extra, of all platforms."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


def run(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """`klas-zoo` with arguments, or Python `code` with them, in the light installation."""
    started = ["-c", code] if code is not None else ["-m", "klas_zoo"]
    environment = {**os.environ, "PYTHONPATH": _links().name, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-S", *started, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=_links().name,
    )  # fmt: skip


@cache
def _links() -> TemporaryDirectory[str]:
    held = TemporaryDirectory(prefix="klas-zoo-light-")
    folder = Path(held.name)
    (folder / "klas_zoo").mkdir()
    for source in (*(ROOT / "zoo").iterdir(), ROOT / "exporters", ROOT / "profiles"):
        (folder / "klas_zoo" / source.name).symlink_to(source)
    for package in _packages():
        for file in package.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return held


def _packages() -> Iterator[metadata.Distribution]:
    """The installed packages that the requirements bring, with those that they need in turn."""
    pending, seen = [one for one in requirements() if _applies(one)], set()
    while pending:
        name = canonicalize_name(pending.pop().name)
        if name in seen:
            continue
        seen.add(name)
        package = _installed(name)
        pending += [one for one in map(Requirement, package.requires or ()) if _applies(one)]
        yield package


def _installed(name: str) -> metadata.Distribution:
    for one in ONNXRUNTIMES if name in ONNXRUNTIMES else ():  # whichever is there
        try:
            return metadata.distribution(one)
        except metadata.PackageNotFoundError:
            continue
    return metadata.distribution(name)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})

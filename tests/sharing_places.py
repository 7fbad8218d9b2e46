"""What the tests of pushing and pulling have in common: how a package is cut, and what two folders hold."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stores
from click.testing import CliRunner

from klas_zoo.cli import main
from klas_zoo.sharing.names import latest_path, version_path

PIECE = 40_000

SERVED = [pytest.param(scheme, marks=pytest.mark.slow) for scheme in stores.STORES]
"""Stores that a server is started for."""
quick = pytest.mark.parametrize("url", ["folder", "memory"], indirect=True)
"""Servers take their time: what does not depend on them goes without."""
lasting = pytest.mark.parametrize("url", ["folder", *SERVED], indirect=True)
"""Several processes see these."""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size(folder: Path) -> int:
    return sum(map(len, content(folder).values()))


def pieces_of(folder: Path) -> dict[str, int]:
    """Every different piece with its size."""
    cut = (data[i : i + PIECE] for data in content(folder).values() for i in range(0, len(data), PIECE))
    return {hashlib.sha256(piece).hexdigest(): len(piece) for piece in cut}


def forged(shared: Path, files: list[dict[str, Any]]) -> None:
    """Makes the name point at an index that says what somebody wants it to."""
    index = json.dumps({"schema_version": 1, "files": files}).encode()
    version = hashlib.sha256(index).hexdigest()
    (shared / version_path("made-up", version)).write_bytes(index)
    (shared / latest_path("made-up")).write_text(json.dumps({"schema_version": 1, "version": version}))


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


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr

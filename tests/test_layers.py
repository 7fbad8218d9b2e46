"""Imports point down the stream only: no module knows what comes after it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"zoo": (), "exporters": ("exporters",), "profiles": ("profiles",)}
# rooms in their order: the first column of the table in docs/layout.md
STREAM = tuple(
    room.removesuffix("/")
    for row in re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "layout.md").read_text(encoding="utf-8"), re.MULTILINE)
    for room in re.findall(r"`([^`]+)`", row)
)


def test_no_module_imports_from_further_down_the_stream() -> None:
    place = {name: number for number, name in enumerate(STREAM)}
    upwards = [
        f"{path.relative_to(ROOT)} imports klas_zoo.{other}"
        for room, path in _modules()
        for other in _imported(path)
        if place[other] > place[room]
    ]
    assert upwards == []


def test_the_stream_names_every_room_and_no_other() -> None:
    assert {room for room, _ in _modules()} == set(STREAM)
    assert len(set(STREAM)) == len(STREAM)


def _modules() -> Iterator[tuple[str, Path]]:
    """The room of every module but the front door, and its file."""
    for folder, within in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*within, *path.relative_to(ROOT / folder).with_suffix("").parts)
            if parts != ("__init__",):
                yield parts[0], path


def _imported(path: Path) -> Iterator[str]:
    """Rooms that a module imports from, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("klas_zoo."))

"""Result files of benchmarks: numbers together with what they were measured on."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from klas_zoo.profiles.devices import resolve_device
from klas_zoo.versions import versions

RESULTS = Path(__file__).parent / "results"


def write_record(name: str, numbers: dict[str, Any]) -> Path:
    """Writes results/<name>.json with what it was measured on; gives its path."""
    return _write(name, {**numbers, **_measured()})


def write_part(name: str, part: str, numbers: Any) -> Path:
    """Writes one part of results/<name>.json with what it was measured on; the other parts keep theirs."""
    parts = read_parts(name) | {part: numbers}
    measured = read_record(name).get("measured", {}) | {part: _measured()}
    return _write(name, {**read_record(name), "parts": parts, "measured": measured})


def read_parts(name: str) -> dict[str, Any]:
    """The parts of results/<name>.json that were measured."""
    parts: dict[str, Any] = read_record(name).get("parts", {})
    return parts


def _measured() -> dict[str, Any]:
    # folders of this machine mean nothing elsewhere: of an absolute path only its name stays
    arguments = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    return {
        "command": ["python", Path(sys.argv[0]).name, *arguments],
        "date": datetime.date.today().isoformat(),
        "hardware": resolve_device("cpu").hardware,
        "versions": versions(),
    }


def read_record(name: str) -> dict[str, Any]:
    """results/<name>.json, empty where there is none."""
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _write(name: str, record: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path

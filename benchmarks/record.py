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
    """Writes results/<name>.json with the hardware, versions, command and date; gives its path."""
    RESULTS.mkdir(exist_ok=True)
    # folders of this machine mean nothing elsewhere: of an absolute path only its name stays
    arguments = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    record = {
        **numbers,
        "command": ["python", Path(sys.argv[0]).name, *arguments],
        "date": datetime.date.today().isoformat(),
        "hardware": resolve_device("cpu").hardware,
        "versions": versions(),
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return path

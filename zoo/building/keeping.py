"""How results of stages that are numbers are kept: as JSON. Weights: `klas_zoo.tensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from klas_zoo.building.cache import Json


def write_json(value: Json, file: Path) -> None:
    file.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))

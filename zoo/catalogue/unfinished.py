"""What an `install` that was interrupted had measured already: kept beside the registry until it is registered.

One small file for each engine, named by what it is a measurement of: the package's content, the engine and all
conditions. So nothing that was measured under other conditions is ever found, and nothing has to be cleaned up when
conditions change. Engines that are compiled here are made again: they lie in the package's temporary copy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import RegistryError
from klas_zoo.exporters.records import Verification
from klas_zoo.files import replacing
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.reading import read


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one engine, everything that takes time; `accuracy` as `NewEngine` takes it."""

    verification: Verification | None
    latencies: tuple[LatencyRecord, ...]
    accuracy: dict[str, float | int | str | None]


class Unfinished:
    """Measurements of one package in one registry.

    Args:
        digest: of the package.
        conditions: whatever decides what is measured, besides the engine.
    """

    def __init__(self, root: Path, digest: str, conditions: Mapping[str, Any]) -> None:
        self.folder = root / "installing" / digest
        self._conditions = dict(conditions)

    def find(self, engine: str) -> Measured | None:
        """What was measured of an engine; None where nothing was, or the file was cut short."""
        try:
            return read(self._file(engine).read_bytes(), Measured, str(self._file(engine)), RegistryError)
        except (OSError, RegistryError):
            return None

    def keep(self, engine: str, measured: Measured) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._file(engine)) as temporary:
            temporary.write_text(json.dumps(asdict(measured), sort_keys=True), encoding="utf-8")

    def forget(self) -> None:
        """All of the package is registered."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, engine: str) -> Path:
        key = json.dumps([engine, self._conditions], sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

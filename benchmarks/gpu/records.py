"""Rows of numbers that outlive the process: written one by one, skipped when a stage runs again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from klas_zoo.errors import CannotRunHere


class Rows:
    """`DIR/NAME.json`: a table of rows by key.

    Args:
        measured: false on the fake driver, whose numbers mean nothing: they are replaced by "not measured".
        deadline: of `time.monotonic`, after which nothing new is started.
        only: rows whose key has this in it.

    Attributes:
        incomplete: a row could not be made, or there was no time for it.
    """

    def __init__(
        self, folder: Path, name: str, *, measured: bool = True, deadline: float | None = None, only: str = ""
    ) -> None:
        self.path, self.measured, self.deadline, self.only = folder / f"{name}.json", measured, deadline, only
        self.incomplete = False
        self.rows: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def do(self, key: str, work: Callable[[], Mapping[str, Any]]) -> None:
        """Adds what `work` gives, the reason why this machine cannot do it, or the error it ends with.

        A row that is there is not made again, but for one that ended with an error.
        """
        if self.only not in key or "error" not in self.rows.get(key, {"error": ""}):
            return
        if self.deadline is not None and time.monotonic() > self.deadline:
            print(f"{key}: left out, no time is left", flush=True)
            self.incomplete = True
            return
        started = time.perf_counter()
        try:
            found = dict(work())
        except CannotRunHere as error:
            found = {"refused": str(error)}
        except Exception as error:  # one row more or less must not end the visit
            lines = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {lines[0][:600]}"}
            self.incomplete = True
        if not self.measured:
            found = hidden(found)
        found["seconds"] = round(time.perf_counter() - started, 2)
        self.add(key, found)

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        self.rows[key] = dict(row)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, self.path)
        print(f"{self.path.stem} {key}: {json.dumps(row)[:400]}", flush=True)


def hidden(value: Any) -> Any:
    """The same without numbers that were measured: floats become `not measured`, counts stay."""
    if isinstance(value, dict):
        return {key: hidden(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hidden(one) for one in value]
    return "not measured" if isinstance(value, float) else value

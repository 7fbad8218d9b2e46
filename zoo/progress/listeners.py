"""Listeners to the progress of a build besides the console: JSON lines, TensorBoard, several at once, or none."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from klas_zoo.errors import UsageError

Advance = Callable[[int, str], None]


class Listener(Protocol):
    """Receives reports of progress. `stage` gives a function that takes work done and a remark."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...
    def say(self, sentence: str) -> None: ...
    def cached(self, name: str, seconds: float) -> None: ...
    def scalars(self, step: int, values: dict[str, float]) -> None: ...


class NullListener:
    """Reports nothing: for the processes of a team that are not the main one."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        yield lambda work, remark: None

    def say(self, sentence: str) -> None: ...
    def cached(self, name: str, seconds: float) -> None: ...
    def scalars(self, step: int, values: dict[str, float]) -> None: ...


class MultiListener:
    """Passes everything on to each of them."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        with ExitStack() as stack:
            advances = [stack.enter_context(one.stage(name, total, unit)) for one in self._listeners]

            def advance(work: int, remark: str) -> None:
                for one in advances:
                    one(work, remark)

            yield advance

    def say(self, sentence: str) -> None:
        for one in self._listeners:
            one.say(sentence)

    def cached(self, name: str, seconds: float) -> None:
        for one in self._listeners:
            one.cached(name, seconds)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for one in self._listeners:
            one.scalars(step, values)


class JsonLog:
    """One JSON object a line: `time` (ISO 8601, UTC), `event`, and what belongs to the event.

        started, finished, failed    a pass: `stage`; `total` and `unit`, or `seconds` and `done`
        progress                     at most one a second: `stage`, `done`, `total`, `remark`
        kept                         a stage whose result was there: `stage`, and the `seconds` it took then
        scalars                      at most one a second: `step` and numbers of tuning
        said                         a `sentence` for people
    """

    def __init__(
        self, write: Callable[[str], object], *, every_s: float = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._every_s, self._clock = write, every_s, clock
        self._last: dict[str, float] = {}

    @classmethod
    def to(cls, place: str) -> JsonLog:
        """Appends to a file; `-` is stderr.

        Raises:
            UsageError: the file cannot be written.
        """
        if place == "-":
            return cls(sys.stderr.write)
        file = Path(place)

        def append(line: str) -> None:
            with file.open("a", encoding="utf-8") as log:
                log.write(line)

        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            append("")
        except OSError as error:
            raise UsageError(f"--log-json {place} cannot be written: {error.strerror}.") from error
        return cls(append)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        done, began = 0, self._clock()
        self._tell("started", stage=name, total=total, unit=unit)

        def advance(work: int, remark: str) -> None:
            nonlocal done
            done += work
            if self._due(name):
                self._tell("progress", stage=name, done=done, total=total, remark=remark)

        try:
            yield advance
        except BaseException as error:
            self._tell("failed", stage=name, done=done, seconds=self._since(began), error=str(error))
            raise
        self._tell("finished", stage=name, done=done, seconds=self._since(began))

    def say(self, sentence: str) -> None:
        self._tell("said", sentence=sentence)

    def cached(self, name: str, seconds: float) -> None:
        self._tell("cached", stage=name, seconds=seconds)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._due("scalars"):
            self._tell("scalars", step=step, **values)

    def _tell(self, event: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write(json.dumps({"time": now, "event": event, **facts}) + "\n")

    def _due(self, what: str) -> bool:
        now = self._clock()
        if now - self._last.get(what, -self._every_s) < self._every_s:
            return False
        self._last[what] = now
        return True

    def _since(self, began: float) -> float:
        return round(self._clock() - began, 3)


class TensorBoard(NullListener):
    """Scalars of tuning as TensorBoard reads them.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError("--tensorboard needs TensorBoard: pip install 'klas-zoo[tensorboard]'.") from error
        self._writer = SummaryWriter(str(folder))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"tune/{name}", value, step)

"""How the stages of a build are done: taken from the cache where they were done before, else run and cached.

A stage says what determines its result; its key is a hash of that and of the keys of the results
it is made from. So a changed setting redoes what depends on it, and nothing else. A cached result is used where its
files are those that were written, and where the results it was made from are those that are there now: a stage that
was done again and gave something else redoes what depends on it too.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from klas_zoo.building.cache import Cache, Json, content_key
from klas_zoo.errors import KlasZooError, UnknownName
from klas_zoo.processes.randomness import mixed, seed_everything
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.progress.listeners import Advance, Listener

T = TypeVar("T")
class NotDone(Exception):
    """A result that is asked for in a dry run and is not there."""


class Outcome(Generic[T]):
    """What a stage gave. The value is loaded when it is first asked for.

    Raises:
        NotDone: it is not known yet; only in a dry run.
    """

    def __init__(
        self, key: str | None, load: Callable[[], T], folder: Path | None = None, digest: str | None = None
    ) -> None:
        self._key, self._load, self._folder, self._digest = key, load, folder, digest

    @property
    def key(self) -> str:
        """Of everything that determines the value."""
        if self._key is None:
            raise NotDone
        return self._key

    @property
    def digest(self) -> str:
        """Of the value itself: another run of the same stage may give another one, as where latencies are measured."""
        if self._digest is None:
            raise NotDone
        return self._digest

    @property
    def folder(self) -> Path:
        """Where the result is kept."""
        if self._folder is None:
            raise NotDone
        return self._folder

    @cached_property
    def value(self) -> T:
        return self._load()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage is given when it runs.

    Attributes:
        folder: becomes the result's folder; what the stage writes here is kept.
        unfinished: a folder that survives an interruption; the stage makes it when it needs it.
        watch: announces and times one pass over something: name, total and unit.
        notes: what the stage writes here is kept with its timings.
    """

    folder: Path
    unfinished: Path
    watch: Callable[[str, int, str], AbstractContextManager[Advance]]
    listener: Listener
    team: Team
    notes: dict[str, Any] = field(default_factory=dict)


class Stage(ABC, Generic[T]):
    """One named step of a build.

    Attributes:
        version: raised whenever the code gives something else for the same inputs.
        together: every process of a team runs it; else the first does and the others wait.
        instant: takes no time, so it is run even in a dry run and its result is not kept.
    """

    name: str
    version = 1
    together = False
    instant = False

    @abstractmethod
    def inputs(self) -> Json:
        """Everything that determines the result, as JSON: settings, hashes, keys of other results."""

    @abstractmethod
    def run(self, work: Work) -> T: ...

    def save(self, result: T, folder: Path) -> None:
        raise NotImplementedError(f"{self.name} is instant")

    def load(self, folder: Path) -> T:
        raise NotImplementedError(f"{self.name} is instant")

    def identity(self, result: T, key: str) -> str:
        """What stages that depend on the result take into their keys."""
        return key

    def holds(self, folder: Path) -> bool:
        """Whether a kept result is still worth something."""
        return True

    def made_from(self) -> list[str]:
        """The digests of the results that the stage reads: of all outcomes it holds."""
        held = (one for value in vars(self).values() for one in (value if isinstance(value, tuple) else (value,)))
        return [one.digest for one in held if isinstance(one, Outcome)]

    @property
    def key(self) -> str:
        return content_key({"stage": self.name, "version": self.version, **self.inputs()})


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What became of a stage; `seconds` and `passes` are those of the run that made the result.

    `status` in a dry run: `cached`, `resumes` (was interrupted) or `to do`; else `cached` or `done`.
    """

    name: str
    key: str | None
    status: Literal["cached", "resumes", "to do", "done"]
    seconds: float = 0.0
    passes: dict[str, float] = field(default_factory=dict)
    facts: Json = field(default_factory=dict)


class Runner:
    """Does stages one after the other.

    Args:
        dry: only says what would be done.
        redo: the name of a stage; what was kept of it and of all stages after it is thrown away.
    """

    def __init__(
        self,
        cache: Cache,
        listener: Listener,
        *,
        team: Team = ALONE,
        dry: bool = False,
        redo: str | None = None,
        meter: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.cache, self.listener, self.team, self.dry = cache, listener, team, dry
        self.records: list[StageRecord] = []
        self._redo, self._redoing, self._meter = redo, False, meter

    def do(self, stage: Stage[T]) -> Outcome[T]:
        """The stage's result: kept, or else made now; in a dry run perhaps not there."""
        self._redoing = self._redoing or stage.name == self._redo
        if stage.instant:
            return self._at_once(stage)
        if self.dry:
            return self._foresee(stage)
        key = stage.key
        folder = self.cache.folder(stage.name, key)
        with self._alone(stage, key):
            if self._redoing and self.team.is_main:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(self.cache.unfinished(stage.name, key), ignore_errors=True)
            facts = self.team.broadcast(self._facts(stage, key) if self.team.is_main else None)
            if facts is None:
                return self._run(stage, key)
        if self.team.is_main:
            self.cache.used(stage.name, key)
        self.listener.cached(stage.name, facts["seconds"])
        self._note(stage, key, "cached", facts)
        return Outcome(key, lambda: stage.load(folder), folder, facts["result"])

    def finish(self) -> None:
        """Checks that what was to be redone is there at all.

        Raises:
            UnknownName: no stage of this build has that name.
        """
        if self._redo is not None and not self._redoing:
            raise UnknownName("stage", self._redo, [one.name for one in self.records])

    def _at_once(self, stage: Stage[T]) -> Outcome[T]:
        try:
            key = stage.key
            value = stage.run(self._work(stage, key, {}))
        except NotDone:
            return Outcome(None, _not_done)
        identity = stage.identity(value, key)
        return Outcome(identity, lambda: value, digest=identity)

    def _foresee(self, stage: Stage[T]) -> Outcome[T]:
        try:
            key = stage.key
        except NotDone:
            self.records.append(StageRecord(name=stage.name, key=None, status="to do"))
            return Outcome(None, _not_done)
        try:
            facts = None if self._redoing else self._facts(stage, key)
        except NotDone:  # what it is made from is made anew, and may be something else then
            facts = None
        if facts is None:
            started = self.cache.unfinished(stage.name, key).exists() and not self._redoing
            self.records.append(StageRecord(name=stage.name, key=key, status="resumes" if started else "to do"))
            return Outcome(key, _not_done)
        self._note(stage, key, "cached", facts)
        folder = self.cache.folder(stage.name, key)
        return Outcome(key, lambda: stage.load(folder), folder, facts["result"])

    def _run(self, stage: Stage[T], key: str) -> Outcome[T]:
        passes: dict[str, float] = {}
        notes: dict[str, Any] = {}
        started, began, energy = time.perf_counter(), _now(), self._meter()

        def facts() -> Json:
            used = self._meter()
            return {
                "inputs": stage.inputs(),
                "made_from": stage.made_from(),
                "started_at": began,
                "finished_at": _now(),
                "seconds": round(time.perf_counter() - started, 3),
                "passes": passes,
                "energy_joules": None if used is None or energy is None else round(used - energy, 1),
                **notes,
            }

        # whatever ran before or was kept instead, a stage draws the same numbers
        seed_everything(mixed(int(key[:8], 16), self.team.rank))
        folder = self.cache.folder(stage.name, key)
        value: list[T] = []
        if self.team.is_main:
            with self.cache.storing(stage.name, key, facts) as place:
                value.append(stage.run(replace(self._work(stage, key, passes), folder=place, notes=notes)))
                stage.save(value[0], place)
        elif stage.together:
            value.append(stage.run(self._work(stage, key, passes)))
        self.team.barrier()
        noted = self.cache.facts(stage.name, key)
        if noted is None:
            raise KlasZooError(f"{folder} is not there: all machines of a build must see the registry's folder.")
        self._note(stage, key, "done", noted)
        return Outcome(key, lambda: value[0] if value else stage.load(folder), folder, noted["result"])

    def _work(self, stage: Stage[T], key: str, passes: dict[str, float]) -> Work:
        @contextmanager
        def watch(name: str, total: int, unit: str) -> Iterator[Advance]:
            before = time.perf_counter()
            with self.listener.stage(name, total, unit) as advance:
                yield advance
            passes[name] = round(time.perf_counter() - before, 3)

        unfinished = self.cache.unfinished(stage.name, key)
        return Work(folder=unfinished, unfinished=unfinished, watch=watch, listener=self.listener, team=self.team)

    def _facts(self, stage: Stage[T], key: str) -> dict[str, Any] | None:
        facts = self.cache.facts(stage.name, key)
        if facts is None or facts["made_from"] != stage.made_from():
            return None
        if damaged := self.cache.damage(stage.name, key):
            self.listener.say(f"The cached result of '{stage.name}' is damaged ({damaged}): it is made again.")
            return None
        return facts if stage.holds(self.cache.folder(stage.name, key)) else None

    def _alone(self, stage: Stage[T], key: str) -> AbstractContextManager[None]:
        if not self.team.is_main:
            return _nothing()
        waiting = f"Another process is at '{stage.name}' of the same build; waiting for it."
        return self.cache.working(stage.name, key, lambda: self.listener.say(waiting))

    def _note(self, stage: Stage[T], key: str, status: Literal["cached", "done"], facts: Json) -> None:
        self.records.append(
            StageRecord(
                name=stage.name, key=key, status=status, seconds=facts["seconds"], passes=facts["passes"], facts=facts
            )
        )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _not_done() -> Any:
    raise NotDone


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

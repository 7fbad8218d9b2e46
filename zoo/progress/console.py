"""A build's stages on stderr: a live bar in a terminal; lines now and then in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from klas_zoo.units import printable


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "")


class ConsoleListener:
    """Shows the stages of a build; implements klas_zoo.progress.listeners.Listener.

    Args:
        every_s: seconds between two lines of a stage that takes long, where there is no terminal.
    """

    def __init__(
        self, console: Console, *, every_s: float = 30, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console, self._every_s, self._clock = console, every_s, clock

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        live = self._console.is_terminal
        started = shown = self._clock()
        bar = Progress(
            TextColumn("{task.description:17}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}"),
            _Speed(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}", markup=False),
            console=self._console,
            transient=True,
            disable=not live,
        )
        done, skipped, last = 0, 0, ""
        with bar:
            task = bar.add_task(name, total=total, unit=unit, remark="")

            def advance(work: int, remark: str) -> None:
                nonlocal done, skipped, last, shown
                skipped += work if remark == "skipped" else 0
                done, last = done + work, remark or last
                if live:
                    bar.update(task, advance=work, remark=printable(remark))
                elif (now := self._clock()) - shown >= self._every_s:
                    shown = now
                    self.say(_line(name, done, total, unit, (now - started) / max(1, done - skipped), last))

            yield advance
        seconds = self._clock() - started
        speed = f", {(done - skipped) / seconds:,.0f} {unit}/s" if unit == "images" and done > skipped else ""
        self.say(f"{name:17} {seconds:6.1f} s{speed}{', ' + last if last.startswith('loss') else ''}")

    def say(self, sentence: str) -> None:
        self._console.print(printable(sentence), highlight=False, markup=False, soft_wrap=True)

    def cached(self, name: str, seconds: float) -> None:
        self.say(f"{name:17} cached (originally {seconds:.1f} s)")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """The bar's remark shows the loss."""


def _line(name: str, done: int, total: int, unit: str, seconds_each: float, remark: str) -> str:
    left = max(0, total - done) * seconds_each
    amount = f"{left / 3600:.1f} h" if left >= 3600 else f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    more = f", {remark}" if remark else ""
    return f"{name:17} {done:,}/{total:,} {unit}, {done / max(1, total):.0%}, {amount} left{more}"

"""A build's stages on stderr: a live bar in a terminal, one line a stage anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "")


class ConsoleListener:
    """Shows the stages of a build; implements klas_zoo.pipeline.Listener."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        started = time.perf_counter()
        bar = Progress(
            TextColumn("{task.description:17}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,}/{task.total:,} {task.fields[unit]}"),
            _Speed(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        done, last = 0, ""
        with bar:
            task = bar.add_task(name, total=total, unit=unit, remark="")

            def advance(work: int, remark: str) -> None:
                nonlocal done, last
                done, last = done + work, remark or last
                bar.update(task, advance=work, remark=remark)

            yield advance
        seconds = time.perf_counter() - started
        speed = f", {done / seconds:,.0f} {unit}/s" if unit == "images" and done else ""
        self.say(f"{name:17} {seconds:6.1f} s{speed}{', ' + last if last.startswith('loss') else ''}")

    def say(self, sentence: str) -> None:
        self._console.print(sentence, highlight=False, soft_wrap=True)

    def kept(self, name: str, seconds: float) -> None:
        self.say(f"{name:17} kept, took {seconds:.1f} s")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Shown in the bar's remark."""

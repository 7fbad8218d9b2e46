"""Stages: done once, redone where something they depend on changed, foretold by a dry run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klas_zoo.building.cache import Cache, Json
from klas_zoo.building.pipeline import Outcome, Runner, Stage, Work
from klas_zoo.errors import UnknownName
from klas_zoo.progress.listeners import NullListener


class Sum(Stage[int]):
    """The sum of a number and of other results."""

    def __init__(self, name: str, number: int, *others: Outcome[int], log: list[str]) -> None:
        self.name, self.number, self.others, self.log = name, number, others, log

    def inputs(self) -> Json:
        return {"number": self.number, "others": [one.key for one in self.others]}

    def run(self, work: Work) -> int:
        self.log.append(self.name)
        with work.watch(self.name, 1, "sums") as advance:
            advance(1, "")
        return self.number + sum(one.value for one in self.others)

    def save(self, result: int, folder: Path) -> None:
        (folder / "sum.json").write_text(json.dumps(result))

    def load(self, folder: Path) -> int:
        return int(json.loads((folder / "sum.json").read_text()))


class Parity(Stage[int]):
    """Takes no time; those after it depend on its result alone."""

    name = "parity"
    instant = True

    def __init__(self, of: Outcome[int]) -> None:
        self.of = of

    def inputs(self) -> Json:
        return {}

    def run(self, work: Work) -> int:
        return self.of.value % 2

    def identity(self, result: int, key: str) -> str:
        return str(result)


def line(root: Path, first: int = 1, second: int = 2, third: int = 3, **options: Any) -> tuple[Runner, list[str], Any]:
    """first → parity → third, and second ← first."""
    log: list[str] = []
    runner = Runner(Cache(root), NullListener(), **options)
    one = runner.do(Sum("first", first, log=log))
    two = runner.do(Sum("second", second, one, log=log))
    three = runner.do(Sum("third", third, runner.do(Parity(one)), log=log))
    runner.finish()
    return runner, log, (one, two, three)


def statuses(runner: Runner) -> dict[str, str]:
    return {one.name: one.status for one in runner.records}


def test_every_stage_is_done_once(tmp_path: Path) -> None:
    runner, log, found = line(tmp_path)
    assert log == ["first", "second", "third"]
    assert [one.value for one in found] == [1, 3, 4]
    assert set(statuses(runner).values()) == {"done"}
    again, log, kept = line(tmp_path)
    assert log == []
    assert [one.value for one in kept] == [1, 3, 4]
    assert statuses(again) == dict.fromkeys(("first", "second", "third"), "cached")
    assert [one.seconds for one in again.records] == [one.seconds for one in runner.records]


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"first": 2}, ["first", "second", "third"]),
        ({"first": 3}, ["first", "second"]),  # third depends on its parity only
        ({"second": 7}, ["second"]),
        ({"third": 7}, ["third"]),
    ],
)
def test_a_changed_setting_redoes_only_what_depends_on_it(
    change: dict[str, int], redone: list[str], tmp_path: Path
) -> None:
    line(tmp_path)
    foretold, log, _ = line(tmp_path, **change, dry=True)
    assert log == []
    known = {name for name, status in statuses(foretold).items() if status == "to do"}
    # what a dry run cannot know it says has to be done
    assert known >= set(redone)
    _, log, _ = line(tmp_path, **change)
    assert log == redone
    foretold, _, _ = line(tmp_path, **change, dry=True)
    assert set(statuses(foretold).values()) == {"cached"}
    # and what was there before is still there
    assert line(tmp_path)[1] == []


def test_a_dry_run_changes_nothing_and_tells_what_was_interrupted(tmp_path: Path) -> None:
    runner, _, _ = line(tmp_path, dry=True)
    assert statuses(runner) == dict.fromkeys(("first", "second", "third"), "to do")
    assert [one.key is None for one in runner.records] == [False, False, True]
    assert list(tmp_path.iterdir()) == []
    key = runner.records[0].key
    assert key
    Cache(tmp_path).unfinished("first", key).mkdir(parents=True)
    assert statuses(line(tmp_path, dry=True)[0])["first"] == "resumes"


def test_a_damaged_result_is_made_again_and_what_was_made_from_the_same_stays(tmp_path: Path) -> None:
    line(tmp_path)
    (file,) = (tmp_path / "first").glob("*/sum.json")
    file.write_text("5")
    _, log, found = line(tmp_path)
    assert log == ["first"]
    assert [one.value for one in found] == [1, 3, 4]


def test_a_stage_that_gives_something_else_the_second_time_redoes_what_was_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line(tmp_path)
    (file,) = (tmp_path / "first").glob("*/sum.json")
    file.write_text("damaged")
    monkeypatch.setattr(Sum, "run", lambda stage, work: stage.log.append(stage.name) or 11)
    _, log, found = line(tmp_path)
    assert log == ["first", "second"]  # third was made from its parity
    assert [one.value for one in found] == [11, 11, 4]


def test_redo_throws_away_a_stage_and_those_after_it(tmp_path: Path) -> None:
    line(tmp_path)
    assert statuses(line(tmp_path, redo="second", dry=True)[0]) == {
        "first": "cached", "second": "to do", "third": "to do"
    }  # fmt: skip
    assert line(tmp_path, redo="second")[1] == ["second", "third"]
    assert line(tmp_path)[1] == []


def test_redoing_a_stage_nobody_knows_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean third"):
        line(tmp_path, redo="thirt", dry=True)


def test_a_stage_that_fails_is_done_again_and_those_before_it_are_kept(tmp_path: Path) -> None:
    class Broken(Sum):
        def run(self, work: Work) -> int:
            super().run(work)
            raise ZeroDivisionError

    log: list[str] = []
    for times in (1, 2):
        runner = Runner(Cache(tmp_path), NullListener())
        one = runner.do(Sum("first", 1, log=log))
        with pytest.raises(ZeroDivisionError):
            runner.do(Broken("broken", 1, one, log=log))
        assert log == ["first"] + times * ["broken"]


class Draws(Sum):
    def run(self, work: Work) -> int:
        super().run(work)
        return int(1e6 * (random.random() + np.random.rand() + torch.rand(()).item()))


def test_a_stage_draws_the_same_numbers_whatever_ran_before(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((1, 2, 3)):
        torch.manual_seed(seed)
        runner = Runner(Cache(tmp_path / str(number)), NullListener())
        if seed == 2:
            runner.do(Draws("before", 1, log=[]))
        found.append(runner.do(Draws("drawing", 1, log=[])).value)
    assert len(set(found)) == 1


def test_passes_and_notes_are_kept_with_the_result(tmp_path: Path) -> None:
    class Noting(Sum):
        def run(self, work: Work) -> int:
            work.notes["checkpoints"] = {"count": 3}
            return super().run(work)

    joules = iter((10.0, 12.5))
    for meter in (lambda: next(joules), lambda: None):
        runner = Runner(Cache(tmp_path), NullListener(), meter=meter)
        runner.do(Noting("noting", 1, log=[]))
        (record,) = runner.records
        assert record.facts["checkpoints"] == {"count": 3}
        assert record.facts["energy_joules"] == 2.5
        assert record.facts["inputs"] == {"number": 1, "others": []}
        assert list(record.passes) == ["noting"]

"""Who listens to a build: what they write survives redirection, and machines can read it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from klas_zoo.errors import UsageError
from klas_zoo.progress.console import ConsoleListener
from klas_zoo.progress.listeners import JsonLog, MultiListener, NullListener, TensorBoard


def tell(listener: NullListener | ConsoleListener | JsonLog | MultiListener) -> None:
    listener.say("Two of [3] buckets are empty.")
    listener.cached("probes", 12.34)
    with listener.stage("tune", 4, "images") as advance:
        for step in range(1, 5):
            advance(1, f"loss {1 / step:.3f}")
            listener.scalars(step, {"loss": 1 / step})


def test_a_file_gets_whole_lines_now_and_then_and_no_control_characters() -> None:
    stream, now = io.StringIO(), iter(range(0, 1000, 20))
    tell(ConsoleListener(Console(file=stream, force_terminal=False), every_s=30, clock=lambda: next(now)))
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert text.splitlines() == [
        "Two of [3] buckets are empty.",
        "probes            cached (originally 12.3 s)",
        "tune              2/4 images, 50%, 40 s left, loss 0.500",
        "tune              4/4 images, 100%, 0 s left, loss 0.250",
        "tune               100.0 s, 0 images/s, loss 0.250",
    ]


def test_what_was_skipped_does_not_count_as_fast() -> None:
    stream, now = io.StringIO(), iter((0.0, 31.0, 62.0, 62.0))
    listener = ConsoleListener(Console(file=stream, force_terminal=False), clock=lambda: next(now))
    with listener.stage("tune", 100, "images") as advance:
        advance(90, "skipped")
        advance(5, "")
    assert stream.getvalue().splitlines()[1].endswith("95/100 images, 95%, 62 s left, skipped")


def test_every_line_of_the_log_is_one_object_with_its_time() -> None:
    stream, now = io.StringIO(), iter(range(100))
    tell(JsonLog(stream.write, every_s=2, clock=lambda: next(now)))
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(one.pop("time").endswith("+00:00") for one in found)
    assert found[:3] == [
        {"event": "said", "sentence": "Two of [3] buckets are empty."},
        {"event": "cached", "stage": "probes", "seconds": 12.34},
        {"event": "started", "stage": "tune", "total": 4, "unit": "images"},
    ]
    assert found[3] == {"event": "progress", "stage": "tune", "done": 1, "total": 4, "remark": "loss 1.000"}
    assert {one["event"] for one in found[4:-1]} == {"progress", "scalars"}
    assert found[-1] == {"event": "finished", "stage": "tune", "done": 4, "seconds": 9}


def test_the_log_tells_of_a_stage_that_failed(tmp_path: Path) -> None:
    log = JsonLog.to(str(tmp_path / "new" / "log.json"))
    with pytest.raises(ZeroDivisionError), log.stage("tune", 4, "images"):
        _ = 1 / 0
    # a second process goes on in the same file
    JsonLog.to(str(tmp_path / "new" / "log.json")).say("Going on.")
    events = [json.loads(line) for line in (tmp_path / "new" / "log.json").read_text().splitlines()]
    assert [one["event"] for one in events] == ["started", "failed", "said"]
    assert events[1]["error"] == "division by zero"


def test_a_log_that_cannot_be_written_is_said_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--log-json .*log cannot be written: "):
        JsonLog.to(str(tmp_path / "file" / "log"))


def test_several_are_told_everything_and_nobody_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    streams = [io.StringIO(), io.StringIO()]
    tell(MultiListener(*(JsonLog(stream.write, every_s=1e9, clock=lambda: 0.0) for stream in streams)))
    events = [[json.loads(line)["event"] for line in stream.getvalue().splitlines()] for stream in streams]
    assert events[0] == events[1] == ["said", "cached", "started", "progress", "scalars", "finished"]
    tell(NullListener())
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_the_scalars_of_tuning(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for step in (1, 2):
        board.scalars(step, {"loss": 1 / step})
    board._writer.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("tune/loss")
    assert [(one.step, one.value) for one in found] == [(1, 1.0), (2, 0.5)]


def test_a_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'klas-zoo\[tensorboard\]'"):
        TensorBoard(tmp_path)

"""docs/python.md and `klas_zoo.build`: in Python what the command does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from toys import three_chains, write_images

import klas_zoo
from klas_zoo.api import _complete
from klas_zoo.cli.build import build as command
from klas_zoo.errors import DataError, FamilyError, UnknownName, UsageError

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


@pytest.mark.slow
def test_the_example_of_the_page_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    write_images(tmp_path / "photos" / "train", ("ant", "bee", "cat"), 16, size=(40, 36), seed=1)
    write_images(tmp_path / "photos" / "val", ("ant", "bee", "cat"), 4, size=(40, 36), seed=2)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["small", "large"]
    assert lines[-1] == "(1, 3)"
    assert next((tmp_path / "registry" / "reports").glob("*-mine-cpu/report.json")).is_file()


def test_options_are_the_commands_with_its_defaults() -> None:
    found = _complete({"tune_steps": 3, "pairs": [("tiny", "base")], "latency_batches": 4})
    assert (found["tune_steps"], found["pairs"], found["latency_batches"]) == (3, ("tiny:base",), (4,))
    assert (found["init_images"], found["batch"], found["tolerance"], found["skip_damaged"]) == (None, 100, 0.05, 0)
    assert found.keys() >= {str(one.name) for one in command.params} - {"family", "as_json", "nproc", "max_restarts"}


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"tune_step": 3}, UnknownName, "Unknown option 'tune_step': did you mean tune_steps"),
        ({"nproc": 2}, UnknownName, "Unknown option 'nproc'"),
        ({"tune_steps": -1}, UsageError, r"tune_steps=-1 is not valid: "),
        ({"warmup": float("nan")}, UsageError, r"warmup=nan is not valid: .*not a number"),
        ({"seed": 2**64}, UsageError, r"seed=18446744073709551616 is not valid: "),
        ({"preset": "slow"}, UsageError, r"preset='slow' is not valid: "),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(options: dict[str, Any], kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        _complete(options)
    assert "\n" not in str(caught.value)


def test_a_family_of_one_chain_and_paths_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    one = klas_zoo.Family.of("one", {"tiny": three_chains()["tiny"]}, config)
    with pytest.raises(FamilyError, match=r"The family one cannot be built: a family needs two anchors or more"):
        klas_zoo.build(one, data=str(tmp_path), registry=str(tmp_path / "r"))
    three = klas_zoo.Family.of("three", three_chains(), config)
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        klas_zoo.build(three, data=str(tmp_path / "nowhere"), registry=str(tmp_path / "r"), device="cpu")

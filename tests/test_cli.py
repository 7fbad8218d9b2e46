"""The command line: what it documents, what it answers to bad input, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import made_up
import pytest
from click.testing import CliRunner
from made_up import filled_registry

from klas_zoo.cli import main
from klas_zoo.cli.options import selection_settings
from klas_zoo.families.specs import builtin_families
from klas_zoo.hardware import describe_cpu


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a bug keeps its traceback."""
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_and_option_is_documented(name: str) -> None:
    command = main.commands[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Argument):
            assert option.human_readable_name.upper() in command.help
            continue
        assert isinstance(option, click.Option)
        assert option.help, f"{name} {option.name}"


def test_python_m_klas_zoo_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klas_zoo", "families"], check=True, capture_output=True, text=True
    )
    assert "deit-micro" in done.stdout


def test_families_are_shown_for_people_and_machines() -> None:
    code, out, _ = run("families")
    assert code == 0
    assert "tiny (deit_micro_tiny) < small (deit_micro_small) < base (deit_micro_base)" in out
    code, out, _ = run("families", "--json")
    assert [one["family"] for one in json.loads(out)] == sorted(builtin_families())


@pytest.mark.parametrize("selector", ["snnet", "all"])
def test_routes_are_listed_without_data(selector: str, tmp_path: Path) -> None:
    code, out, _ = run("routes", "--family", "deit-micro", "--selector", selector, "--registry", tmp_path, "--json")
    assert code == 0
    found = json.loads(out)
    anchors = [one for one in found if one["target"] is None]
    assert [one["source"] for one in anchors] == ["tiny", "small", "base"]
    assert all(one["route"] == one["source"] and one["i"] is None and one["j"] is None for one in anchors)
    assert [one["macs"] for one in found] == sorted(one["macs"] for one in found)
    for one in found:
        if one["target"]:
            assert one["segments"][0] == [one["source"], 1, one["i"]]
            assert one["segments"][1][:2] == [one["target"], one["j"] + 1]
            assert one["parameters"] > 0
    assert list(tmp_path.iterdir()) == []


def test_routes_are_shown_for_people(tmp_path: Path) -> None:
    code, out, _ = run("routes", "--family", "deit-micro", "--selector", "snnet", "--registry", tmp_path)
    assert code == 0
    assert "Routes of the selector snnet" in out and "window" in out


def test_a_pair_in_the_wrong_order_is_refused_before_probes_learn(tmp_path: Path) -> None:
    code, out, error = run(
        "routes", "--family", "deit-micro", "--selector", "klas", "--pair", "base:tiny", "--registry", tmp_path
    )
    assert (code, out) == (1, "")
    # and nothing of what stages say while they work
    assert error == "Error: Stitches run from the smaller anchor to the larger one: ask for tiny:base.\n"


def test_every_selector_is_named_where_one_is_asked_for() -> None:
    from klas_zoo.selection.selectors import SELECTORS

    for command in ("build", "routes"):
        (option,) = (one for one in main.commands[command].params if one.name == "selector")
        assert isinstance(option, click.Option) and option.help
        listed = option.help.partition(": ")[2].partition(" (")[0]
        assert set(listed.replace(" or ", ", ").split(", ")) == set(SELECTORS)


def test_pick_prints_the_path_first_and_the_numbers_after(tmp_path: Path) -> None:
    registry = filled_registry(tmp_path)
    code, out, _ = run("pick", "--latency", "1s", "--registry", tmp_path)
    assert code == 0
    best = max(registry.engines(), key=lambda one: one.top1)
    assert out.splitlines()[0] == str(best.path)
    assert f"{best.top1:.2f} %" in out


def test_pick_explains_both_neighbours_only_when_asked(tmp_path: Path) -> None:
    filled_registry(tmp_path)
    _, short, _ = run("pick", "--latency", "2.5ms", "--registry", tmp_path)
    _, long, _ = run("pick", "--latency", "2.5ms", "--registry", tmp_path, "--explain")
    assert len(long.splitlines()) > len(short.splitlines())
    assert "faster" in long
    assert "slower" in long


def test_pick_answers_in_json(tmp_path: Path) -> None:
    registry = filled_registry(tmp_path)
    code, out, _ = run("pick", "--latency", "1s", "--registry", tmp_path, "--json")
    assert code == 0
    assert Path(json.loads(out)["engine"]["path"]).is_relative_to(registry.root)


def test_pick_takes_conditions_and_prints_what_was_left_out(tmp_path: Path) -> None:
    registry = made_up.holding(
        tmp_path,
        made_up.planned(1, "a", 70.0, (made_up.latency(1.0), made_up.latency(2.0, hardware="a loom", threads=8))),
        made_up.planned(1, "b", 80.0, 1.0, family="g", accuracy_source="its authors"),
    )
    code, out, _ = run("pick", "--latency", "5ms", "--registry", registry.root)
    assert code == 0 and out.endswith("excluded 1 engine of g: the accuracy is claimed (--claimed)\n")
    _, out, _ = run("pick", "--latency", "5ms", "--claimed", "--registry", registry.root)
    assert "top-1    80.00 % claimed by its authors of 50 images of clouds" in out
    _, out, _ = run("pick", "--latency", "5ms", "--hardware", "loom", "--threads", "8", "--registry", registry.root)
    assert "2.00 ms of 5.00 ms (p50, batch 1, 8 threads, a loom), measured" in out


def test_list_and_show_say_what_an_engine_is_and_under_which_conditions_it_was_measured(tmp_path: Path) -> None:
    compiled = {"format": "tensorrt", "runtime": "tensorrt", "precision": "fp16", "verification": None}
    registry = made_up.holding(
        tmp_path,
        made_up.planned(1, "int8", 70.0, (made_up.latency(1.0, threads=2),), precision="int8", family="[/x]"),
        made_up.planned(1, "trt", 70.0, (), status="built, not run", reason="no such GPU here", **compiled),
        made_up.planned(1, "claim", 71.0, 1.0, accuracy_source="its authors", top5=90.5),
        made_up.planned(1, "rude", 71.0, 1.0, family="\x1b[2J"),
    )
    code, out, _ = run("list", "--wide", "--registry", registry.root)
    assert "\x1b" not in out and "\\x1b[2J" in out
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = {cells[2]: cells for cells in lines if len(cells) > 4}
    assert code == 0
    assert rows["int8"][0] == "[/x]"
    assert rows["int8"][3:5] == ["int8", "onnx"]
    assert rows["int8"][-1].startswith("measured, 2 threads, ")
    assert (rows["trt"][3:5], rows["trt"][-1]) == (["fp16 tensorrt", "tensorrt"], "built, not run")
    assert rows["claim"][5] == "71.00 % (claimed)"
    code, out, _ = run("show", "trt", "--registry", registry.root)
    assert code == 0 and "  status       built, not run: no such GPU here\n" in out
    code, out, _ = run("show", "claim", "--registry", registry.root)
    assert "  accuracy     top-1 71.00 %, top-5 90.50 % claimed by its authors: 50 images of clouds\n" in out
    assert f"onnxruntime 1.2.3, CPUExecutionProvider, 1 thread, {describe_cpu()}\n" in out


def test_list_shows_what_is_registered(tmp_path: Path) -> None:
    registry = filled_registry(tmp_path)
    code, out, _ = run("list", "--registry", tmp_path)
    assert code == 0
    assert all(str(one.route) in out for one in registry.engines())
    code, out, _ = run("list", "--registry", tmp_path, "--json")
    assert len(json.loads(out)) == len(registry.engines())


BAD = {
    "an unknown family names the nearest": (["build", "--family", "deit-mikro"], 2, "did you mean deit-micro"),
    "an unknown device names the nearest": (["build", "--family", "deit", "--device", "cpuu"], 2, "did you mean cpu"),
    "a budget that does not parse says which forms do": (["pick", "--latency", "5"], 2, "5ms, 200us or 1.5s"),
    "a negative budget": (["pick", "--latency", "-5ms"], 2, "5ms, 200us or 1.5s"),
    "a size that does not parse": (["pick", "--latency", "5ms", "--max-size", "50"], 2, "50MB"),
    "a pair that is none": (["build", "--family", "deit-micro", "--pair", "tiny"], 2, "SOURCE:TARGET"),
    "a pair of unknown anchors": (["build", "--family", "deit-micro", "--pair", "tini:base"], 2, "did you mean tiny?"),
    "contradictory lengths of tuning": (
        ["build", "--family", "deit-micro", "--tune-steps", "5", "--tune-epochs", "1"], 2, "contradict"
    ),
    "contradictory weights": (
        ["build", "--family", "deit-micro", "--random-weights", "--weights", "."], 2, "contradict"
    ),
    "weights that are not there": (["build", "--family", "deit", "--weights", "nowhere"], 1, "nowhere is not a folder"),
    "data that is not there": (["build", "--family", "deit-micro", "--data", "nowhere"], 1, "nowhere is not a folder"),
    "an unknown selector names the nearest": (
        ["routes", "--family", "deit-micro", "--selector", "klass"], 2, "did you mean klas"
    ),
    "an unknown selector of a build": (
        ["build", "--family", "deit-micro", "--selector", "sn-net"], 2, "did you mean snnet?"
    ),
    "routes of a pair the wrong way round": (
        ["routes", "--family", "deit-micro", "--selector", "snnet", "--pair", "base:tiny"], 1, "ask for tiny:base"
    ),
    "routes without measurements": (["routes", "--family", "deit"], 1, "or pass --data and --weights"),
    "a family file that is not there": (["build", "--family", "none.toml"], 1, "none.toml cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_sentence(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    filled = filled_registry(tmp_path)
    before = filled.engines()
    found, out, error = run(*arguments, "--registry", tmp_path)
    assert (found, out) == (code, "")
    assert says in error
    assert "Traceback" not in error
    sentences = [line for line in error.strip().splitlines() if not line.startswith("Note: ")]
    assert len(sentences) == 1
    assert filled.engines() == before


@pytest.mark.parametrize(("option", "name", "nearest"), [("--route", "tinny", "tiny"), ("--device", "cpuu", "cpu")])
def test_an_unknown_name_in_a_list_names_the_nearest(
    option: str, name: str, nearest: str, tmp_path: Path
) -> None:
    filled_registry(tmp_path)
    code, out, error = run("list", option, name, "--registry", tmp_path)
    assert (code, out) == (2, "")
    assert f"did you mean {nearest}?" in error


def test_nothing_registered_says_what_to_do(tmp_path: Path) -> None:
    code, _, error = run("pick", "--latency", "5ms", "--registry", tmp_path / "none")
    assert code == 1
    assert "run klas-zoo build, add or install first" in error


def test_nothing_that_fits_names_the_nearest(tmp_path: Path) -> None:
    filled_registry(tmp_path)
    code, _, error = run("pick", "--latency", "1us", "--registry", tmp_path)
    assert code == 1
    assert "the nearest is" in error


@pytest.mark.parametrize(
    ("selector", "direction", "expected"),
    [(None, None, "up"), ("klas", None, "up"), ("klas", "down", "down"), (None, "up", "up")],
)
def test_a_selector_that_is_named_goes_up_and_none_goes_as_the_family_says(
    selector: str | None, direction: str | None, expected: str
) -> None:
    options = {"selector": selector, "direction": direction, "buckets": 20, "tolerance": 0.05, "pairs": ()}
    found = selection_settings(builtin_families()["deit-micro"], {**options, "most": None, "seed": 0})
    assert (found.selector, found.direction) == ("klas", expected)


@pytest.mark.parametrize(
    ("family", "said", "expected"), [("deit", None, 20), ("deit-micro", None, 8), ("deit-micro", 5, 5)]
)
def test_the_family_says_how_many_buckets_there_are_unless_the_user_does(
    family: str, said: int | None, expected: int
) -> None:
    options = {"selector": None, "direction": None, "buckets": said, "tolerance": 0.05, "pairs": ()}
    assert selection_settings(builtin_families()[family], {**options, "most": None, "seed": 0}).buckets == expected


AS_NOBODY = """
import os, sys
from klas_zoo.cli import main
from klas_zoo.data import loading, sources
def as_nobody(*arguments, load=loading.load_data, **options):
    if os.getuid() == 0:  # root may read whatever the permissions say
        os.setgid(65534)
        os.setuid(65534)
    return load(*arguments, **options)
loading.load_data = as_nobody
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_folder_that_may_not_be_read_is_not_called_unwritable() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are out of other users' reach
        os.chmod(folder, 0o777)
        images = Path(folder) / "images"
        for split in ("train", "val"):
            (images / split / "ant").mkdir(parents=True)
        images.chmod(0o755)
        (images / "train").chmod(0o000)
        arguments = ["build", "--family", "deit-micro", "--data", images, "--registry", Path(folder) / "registry"]
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Error: {images / 'train'} cannot be read: Permission denied." in done.stderr
    assert "Cannot write" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--per-bucket", "--most"])
def test_the_former_name_of_an_option_is_hidden_and_works(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, Any] = {}
    monkeypatch.setattr("klas_zoo.cli.routes.selection_settings", lambda spec, options: taken.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("routes", "--family", "deit-micro", option, "2")
    assert taken["most"] == 2
    assert "--most" not in run("routes", "--help")[1]

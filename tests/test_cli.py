"""The command line: what it documents, what it answers to bad input, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from made_up import filled_registry

from klas_zoo.cli import main
from klas_zoo.cli.options import selection_settings
from klas_zoo.families.specs import builtin_families


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
    assert error == "Error: Stitches run from the cheaper anchor to the dearer one: ask for tiny:base.\n"


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
    "weights that are not there": (["build", "--family", "deit", "--weights", "nowhere"], 1, "No weights for"),
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
    "routes that nobody measured": (["routes", "--family", "deit"], 1, "or say --data and --weights"),
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
    assert len(error.strip().splitlines()) == 1
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
    assert "run klas-zoo build first" in error


def test_nothing_that_fits_names_the_nearest(tmp_path: Path) -> None:
    filled_registry(tmp_path)
    code, _, error = run("pick", "--latency", "1us", "--registry", tmp_path)
    assert code == 1
    assert "the nearest is" in error


@pytest.mark.parametrize(
    ("selector", "direction", "expected"),
    [(None, None, "both"), ("klas", None, "up"), ("klas", "down", "down"), (None, "up", "up")],
)
def test_a_selector_that_is_named_goes_up_and_none_goes_as_the_family_says(
    selector: str | None, direction: str | None, expected: str
) -> None:
    options = {"selector": selector, "direction": direction, "buckets": 20, "tolerance": 0.05, "pairs": ()}
    found = selection_settings(builtin_families()["deit-micro"], {**options, "most": None, "seed": 0})
    assert (found.selector, found.direction) == ("klas", expected)

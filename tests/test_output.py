"""Names come from anywhere: none reaches a terminal as a command, and none is rich's markup."""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from pathlib import Path

import made_up
import pytest
from click.testing import CliRunner
from rich.console import Console

from klas_zoo.cli import main
from klas_zoo.cli.output import say, say_json, say_progress
from klas_zoo.progress.console import ConsoleListener
from klas_zoo.progress.tables import Column, new_table, show

ROOT = Path(__file__).parent.parent
RUDE = "[/x]\x1b[2J\a\ud800\x9b1m"
SHOWN = r"[/x]\x1b[2J\x07\ud800\x9b1m"
ALLOWED = {
    "zoo/cli/output.py": {"echo"},
    "zoo/cli/pick.py": {"echo"},  # the path alone, which scripts open
    "zoo/progress/console.py": {"print"},
    "zoo/progress/tables.py": {"print"},
    "zoo/runtimes/pytorch.py": {"write"},  # what torch had printed
    "zoo/runtimes/trial.py": {"print"},  # JSON, to the process that started it
}
"""Which modules print by themselves, and with what."""


def printing(tree: ast.AST) -> Iterator[str]:
    """What in a module prints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if named in {"print", "echo", "secho", "echo_via_pager", "print_exc"}:
                yield named
            if named == "TextColumn" and not any(word.arg == "markup" for word in node.keywords):
                text = node.args[0]
                assert isinstance(text, ast.Constant), "a column whose text is markup"
                assert "remark" not in text.value and "description" not in text.value
            if named in {"write", "writelines"} and "sys.std" in ast.unparse(node.func):
                yield named


def test_nothing_prints_but_what_escapes() -> None:
    found = {}
    for package in ("zoo", "exporters", "profiles"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ways := set(printing(ast.parse(path.read_text(encoding="utf-8")))):
                found[path.relative_to(ROOT).as_posix()] = ways
    assert found == ALLOWED


def test_lines_json_and_tables_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    say(RUDE)
    say(Path(RUDE), err=True)
    say_json({RUDE: RUDE})
    say_progress(RUDE)
    show(new_table(RUDE, [Column(heading="name", name=True)], [([RUDE], "")], caption=RUDE))
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 4 and err == f"{SHOWN}\n"  # no progress where there is no terminal
    assert not {"\x1b", "\a", "\x9b", "\ud800"} & {*out, *err}


def test_bars_in_a_terminal_are_text() -> None:
    stream = io.StringIO()
    listener = ConsoleListener(Console(file=stream, force_terminal=True, width=160))
    with listener.stage("[/x]", 2, "images") as advance:
        advance(1, RUDE)
    listener.say(RUDE)
    assert SHOWN in stream.getvalue() and "\x1b[2J" not in stream.getvalue()


@pytest.mark.parametrize("words", [
    ["list", "--wide"], ["show", "tiny"], ["registry", "builds"], ["registry", "check"],
    ["registry", "gc", "--dry-run"], ["registry", "gc", "--old-builds", "--dry-run"],
    ["registry", "remove", "1"], ["registry", "history"],
    ["pick", "--latency", "1s", "--explain"], ["pick", "--latency", "1us"], ["devices"], ["frontier", "--family", RUDE],
])  # fmt: skip
def test_commands_show_rude_names_as_text(words: list[str], tmp_path: Path) -> None:
    records = [made_up.latency(1.0, hardware=RUDE.replace("\ud800", ""))]
    rude = RUDE.replace("\ud800", "")  # which SQLite does not store
    registry = made_up.holding(
        tmp_path / "registry",
        made_up.planned(1, "tiny", 70.0, tuple(records), family=rude, dataset=rude, accuracy_source=rude),
        made_up.planned(1, "large", 80.0, 2.0, family=rude),
        made_up.planned(2, "tiny", 71.0, 1.0, family=rude),
    )
    words = [word.replace("\ud800", "") for word in words]
    done = CliRunner().invoke(main, [*words, "--registry", str(registry.root)])
    assert done.exit_code in (0, 1) and (done.exception is None or isinstance(done.exception, SystemExit))
    assert not {"\x1b", "\a", "\x9b"} & set(done.output), done.output

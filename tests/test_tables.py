"""Tables in narrow terminals: no name is cut or broken, no word is lost, and usual names fit 100 columns."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import made_up
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.cli import main
from klas_zoo.progress.tables import Column, new_table, show
from klas_zoo.registry import Registry
from klas_zoo.routes import Route

NAMES = ["tiny.1-10+small.11-12", "base", "a" * 70, "[bold]x[/bold]", "ゾウ" * 4]


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *arguments: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Names as long as those of built-in families get."""
    engines = []
    for number, family in enumerate(("deit-micro", "efficientvit", "resnet-swin")):
        for k in range(4):
            route = Route.stitch("small", 10, "medium", 10, 12 + k) if k else Route.anchor("medium", 12)
            engines.append(
                made_up.planned(
                    123_456_789, f"{family}{k}", 75.0 + number + k / 10, 9.0 + k - number, family=family, route=route,
                    precision="int8" if k % 2 else "fp32",
                )
            )  # fmt: skip
    return made_up.holding(tmp_path_factory.mktemp("registry"), *engines)


COMMANDS = [["list"], ["frontier"], ["frontier", "--all"], ["registry", "builds"]]


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_show_every_name_whole(
    monkeypatch: pytest.MonkeyPatch, registry: Registry, command: list[str], width: int
) -> None:
    text = printed(monkeypatch, width, *command, "--registry", str(registry.root))
    whole = printed(monkeypatch, 1000, *command, "--registry", str(registry.root))
    assert "…" not in text
    names = re.findall(r"small\.1-10\+medium\.11-\d+|efficientvit|resnet-swin|deit-micro", whole)
    assert names and all(name in text for name in names)
    if width == 100:
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("width", [80, 100])
def test_devices_fit(monkeypatch: pytest.MonkeyPatch, width: int, tmp_path: Path) -> None:
    text = printed(monkeypatch, width, "devices", "--registry", str(tmp_path))
    assert "a100-80-pcie" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_wide_shows_all_columns_and_says_so_where_they_are_left_out(
    monkeypatch: pytest.MonkeyPatch, registry: Registry
) -> None:
    short = printed(monkeypatch, 80, "list", "--registry", str(registry.root))
    wide = printed(monkeypatch, 80, "list", "--wide", "--registry", str(registry.root))
    assert "--wide shows more columns" in short and "p99" not in short
    assert "--wide" not in wide and all(heading in wide for heading in ("p99", "format", "images", "batch", "MACs"))
    assert "measured, 1 thread, this machine" in wide


@pytest.mark.parametrize("width", [80, 100])
def test_titles_and_captions_are_not_broken_where_a_narrow_table_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    title = "21 s, and 0 s in earlier runs; peak memory 964 MB, of [bold]this[/bold] process"
    show(new_table(title, [Column(heading="h")], [(["x"], "")], caption=title))
    assert capsys.readouterr().out.splitlines().count(title) == 2


CELL = st.sampled_from([*NAMES, "12.3 ms", "", "a sentence of several words", "two\nlines"])


@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL, CELL), min_size=1, max_size=4),
    kinds=st.tuples(*[st.sampled_from(["name", "number", "text", "spare"])] * 4), width=st.integers(10, 200),
)  # fmt: skip
def test_nothing_is_lost_at_any_width(rows: list[tuple[str, ...]], kinds: tuple[str, ...], width: int) -> None:
    columns = [
        Column(heading=f"h{n}", name=kind == "name", number=kind == "number", spare=kind == "spare")
        for n, kind in enumerate(kinds)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", io.StringIO())
        show(new_table("", columns, [(row, "") for row in rows]))
        text = sys.stdout.getvalue()  # type: ignore[attr-defined]
    for row in rows:
        for cell, kind in zip(row, kinds, strict=True):
            if kind in ("name", "number"):
                assert all(line in text for line in cell.split("\n"))
            elif kind == "text":
                assert all(word in text for word in cell.split())

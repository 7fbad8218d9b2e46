"""The report page: what it holds, that nothing in it is executed or fetched, and that it answers as `pick` does."""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import made_up
import pytest
from click.testing import CliRunner, Result

from klas_zoo.cli import main
from klas_zoo.errors import KlasZooError, MissingPackage, NothingFits
from klas_zoo.page.contents import build_contents, registry_contents
from klas_zoo.page.selection import chosen_because, selection_of
from klas_zoo.page.writing import LARGEST_BYTES, json_in_html, page_html, write_page
from klas_zoo.registry import Registry
from klas_zoo.registry.picking import pick
from klas_zoo.routes import Route

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'> \"q\" & <b>bold</b>"


def many_engines(root: Path, count: int = 40, seed: int = 3) -> Registry:
    """Engines of three families with many ties in accuracy, latency and size; some timed elsewhere or only predicted."""
    draw = random.Random(seed)
    engines = []
    for number in range(count):
        family = ("one", "two", HOSTILE)[number % 3]
        anchor = number % 5 == 0
        route = Route.anchor(f"a{number}", 4) if anchor else Route.stitch("x", 1 + number % 3, "y", number % 4, 4 + number)
        ms = draw.choice([0.5, 0.75, 1.0, 1.1234567, 2.0, 3.3])
        latencies = [made_up.latency(ms, p90_ms=ms * draw.choice([1.1, 1.5]), p99_ms=ms * draw.choice([2, 3]))]
        if number % 4 == 1:
            latencies.append(made_up.latency(ms * 5, batch=8))
        if number % 7 == 2:
            latencies = [made_up.latency(ms / 2, hardware="another machine, 64 cores")]
        engines.append(
            made_up.planned(
                draw.choice([10, 1000, 2_000_000]), f"e{number}", draw.choice([70.0, 73.0, 75.5]) + number % 2 + 3 * round(ms),
                tuple(latencies), family=family, route=route, accuracy_source="its authors" if number % 11 == 3 else "",
                precision=draw.choice(["fp32", "int8"]), images=1000,
            )
        )  # fmt: skip
    return made_up.holding(root, *engines)


def a_report(build_id: int = 1) -> dict[str, Any]:
    """As a build writes it, as far as the page reads it."""
    def candidate(i: int, j: int, reason: str) -> dict[str, Any]:
        route = Route.stitch("tiny", i, "base", j, 4)
        return {
            "route": str(route), "source": "tiny", "i": i, "target": "base", "j": j, "bucket": i, "score": i + j / 10,
            "reason": reason,
        }  # fmt: skip

    candidates = [candidate(i, j, "best" if i == j else "") for i in (1, 2, 3) for j in (1, 2, 3)]
    table = [[abs(i - j) + 0.123456 for j in range(5)] for i in range(4)]
    return {
        "build_id": build_id,
        "selection": {
            "selector": "klas", "score": "Γ", "candidates": candidates,
            "measurements": {"probes": {"between": [["tiny", "base", table], ["tiny", "tiny", table]]}},
        },
        "stages": [
            {"stage": "probes", "seconds": 12.5, "status": "cached"}, {"stage": "tune", "seconds": 80.0, "status": "done"}
        ],
        "routes": [{"route": "tiny.1-2+base.4-4", "cost": {"macs": 5}, "top1": 1.0, "engines": []}],
    }  # fmt: skip


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["report", *words], catch_exceptions=False)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return many_engines(tmp_path_factory.mktemp("page") / "registry of 'many' engines")


@pytest.mark.parametrize("text", [HOSTILE, "\ud800 half", "\u2028", "<!--<script>", "]]>", 'a"b\\c', "π → θ"])
def test_no_text_can_leave_the_data_element_and_all_of_it_comes_back(text: str) -> None:
    written = json_in_html({text: [text]})
    assert written.isascii() and not set("<>&") & set(written)
    assert json.loads(written) == {text: [text]}


def test_the_page_is_one_file_that_fetches_nothing(registry: Registry) -> None:
    page = page_html(registry_contents(registry)).decode("utf-8")
    assert len(page) < LARGEST_BYTES
    assert page.lower().count("</script>") == page.count("<script") - page.count('"<script') == 3
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page)
    assert "default-src 'none'" in page
    assert "<title>&lt;/script&gt;" in page


def test_a_title_with_half_a_surrogate_pair_is_written(registry: Registry, tmp_path: Path) -> None:
    write_page({**registry_contents(registry), "title": "a\ud800b"}, tmp_path / "page.html")
    assert b"<title>a?b" in (tmp_path / "page.html").read_bytes()


def test_too_many_engines_for_one_page_are_refused(registry: Registry, tmp_path: Path) -> None:
    contents = registry_contents(registry)
    contents["engines"] = contents["engines"] * 100
    with pytest.raises(KlasZooError, match=r"The page over 4,000 engines would be \d+\.\d MB: choose fewer with --family"):
        write_page(contents, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_accuracies_have_their_intervals_unless_they_are_claimed(registry: Registry) -> None:
    engines = registry_contents(registry)["engines"]
    assert any(one["claimed_by"] for one in engines)
    for one in engines:
        if one["claimed_by"]:
            assert one["top1_interval"] is None
        else:
            low, high = one["top1_interval"]
            assert low < one["top1"] < high and high - low < 6


def test_a_family_or_device_is_chosen_and_an_unknown_one_refused(registry: Registry, tmp_path: Path) -> None:
    assert {one["family"] for one in registry_contents(registry, family="two")["engines"]} == {"two"}
    for words, message in (
        (("--family", "tow"), "Unknown family 'tow': did you mean two?"),
        (("--device", "gpu"), "Unknown device 'gpu': did you mean cpu?"),
    ):
        result = run(*words, "--registry", str(registry.root), "--out", str(tmp_path / "page.html"))
        assert (result.exit_code, result.stderr) == (2, f"Error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_an_empty_registry_is_refused(tmp_path: Path) -> None:
    Registry.open(tmp_path, create=True)
    result = run("--registry", str(tmp_path))
    assert (result.exit_code, result.stderr) == (
        1, f"Error: The registry {tmp_path} holds no engines: run klas-zoo build first.\n"
    )  # fmt: skip


def test_the_command_writes_into_the_registry_or_where_it_is_told_and_opens(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: not opened.append(address))
    result = run("--registry", str(registry.root), "--open")
    assert result.stdout == f"Written: {registry.root / 'report.html'}\n"
    assert opened == [(registry.root / "report.html").as_uri()]
    run("--registry", str(registry.root), "--out", str(tmp_path / "new" / "page.html"))
    assert (tmp_path / "new" / "page.html").stat().st_size > 1_000_000


def test_a_page_that_cannot_be_written_is_one_sentence(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("--registry", str(registry.root), "--out", str(tmp_path / "file" / "page.html"))
    page = tmp_path / "file" / "page.html"
    message = f"Error: The page {page} cannot be written (File exists): name another place with --out.\n"
    assert (result.exit_code, result.stderr) == (1, message)


class _NoPlotly:
    def find_spec(self, name: str, *rest: object) -> None:
        if name.partition(".")[0] == "plotly":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_without_plotly_the_message_says_what_to_install(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_NoPlotly(), *sys.meta_path])
    with pytest.raises(MissingPackage, match=r"The report page needs plotly, .*: pip install 'klas-zoo\[build\]'"):
        page_html(registry_contents(registry))


def test_the_map_has_the_distances_the_scores_and_what_was_chosen() -> None:
    found = selection_of(a_report())
    assert found is not None
    (pair,) = found["pairs"]
    assert (pair["source"], pair["target"]) == ("tiny", "base")
    assert pair["theta"][0][:2] == [0.1235, 1.123]
    assert len(pair["scores"]) == 9
    assert [one[:2] for one in pair["chosen"]] == [[1, 1], [2, 2], [3, 3]]
    assert selection_of({"selection": {}}) is None


@pytest.mark.parametrize(
    ("kind", "settings", "report", "route", "plain", "words"),
    [
        ("build", {}, None, "tiny", True, "anchor of the family"),
        ("add", {}, None, "tiny", True, "plain network"),
        ("build", {"shipped": True}, None, "tiny.1-2+base.3-4", False, "comes with the family's tuned supernet"),
        ("build", {"selection": {"selector": "cka"}}, None, "tiny.1-2+base.3-4", False, "chosen by cka"),
        ("build", {}, a_report(), "tiny.1-2+base.3-4", False, "klas: best of its cost bucket (bucket 3, score 2.2)"),
    ],
)
def test_how_a_route_was_chosen(
    kind: str, settings: dict[str, Any], report: dict[str, Any] | None, route: str, plain: bool, words: str
) -> None:
    assert chosen_because(kind, settings, report)(route, plain) == words


@pytest.mark.parametrize("content", ["{", "[]", '{"build_id": 7}', ""])
def test_a_report_that_is_damaged_or_of_another_build_leaves_the_map_out(tmp_path: Path, content: str) -> None:
    registry = made_up.filled_registry(tmp_path)
    folder = tmp_path / "reports" / "0001-deit-micro-cpu"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(content)
    assert registry_contents(registry)["builds"][0]["selection"] is None
    (folder / "report.json").write_text(json.dumps(a_report()))
    assert registry_contents(registry)["builds"][0]["selection"] is not None


def test_engines_that_were_never_run_are_on_the_page_with_the_reason(tmp_path: Path) -> None:
    engine = made_up.planned(4, "later", 70.0, (), status="built, not run", reason="no GPU here", verification=None)
    contents = registry_contents(made_up.holding(tmp_path, engine))
    assert contents["engines"][0]["reason"] == "no GPU here"
    assert all(not one["rows"] and "was run on one yet" in one["error"] for one in contents["comparisons"])


# In a real browser


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with browser.chromium() as found:
        yield found


def load(window: Any, page: Path) -> None:
    """Opens a page and waits for its charts; any message of the console fails."""
    window.get(page.as_uri())
    window.set_script_timeout(30)
    window.execute_async_script(
        "const done = arguments[0]; const look = () => document.querySelector('#plot .main-svg, #empty:not([hidden])')"
        " ? done() : setTimeout(look, 50); look();"
    )
    assert [entry["message"] for entry in window.get_log("browser")] == []


@pytest.mark.slow
def test_names_are_shown_as_they_are_and_none_is_executed(window: Any, registry: Registry, tmp_path: Path) -> None:
    write_page(registry_contents(registry), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    assert HOSTILE in window.execute_script("return document.getElementById('title').textContent")
    assert window.execute_script("return window.broken") is None
    legend = window.execute_script("return [...document.querySelectorAll('#plot .legendtext')].map(one => one.textContent)")
    assert HOSTILE in legend
    window.execute_script("document.getElementById('table-box').open = true; document.getElementById('all-rows').click()")
    assert HOSTILE in window.execute_script("return document.getElementById('table').textContent")


@pytest.mark.slow
def test_hovering_over_a_mark_shows_its_numbers(window: Any, registry: Registry, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    write_page(registry_contents(registry, family="one"), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    item = window.execute_script(
        "const item = Frontier.best[Frontier.best.length - 1], full = plot._fullLayout, box = plot.getBoundingClientRect();"
        "return {route: item.engine.route, top1: item.engine.top1.toFixed(2), p99: Show.latency(item.ms.p99),"
        " x: box.left + full._size.l + full.xaxis.d2p(item.ms.p50), y: box.top + full._size.t + full.yaxis.d2p(item.engine.top1)}"
    )
    action = ActionChains(window)
    action.w3c_actions.pointer_action.move_to_location(int(item["x"]) - 30, int(item["y"]) + 30)
    action.w3c_actions.pointer_action.move_to_location(int(item["x"]), int(item["y"]))
    action.perform()
    seen = window.execute_async_script(
        "const done = arguments[0], start = Date.now(); const look = () => { const text = document.querySelector"
        "('#plot .hoverlayer').textContent; text || Date.now() - start > 5000 ? done(text) : setTimeout(look, 50); };"
        " look();"
    )
    for part in (item["route"], f"top-1 {item['top1']} %", "95 % interval", "p50", f"p99 {item['p99']}", "MACs", "B"):
        assert part in seen


def answer_of(command: str) -> tuple[str, str, str] | None:
    """What a command prints as JSON: family, route and precision of the engine; None where nothing fits."""
    result = CliRunner().invoke(main, [*shlex.split(command)[1:], "--json"], catch_exceptions=False)
    if result.exit_code:
        assert "No engine of" in result.stderr
        return None
    engine = json.loads(result.stdout)["engine"]
    return engine["family"], engine["route"], engine["precision"]


SHOWN = (
    "const best = Frontier.found && Frontier.found.best;"
    "return {command: document.getElementById('command').textContent,"
    " grip: document.getElementById('budget-grip').textContent, text: document.getElementById('answer').textContent,"
    " best: best && [best.engine.family, best.engine.route, best.engine.precision]}"
)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["latency", "size"])
def test_dragging_the_line_shows_what_the_command_answers(
    window: Any, registry: Registry, tmp_path: Path, axis: str
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    write_page(registry_contents(registry), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    window.execute_script(f"document.getElementById('axis').value = '{axis}'; Frontier.choose('axis')")
    line = window.find_element("id", "budget-line")
    answers = []
    for share in (0.01, 0.3, 0.6, 0.95):
        distance = window.execute_script(
            "const box = document.getElementById('budget-line').getBoundingClientRect(), size = plot._fullLayout._size;"
            "return plot.getBoundingClientRect().left + size.l + arguments[0] * size.w - box.left - box.width / 2", share
        )
        ActionChains(window).drag_and_drop_by_offset(line, int(distance), 0).perform()
        shown = window.execute_script(SHOWN)
        expected = answer_of(shown["command"])
        assert (shown["best"] and tuple(shown["best"])) == expected
        assert ("≤" in shown["grip"]) and (expected is None or expected[1] in shown["text"])
        answers.append((shown["command"], expected))
    assert len({command for command, _ in answers}) == 4
    assert len({answer for _, answer in answers}) > 1


@pytest.mark.slow
def test_the_keyboard_moves_the_line(window: Any, registry: Registry, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    write_page(registry_contents(registry), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    line = window.find_element("id", "budget-line")
    before = window.execute_script("return Frontier.limits.latency_ms")
    line.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert window.execute_script("return Frontier.limits.latency_ms") < before


@pytest.mark.slow
def test_the_page_answers_as_pick_for_every_question(window: Any, registry: Registry, tmp_path: Path) -> None:
    contents = registry_contents(registry)
    write_page(contents, tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    draw = random.Random(7)
    questions = []
    for number, comparison in enumerate(contents["comparisons"]):
        for percentile in ("p50", "p90", "p99"):
            column = 1 + contents["percentiles"].index(percentile)
            known = sorted({row[column] for row in comparison["rows"] if row[column] is not None})
            for ms in draw.sample(known, min(5, len(known))):
                for budget in (ms, ms * (1 - 1e-15), ms * 1.3):
                    accuracy = draw.choice([None, None, 70, 75.5, 79])
                    size = draw.choice([None, None, 10, 1000, 500_000])
                    questions.append([number, percentile, {"latency_ms": budget, "min_accuracy": accuracy, "max_size_bytes": size}])
    assert len(questions) > 200
    found = window.execute_script(
        "return arguments[0].map(([number, percentile, limits]) => {"
        " const comparison = DATA.comparisons[number], items = Choice.items(comparison, DATA.engines, DATA.percentiles);"
        " const answer = Choice.answer(items, percentile, limits);"
        " const of = one => one && [one.engine.path, one.ms[percentile]];"
        " return [of(answer.best), of(answer.faster), of(answer.slower), answer.fitting,"
        "  Choice.command(DATA, comparison, percentile, limits)]; })",
        questions,
    )
    for (number, percentile, limits), (best, faster, slower, fitting, command) in zip(questions, found, strict=True):
        asked = contents["comparisons"][number]
        try:
            expected = pick(
                limits["latency_ms"], device=asked["device"], family=asked["family"], batch=asked["batch"],
                percentile=percentile, hardware=asked["hardware"], min_accuracy=limits["min_accuracy"],
                max_size=limits["max_size_bytes"], registry=registry,
            )  # fmt: skip
        except NothingFits:
            assert best is None, command
            continue
        assert best == [str(expected.engine.path), expected.latency_ms], command
        assert fitting == expected.fitting
        for shown, runner_up in ((faster, expected.runner_up_faster), (slower, expected.runner_up_slower)):
            assert shown == (runner_up and [str(runner_up.engine.path), runner_up.latency_ms]), command
    for _, _, _, _, command in draw.sample(found, 12):
        place = next(k for k, one in enumerate(found) if one[4] == command)
        best = found[place][0]
        shown = next((one for one in contents["engines"] if best and one["path"] == best[0]), None)
        assert answer_of(command) == (shown and (shown["family"], shown["route"], shown["precision"]))


@pytest.mark.slow
def test_the_map_stages_and_provenance_of_a_build_are_shown(window: Any, tmp_path: Path) -> None:
    registry = made_up.filled_registry(tmp_path / "registry")
    write_page(build_contents(registry, 1, a_report()), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    text = window.execute_script("return document.body.innerText")
    for part in ("Rings are the 3 stitches that were chosen by klas", "1.5 min in all", "“tune”", "50 images of clouds"):
        assert part in text
    assert window.execute_script("return map.data[0].z.length") == 4
    window.execute_script(
        "document.getElementById('values').value = 'scores'; Builds.map(); document.getElementById('axis').value = 'macs';"
        "Frontier.choose('axis')"
    )
    assert window.execute_script("return map.data[0].z.length") == 3
    assert window.execute_script("return plot.data.some(one => one.name === 'evaluated, no engine')")
    assert [entry["message"] for entry in window.get_log("browser")] == []


@pytest.mark.slow
def test_a_page_without_anything_to_compare_says_why(window: Any, tmp_path: Path) -> None:
    engine = made_up.planned(4, "later", 70.0, (), status="built, not run", reason="no GPU here", verification=None)
    write_page(registry_contents(made_up.holding(tmp_path / "registry", engine)), tmp_path / "page.html")
    load(window, tmp_path / "page.html")
    text = window.execute_script("return document.body.innerText")
    assert "was run on one yet (1 built, not run): run klas-zoo install on such a machine." in text
    assert "later" in text  # over multiply-adds

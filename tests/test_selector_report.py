"""The numbers that benchmarks/selector_report.py draws from tables of runs."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "selector_report.py"
    spec = importlib.util.spec_from_file_location("selector_report", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("scores", "top1", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 0.5),
        # ties share their mean rank: ranks 1.5 1.5 3 against 1 2 3
        ([5, 5, 9], [1, 2, 3], math.sqrt(3) / 2),
    ],
)
def test_spearman_is_the_correlation_of_ranks(
    report: ModuleType, scores: list[float], top1: list[float], expected: float
) -> None:
    assert report.spearman(scores, top1) == pytest.approx(expected)


def test_spearman_of_what_never_changes_is_not_a_number(report: ModuleType) -> None:
    assert math.isnan(report.spearman([1, 1, 1], [1, 2, 3]))


def test_gains_are_read_off_two_frontiers(report: ModuleType) -> None:
    ends = ((100.0, 70.0), (200.0, 80.0))
    baseline = [(100.0, 70.0), (200.0, 80.0)]
    better = [(100.0, 70.0), (125.0, 78.0), (200.0, 80.0)]
    found = report.gains(better, baseline, ends)
    assert found["max points"] == pytest.approx(8)
    # 8 points over three quarters of the range, sampled at 200 costs
    assert found["mean points"] == pytest.approx(6, abs=0.05)
    # whatever lies above 70 and up to 78 takes 125 instead of 200
    assert found["max ratio"] == pytest.approx(1.6)
    assert found["median ratio"] == pytest.approx(1.6)


def test_a_frontier_gains_nothing_over_itself(report: ModuleType) -> None:
    curve = [(100.0, 70.0), (150.0, 75.0), (200.0, 80.0)]
    found = report.gains(curve, curve, (curve[0], curve[-1]))
    assert found == {"mean points": 0, "max points": 0, "median ratio": 1, "max ratio": 1}


def test_tables_are_read_without_the_line_that_says_where_they_were_measured(
    report: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "runs.csv"
    file.write_text('# {"hardware": "a machine"}\nseed,top1\n0,81.5\n1,82.5\n')
    assert report.read(file) == [{"seed": "0", "top1": "81.5"}, {"seed": "1", "top1": "82.5"}]
    assert report.shown([81.5, 82.5], 1) == "82.0 ± 0.7"


@pytest.mark.parametrize(
    ("after_tuning", "quarters", "expected"),
    # top-1 in closed form follows the score; tuned, KLAS's own four of the first quarter are the other way round
    [(False, True, [1.0]), (True, True, [-1.0]), (False, False, [math.nan])],
)
def test_correlations_by_quarter_and_after_tuning_of_what_klas_chose(
    report: ModuleType, tmp_path: Path, after_tuning: bool, quarters: bool, expected: list[float]
) -> None:
    header = "seed,selector,route,source,i,target,j,macs,bucket,reason,top1,seconds"
    anchors = ["a,a,,,,100,,,50,", "b,b,,,,500,,,90,"]
    # costs 110..150 lie in the first quarter of 100..500, 490 in the last; every one has a bucket of its own
    stitches = [f"s{k},a,{k},b,{k},{110 + 10 * k},{k},best" for k in range(5)] + ["t,a,5,b,5,490,19,best"]
    candidates = [*(f"0,,{row}," for row in anchors), *(f"0,,{row},{60 + k},,{-k}" for k, row in enumerate(stitches))]
    runs = [*(f"0,klas,{row}" for row in anchors), *(f"0,klas,{row},{70 - k},1" for k, row in enumerate(stitches[:4]))]
    (tmp_path / "candidates.csv").write_text("\n".join(["# {}", f"{header},score klas", *candidates]) + "\n")
    (tmp_path / "runs.csv").write_text("\n".join(["# {}", header, *runs]) + "\n")
    (tmp_path / "cascades.csv").write_text("# {}\nseed,small,large,threshold,macs,top1\n")
    found = report.Family(tmp_path).correlation("klas", after_tuning=after_tuning, quarters=quarters)
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.fixture
def tuned_together(report: ModuleType, tmp_path: Path) -> Any:
    """Two anchors, two stitches up and two down, all tuned in one supernet, and what some selectors chose."""
    header = "seed,selector,route,source,i,target,j,macs,bucket,reason,top1,seconds"
    anchors = ["a,a,,,,100,,,50", "b,b,,,,500,,,90"]
    stitches = ["u1,a,1,b,1,200,5,best,60", "u2,a,2,b,2,300,9,best,80"]
    stitches += ["d1,b,1,a,1,250,7,best,70", "d2,b,2,a,2,400,14,best,65"]
    candidates = [f"0,,{row},,{score}" for row, score in zip((*anchors, *stitches), ("", "", 2, 1, 1, 2), strict=True)]
    runs = [f"0,all both,{row},1" for row in (*anchors, *stitches)]
    (tmp_path / "candidates.csv").write_text("\n".join(["# {}", f"{header},score klas", *candidates]) + "\n")
    (tmp_path / "runs.csv").write_text("\n".join(["# {}", header, *runs]) + "\n")
    (tmp_path / "cascades.csv").write_text("# {}\nseed,small,large,threshold,macs,top1\n")
    chosen = {"klas": "u2", "klas down": "d1 d2", "klas both": "u2 d1", "klas both few": "d1", "self": "x"}
    rows = [f"0,{name},{routes}" for name, routes in chosen.items()]
    (tmp_path / "selections.csv").write_text("\n".join(["# {}", "seed,selector,routes", *rows]) + "\n")
    return report.Family(tmp_path)


def test_what_selectors_keep_of_one_supernet_is_compared(report: ModuleType, tuned_together: Any) -> None:
    # of an accuracy that spans 50..90 over costs of 100..500: u2 gives 30 points over the last half of the range
    assert tuned_together.kept("klas", lambda seed: tuned_together.area_kept("klas", seed)) == [pytest.approx(0.375)]
    # d1 gives 20 points from 250 on, d2 costs more and is worse
    assert tuned_together.area_kept("klas down", "0") == pytest.approx(0.3125)
    assert tuned_together.area_kept("klas both", "0") == pytest.approx(0.3125 + 0.25 * 0.5)
    table = report.tuned_together(tuned_together)
    assert table[-2:] == [
        "| klas | 1: 0.375 | 2: 0.312 | 2: 0.438 | – | 1: 0.312 |",
        "| self | – | – | – | – | – |",
    ]


def test_only_stitches_up_count_as_the_best_of_a_bucket(tuned_together: Any) -> None:
    stitches = [row for row in tuned_together.candidates if row["target"]]
    assert {row["route"]: tuned_together.is_up(row) for row in stitches} == {
        "u1": True, "u2": True, "d1": False, "d2": False,
    }  # fmt: skip
    assert tuned_together.share_of_best_of({"u2", "d1"}, "0") == 50


@pytest.mark.parametrize(("up", "expected"), [(True, 1.0), (False, -1.0)])
def test_correlations_are_of_one_direction(tuned_together: Any, up: bool, expected: float) -> None:
    """Up, top-1 falls with the score, as it should; down it rises."""
    tuned_together.candidates = [
        {"seed": "0", "route": f"{source}{k}", "source": source, "target": target, "macs": "150", "bucket": "2",
         "score klas": str(k), "top1": str(60 + sign * k)}
        for source, target, sign in (("a", "b", -1), ("b", "a", 1))
        for k in range(4)
    ]  # fmt: skip
    for quarters in (False, True):
        found = tuned_together.correlation("klas", after_tuning=False, quarters=quarters, up=up)
        assert found == [pytest.approx(expected)]


def test_families_without_such_a_supernet_have_no_such_table(report: ModuleType, tuned_together: Any) -> None:
    tuned_together.runs = {("klas", "0"): tuned_together.runs["all both", "0"]}
    assert report.tuned_together(tuned_together) == []

"""Plain networks beside stitches: the rule, and what family files say about it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from klas_zoo.families.specs import builtin_families

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(request: pytest.FixtureRequest) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    request.addfinalizer(lambda: sys.path.remove(str(BENCHMARKS)))
    spec = importlib.util.spec_from_file_location("against_timm", BENCHMARKS / "against_timm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["against_timm"] = module
    spec.loader.exec_module(module)
    return module


def test_a_stitch_is_dominated_where_a_network_as_fast_is_as_accurate(benchmark: ModuleType) -> None:
    point = benchmark.Point
    plain = [point("fast", 1.0, 70.0), point("slow", 4.0, 80.0)]
    stitches = [
        point("behind", 5.0, 78.5),
        point("level", 1.0, 70.0),
        point("ahead", 3.9, 75.0),
        point("first", 0.5, 1.0),
    ]
    verdict = benchmark.judge(stitches, plain)
    assert verdict.margins == {"behind": 1.5, "level": 0.0, "ahead": -5.0}
    assert verdict.dominated == 2


def test_a_stitch_takes_the_time_between_its_anchors_that_its_multiply_adds_say(benchmark: ModuleType) -> None:
    anchors = [(1.0, 10.0), (3.0, 20.0), (5.0, 40.0)]
    assert [benchmark.interpolated(macs, anchors) for macs in (1, 2, 3, 4.5, 6)] == [10, 15, 20, 35, 48]


def test_published_results_give_the_figures_of_the_record(benchmark: ModuleType) -> None:
    recorded = json.loads((BENCHMARKS / "results" / "against_timm.json").read_text())["parts"]["published"]
    assert benchmark.published() == recorded


def test_verdicts_follow_from_the_recorded_latencies(benchmark: ModuleType) -> None:
    recorded = json.loads((BENCHMARKS / "results" / "against_timm.json").read_text())["parts"]["measured"]
    assert benchmark.verdicts(recorded["engines"]) == recorded["verdicts"]
    assert len([name for name in recorded["engines"] if ":" not in name]) == len(benchmark.PLAIN) == 20


def test_the_excerpts_name_their_sources_and_licences() -> None:
    for name, repository in (("timm_results", "huggingface/pytorch-image-models"), ("snnet_points", "ziplab/SN-Net")):
        head = (BENCHMARKS / "data" / f"{name}.csv").read_text()[:200]
        assert repository in head and "Apache-2.0" in head


def test_family_files_say_so_where_every_published_stitch_is_dominated() -> None:
    recorded = json.loads((BENCHMARKS / "results" / "against_timm.json").read_text())["parts"]["published"]
    cpu, gpu = (recorded[device]["any weights"] for device in ("i7_12700h_ms", "rtx4090_images_s"))
    dominated = {name for name in cpu if all(one[name]["dominated"] == one[name]["stitches"] for one in (cpu, gpu))}
    families = builtin_families()
    assert {name for name, spec in families.items() if spec.dominated} == dominated == set(cpu) - {"levit"}
    for name in dominated:
        points = [f"{one[name]['median_margin']:.1f}" for one in (cpu, gpu)]
        assert f"by {points[0]} points on a CPU and {points[1]} on a GPU" in families[name].dominated
        assert str(cpu[name]["stitches"]) in families[name].dominated

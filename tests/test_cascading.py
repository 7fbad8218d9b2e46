"""Cascades of a package: fitted on half of the images, timed here, chosen within limits; the command that does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
from click.testing import CliRunner
from PIL import Image

from klas_zoo.cascades.fitting import Outcome
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.search import SearchSettings
from klas_zoo.catalogue.cascading import CascadeReport, Limits, fit_cascades
from klas_zoo.cli import main
from klas_zoo.errors import DataError, NothingFits, PackageError, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import CASCADES, read_cascades
from klas_zoo.runtime import ElasticSession
from klas_zoo.runtimes.ort import OnnxGraph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascading") / "package"
    packages.write_package(folder)
    return folder


def _images(folder: Path, count: int, seed: int = 0) -> Path:
    """Noise in five classes; no network is right more often than by chance, but the whole path runs."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        place = folder / f"class{number % packages.CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _images(tmp_path_factory.mktemp("photos"), 800)


def test_a_mixture_is_that_of_all_runs_by_their_shares() -> None:
    short, long = np.full(50, 1.0), np.full(10, 5.0)
    found = MixedLatency.of([short, long], [0.95, 0.05])
    assert found.mean_ms == pytest.approx(1.2)
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == (1.0, 1.0, 5.0)
    assert (found.paths_ms, found.worst_ms) == ((1.0, 5.0), 5.0)


@pytest.mark.parametrize(("share", "p99"), [(0.02, 5.0), (0.0101, 5.0), (0.0099, 1.0)])
def test_the_tail_is_the_long_path_once_more_than_one_image_in_a_hundred_takes_it(share: float, p99: float) -> None:
    found = MixedLatency.of([np.full(7, 1.0), np.full(3, 5.0)], [1 - share, share])
    assert found.p99_ms == p99


def test_a_mixture_has_the_percentiles_of_the_images_it_stands_for() -> None:
    generator = np.random.default_rng(0)
    paths = [generator.gamma(9, 0.1, 400), 2 + generator.gamma(9, 0.2, 300)]
    found = MixedLatency.of(paths, [0.7, 0.3])
    drawn = np.concatenate([generator.choice(paths[0], 70_000), generator.choice(paths[1], 30_000)])
    assert found.mean_ms == pytest.approx(drawn.mean(), rel=0.01)
    for name, value in zip(("p50_ms", "p90_ms", "p99_ms"), np.percentile(drawn, (50, 90, 99)), strict=True):
        assert getattr(found, name) == pytest.approx(value, rel=0.02)


def test_shares_of_other_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="1 shares that sum up to 1 are needed"):
        MixedLatency.of([np.ones(3)], [0.5])


def _report(name: str, top1: float, mean: float, worst: float, p99: float) -> CascadeReport:
    seen = Outcome(
        images=100, shares=(1.0,), escalated=(), escalated_intervals=(), top1=top1, top1_interval=(top1, top1)
    )
    latency = MixedLatency(mean_ms=mean, p50_ms=mean, p90_ms=mean, p99_ms=p99, worst_ms=worst, paths_ms=(mean,))
    return CascadeReport(name=name, cascade=None, test=seen, expected=(), latency=latency, mean_macs=1, worst_macs=1)


REPORTS = [_report("small", 80, 1, 1.1, 1.2), _report("cascade", 90, 2, 6, 6.5), _report("base", 91, 5, 5, 5.2)]


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(mean_ms=2), "cascade"),
        (Limits(mean_ms=2, worst_ms=5.5), "small"),
        (Limits(latency_ms=2.5), "cascade"),
        (Limits(latency_ms=2.5, percentile="p99"), "small"),
        (Limits(worst_ms=5.5), "base"),
        (Limits(mean_ms=100), "base"),
    ],
)
def test_the_most_accurate_within_every_limit_is_chosen(limits: Limits, name: str) -> None:
    assert limits.best(REPORTS).name == name


def test_limits_that_nothing_keeps_name_the_nearest() -> None:
    with pytest.raises(NothingFits) as refused:
        Limits(mean_ms=0.5, worst_ms=0.9).best(REPORTS)
    assert str(refused.value) == (
        "No route or cascade is within mean 0.500 ms, worst 0.900 ms: the nearest, small, takes mean 1.00 ms, "
        "worst 1.10 ms."
    )


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_no_latency_is_refused(bound: float) -> None:
    with pytest.raises(UsageError, match="is no limit: it has to be finite and above zero"):
        Limits(worst_ms=bound)


@pytest.fixture(scope="module")
def found(folder: Path, images: Path) -> list[CascadeReport]:
    return fit_cascades(folder, data=images, threads=1)


@pytest.mark.slow
def test_every_route_and_the_cascades_worth_having_are_reported(found: list[CascadeReport]) -> None:
    assert {one.name for one in found if one.cascade is None} == set(map(str, packages.ROUTES))
    for one in found:
        assert one.test.images == 400
        assert 0 < one.latency.paths_ms[0] <= one.latency.worst_ms
        assert one.test.top1_interval[0] <= one.test.top1 <= one.test.top1_interval[1]


@pytest.mark.slow
def test_a_reported_cascade_runs_in_a_session_of_the_package(folder: Path, found: list[CascadeReport]) -> None:
    session = ElasticSession(folder, threads=1)
    some = np.random.default_rng(1).standard_normal((5, *packages.SHAPE), dtype=np.float32)
    for one in found:
        if one.cascade is not None:
            name = session.add_cascade(one.cascade, expected=one.expected)
            assert session.run(some, route=name).shape == (5, packages.CLASSES)


@pytest.mark.slow
def test_half_of_the_images_decide_whatever_the_other_half_says(folder: Path, images: Path) -> None:
    one, again = (fit_cascades(folder, data=images, threads=1, routes=["slim", "wide"], seed=0) for _ in range(2))
    assert {r.name for r in one} == {r.name for r in again}


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"routes": ["slim"]}, UsageError, "A cascade needs two routes"),
        ({"data": None}, UsageError, "Which images? Pass --data DIR."),
    ],
)
def test_what_no_cascade_can_be_made_of_is_refused(
    folder: Path, images: Path, options: Any, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as refused:
        fit_cascades(folder, **{"data": images, **options})
    assert sentence in str(refused.value)


def test_too_few_images_are_refused_with_the_number_needed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="20 held-out images are too few to fit a threshold: 385 are needed"):
        fit_cascades(folder, data=_images(tmp_path / "few", 40))


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is no package"):
        fit_cascades(tmp_path)


@pytest.mark.slow
def test_the_command_prints_the_best_within_a_limit_or_everything(folder: Path, images: Path) -> None:
    arguments = ["cascades", str(folder), "--data", str(images), "--threads", "1", "--no-triples"]
    everything = CliRunner().invoke(main, [*arguments, "--json"])
    assert everything.exit_code == 0, everything.output
    table = json.loads(everything.output)
    assert {one["name"] for one in table} >= set(map(str, packages.ROUTES))
    best = CliRunner().invoke(main, [*arguments, "--mean", "10s", "--worst", "10s"])
    assert best.exit_code == 0, best.output
    assert best.output.count("top-1") == 1
    nothing = CliRunner().invoke(main, [*arguments, "--mean", "0.001us"])
    assert nothing.exit_code == 1
    assert "No route or cascade is within mean" in nothing.output
    assert "Traceback" not in nothing.output


@pytest.mark.slow
def test_a_copy_of_the_package_carries_the_cascades_that_were_fitted(
    folder: Path, images: Path, tmp_path: Path
) -> None:
    found = fit_cascades(folder, data=images, test=_images(tmp_path / "others", 60, seed=1), out=tmp_path / "out",
                         threads=1, graphs=True, settings=SearchSettings(most=2, triples=False))  # fmt: skip
    carried = read_cascades(Package.open(tmp_path / "out"))
    assert {one.name for one in carried.cascades} == {one.name for one in found if one.cascade is not None}
    assert carried.cascades and carried.data["fingerprint"]
    for one in carried.cascades:
        assert (one.facts.heldout.images, one.facts.test.images) == (800, 60)
        assert one.latencies[0].threads == 1
    assert not (folder / CASCADES).exists()
    numbers = [k for k, one in enumerate(carried.cascades, start=1) if len(one.cascade.stages) == 2]
    package = Package.open(tmp_path / "out")
    assert numbers and {f"cascade-{k}.onnx" for k in numbers} <= package.manifest.files.keys()
    session = OnnxGraph((package.folder / f"cascade-{numbers[0]}.onnx").read_bytes(), package.folder, threads=1)
    logits, exits = session.run([np.zeros((1, *packages.SHAPE), np.float32)])
    assert logits.shape == (1, packages.CLASSES) and exits[0] in (0, 1)


def test_images_that_decide_say_nothing_about_accuracy(folder: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="have to be different"):
        fit_cascades(folder, data=images, test=images, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_stands_at_out_is_left_alone(folder: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PackageError, match="is there already"):
        fit_cascades(folder, data=images, out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"

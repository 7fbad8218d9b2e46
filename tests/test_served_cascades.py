"""A package's cascades in a session and behind servers: chosen by mean or name, their exits counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import packages
import pytest
from protocol import torchs_logits
from test_request_handler import SLIM, STITCH, WIDE, Counts, settings, timed_package

from klas_zoo.errors import BadQuantity, NothingFits, UnknownName, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.records import CascadeLatency
from klas_zoo.runtime import ElasticSession
from klas_zoo.serving.request_handler import RequestHandler
from klas_zoo.serving.validation import Tensor


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, PackagedCascade]:
    """Routes of 100, 200 and 300 ms and 60, 70 and 80 %; a cascade of 100 or 210 ms, half each, and 75 %."""
    plain = vars(packages.latency(100.0, hardware=resolve_device("cpu").hardware, threads=1))
    latency = CascadeLatency(**plain, mean_ms=155.0, worst_ms=230.0, paths_ms=(100.0, 210.0))
    return packages.carry_cascade(timed_package(tmp_path_factory), latencies=(latency,))


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture
def handler(carried: tuple[Package, PackagedCascade], counts: Counts) -> Iterator[RequestHandler]:
    found = RequestHandler(carried[0], settings(), metrics=counts)
    yield found
    found.close()


def _tensors(images: np.ndarray) -> list[Tensor]:
    return [Tensor(name="images", datatype="FP32", shape=list(images.shape), data=images)]


@pytest.mark.parametrize(
    ("parameters", "route"),
    [
        ({"mean_ms": 120}, SLIM),
        ({"mean_ms": "160ms"}, "cascade"),
        ({"mean_ms": 250.0}, "cascade"),
        ({"mean_ms": 350}, WIDE),
        ({"latency_ms": 245}, STITCH),
        ({"latency_ms": 260}, "cascade"),
        ({"latency_ms": 1000}, WIDE),
        ({}, WIDE),
    ],
)
def test_a_request_gets_the_most_accurate_route_or_cascade_within_its_limit(
    handler: RequestHandler, carried: tuple[Package, PackagedCascade], parameters: dict[str, Any], route: str
) -> None:
    image = carried[0].references().images[:1]
    wanted = carried[1].name if route == "cascade" else route
    assert handler.answer(_tensors(image), parameters).route == wanted


@pytest.mark.parametrize("arrow", ["→", "->"])
def test_a_cascade_is_asked_for_by_its_name_and_its_exits_are_counted(
    handler: RequestHandler, carried: tuple[Package, PackagedCascade], counts: Counts, arrow: str
) -> None:
    package, one = carried
    images = package.references().images[:8]
    answers = [handler.answer(_tensors(images), {"route": one.name.replace("→", arrow)}) for _ in range(2)]
    by_stage = [torchs_logits(route, images) for route in one.cascade.routes]
    for row, logits in enumerate(answers[0].logits):
        assert min(float(np.abs(logits - stage[row]).max()) for stage in by_stage) < 1e-3
    counted = [counts.added["klas_zoo_cascade_images_total", one.name, stage] for stage in ("1", "2")]
    assert sum(counted) == 16 and min(counted) > 0
    assert counts.observed["klas_zoo_cascade_stage_seconds"] == 4
    assert counts.last["klas_zoo_cascade_escalated", one.name, "1"] == counted[1] / 16
    assert counts.last["klas_zoo_cascade_drift", one.name, "1"] == 0.0


def test_drift_is_a_metric(handler: RequestHandler, carried: tuple[Package, PackagedCascade], counts: Counts) -> None:
    package, one = carried
    exits = ElasticSession(package, threads=1)
    exits.add_package_cascades()
    images = package.references().images
    first = next(k for k in range(len(images)) if _goes_on(exits, one.name, images[k : k + 1]))
    with pytest.warns(UserWarning, match="Fit it again"):
        for _ in range(40):  # images that all go on
            handler.answer(_tensors(np.repeat(images[first : first + 1], 8, axis=0)), {"route": one.name})
            if counts.last["klas_zoo_cascade_drift", one.name, "1"]:
                break
    assert counts.last["klas_zoo_cascade_drift", one.name, "1"] == 1.0


def _goes_on(session: ElasticSession, name: str, image: np.ndarray) -> bool:
    before = session.cascade_counters(name).images[1]
    session.run(image, route=name)
    return session.cascade_counters(name).images[1] > before


@pytest.mark.parametrize(
    ("parameters", "kind", "sentence"),
    [
        ({"mean_ms": 50}, NothingFits, "No route answers 1 image in a mean of 50.0 ms: the nearest, slim,"),
        ({"mean_ms": -1}, BadQuantity, "mean_ms is a time above zero in milliseconds, not -1"),
        ({"mean_ms": 5, "latency_ms": 5}, UsageError, "Pass one of latency_ms, mean_ms and route."),
        ({"route": "slim ?p<0.1 | wide"}, UnknownName, "Unknown route 'slim \\?p<0.1 | wide'"),
    ],
)
def test_limits_that_cannot_be_kept_and_routes_that_are_not_there_are_refused(
    handler: RequestHandler, carried: tuple[Package, PackagedCascade], parameters: dict[str, Any],
    kind: type[Exception], sentence: str,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=sentence):
        handler.answer(_tensors(carried[0].references().images[:1]), parameters)


def test_a_cascade_judged_on_other_images_runs_by_name_only(tmp_path: Path) -> None:
    plain = vars(packages.latency(100.0, hardware=resolve_device("cpu").hardware, threads=1))
    latency = CascadeLatency(**plain, mean_ms=0.1, worst_ms=0.1, paths_ms=(0.1, 0.1))
    package, one = packages.carry_cascade(
        packages.write_package(tmp_path / "package"), fingerprint="others", latencies=(latency,)
    )
    session = ElasticSession(package, threads=1)
    assert session.add_package_cascades() == (one.name,)
    session.calibrate(runs=2)
    assert session.best_by_mean(1e6) == WIDE and not session.is_comparable(one.name)
    assert session.run(package.references().images, route=one.name).shape == (16, packages.CLASSES)


def test_cascades_of_a_package_are_measured_where_they_were_not(carried: tuple[Package, PackagedCascade]) -> None:
    session = ElasticSession(carried[0], threads=1)
    (name,) = session.add_package_cascades()
    assert session.paths(name) == (100.0, 210.0)
    assert session.paths(name, batch=2) == ()
    session.calibrate(batch=2, runs=3)
    short, long = session.paths(name, batch=2)
    assert 0 < short < 100 and 0 < long < 210
    assert session.best_by_mean(1e3, batch=2) == WIDE


def test_memory_that_a_large_batch_took_is_given_back_and_counts_nothing(
    carried: tuple[Package, PackagedCascade],
) -> None:
    session = ElasticSession(carried[0], threads=1)
    (name,) = session.add_package_cascades()
    images = carried[0].references().images
    before = session.run(np.repeat(images, 8, axis=0), route=name)
    counted = session.cascade_counters(name)
    session.release_memory()
    assert session.cascade_counters(name) == counted
    np.testing.assert_allclose(session.run(np.repeat(images, 8, axis=0), route=name), before, atol=1e-5)


def test_a_session_takes_one_limit_and_routes_of_it_only(carried: tuple[Package, PackagedCascade]) -> None:
    session = ElasticSession(carried[0], threads=1, routes=[SLIM, WIDE])
    assert session.add_package_cascades() == ()
    with pytest.raises(UsageError, match="Pass one of latency_ms, mean_ms, route and controller"):
        session.run(carried[0].references().images, mean_ms=5.0, latency_ms=5.0)

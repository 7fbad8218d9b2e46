"""What a request's parameters mean, whichever server it came to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import packages
import pytest

from klas_zoo.errors import BadQuantity, NothingFits, UnknownName, UsageError
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.serving.answering import Answering, names_of

SLIM, STITCH, WIDE = map(str, packages.ROUTES)


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Answering:
    """Routes that are known to take 1, 2 and 3 ms for one image, and 4, 8 and 12 ms for eight."""
    here = {"hardware": resolve_device("cpu").hardware, "threads": 1}
    routes = tuple(
        replace(
            one,
            latencies=(
                packages.latency(float(number), **here),
                packages.latency(4.0 * number, batch=8, **here),
            ),
        )
        for number, one in enumerate(packages.source().routes, start=1)
    )
    package = packages.write_package(tmp_path_factory.mktemp("packages") / "package", routes=routes)
    return Answering(package, threads=1)


@pytest.mark.parametrize(
    ("parameters", "batch", "route"),
    [
        ({}, 1, WIDE),
        ({"latency_ms": 3}, 1, WIDE),
        ({"latency_ms": 2.9}, 1, STITCH),
        ({"latency_ms": "1.5"}, 1, SLIM),
        ({"latency_ms": "2500us"}, 1, STITCH),
        ({"latency_ms": 11}, 8, STITCH),
        ({"latency_ms": 6}, 2, WIDE),  # nobody measured two images: at most twice one
        ({"latency_ms": 5.9}, 2, STITCH),
        ({"latency_ms": 24}, 16, WIDE),
        ({"latency_ms": 23}, 16, STITCH),
        ({"route": SLIM}, 5, SLIM),
        ({"latency_ms": 3, "sequence_id": 7}, 1, WIDE),
    ],
)
def test_the_most_accurate_route_within_the_budget_answers(
    answering: Answering, parameters: dict[str, object], batch: int, route: str
) -> None:
    assert answering.route_for(parameters, batch) == route


@pytest.mark.parametrize("latency", [0, -1, math.nan, math.inf, "soon", "5 parsecs", True, [5]])
def test_a_budget_that_is_no_time_is_refused(answering: Answering, latency: object) -> None:
    with pytest.raises(BadQuantity):
        answering.route_for({"latency_ms": latency}, 1)


def test_a_budget_nothing_fits_names_the_nearest(answering: Answering) -> None:
    with pytest.raises(NothingFits, match=rf"nearest, {SLIM}, takes 1\.00 ms"):
        answering.route_for({"latency_ms": 0.5}, 1)


def test_parameters_that_contradict_each_other_and_unknown_routes_are_refused(answering: Answering) -> None:
    with pytest.raises(UsageError, match="not both"):
        answering.route_for({"latency_ms": 5, "route": SLIM}, 1)
    with pytest.raises(UnknownName, match="did you mean slim"):
        answering.route_for({"route": "slimm"}, 1)


def test_latencies_nobody_knows_are_measured_at_the_start(tmp_path: object, answering: Answering) -> None:
    measured = Answering(answering.session.package, threads=2, batches=(1, 3))
    assert measured.session.latencies(batch=3).keys() == {SLIM, STITCH, WIDE}
    assert measured.route_for({"latency_ms": 60_000}, 3) == WIDE


def test_a_routes_name_is_sent_for_every_image() -> None:
    found = names_of("tiny", 3)
    assert found.shape == (3, 1) and set(found.flat) == {b"tiny"}
    assert isinstance(found, np.ndarray) and found.dtype == object

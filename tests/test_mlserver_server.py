"""MLServer with a family as its model, asked by Triton's client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import packages
import pytest
from protocol import ask, client_of, images, route_of, torchs_logits
from server_processes import Server, mlserver
from tritonclient.utils import InferenceServerException

from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, PackagedCascade]:
    return packages.carry_cascade(packages.write_package(tmp_path_factory.mktemp("mlserver") / "package"))


@pytest.fixture(scope="module")
def server(carried: tuple[Package, PackagedCascade], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with mlserver(carried[0].folder, tmp_path_factory.mktemp("server"), "made-up") as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with client_of(request.param, server) as client:
        yield client


def _ask(client: Any, asked: np.ndarray, **parameters: Any) -> Any:
    # MLServer takes no bytes over HTTP
    return ask(client, "made-up", asked, binary=False, **parameters)


@pytest.mark.parametrize("route", packages.ROUTES, ids=str)
def test_the_route_that_is_asked_for_answers_what_torch_answers(client: Any, route: Any) -> None:
    asked = images(3)
    answer = _ask(client, asked, route=str(route))
    np.testing.assert_allclose(answer.as_numpy("logits"), torchs_logits(route, asked), atol=1e-4)
    assert route_of(answer) == str(route)


def test_a_request_with_a_budget_is_answered_by_the_route_that_fits(client: Any) -> None:
    assert route_of(_ask(client, images(1), latency_ms=60_000)) == "wide"
    with pytest.raises(InferenceServerException, match="No route answers 1 image within"):
        _ask(client, images(1), latency_ms="1ns")


def test_a_request_that_says_nothing_is_answered_by_the_most_accurate_route(client: Any) -> None:
    assert route_of(_ask(client, images(2))) == "wide"


def test_what_cannot_be_answered_is_refused_with_the_reason(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="did you mean slim"):
        _ask(client, images(1), route="slimm")
    with pytest.raises(InferenceServerException, match=r"Images are \(B, 3, 16, 16\)"):
        _ask(client, np.zeros((1, 3, 8, 8), np.float32))


def test_a_cascade_answers_for_its_name_and_within_a_mean(
    client: Any, carried: tuple[Package, PackagedCascade]
) -> None:
    assert route_of(_ask(client, images(3), route=carried[1].name)) == carried[1].name
    assert route_of(_ask(client, images(3), mean_ms=60_000)) in (carried[1].name, *map(str, packages.ROUTES))
    with pytest.raises(InferenceServerException, match="Pass one of latency_ms, mean_ms and route"):
        _ask(client, images(1), mean_ms=5, route="slim")

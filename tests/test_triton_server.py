"""The real tritonserver serves a repository as it was written, and answers what torch answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import packages
import pytest
from protocol import ask, client_of, images, route_of, torchs_logits
from server_processes import Server, triton
from tritonclient.utils import InferenceServerException

from klas_zoo.exporters.to_triton import TritonSettings, model_name, write_repository

pytestmark = pytest.mark.slow

BATCHES = (1, 3, 8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    package = packages.write_package(folder / "package")
    write_repository(package, folder / "repository", TritonSettings(largest_batch=8))
    models = folder / "repository" / "models"
    bad = models / "bad"
    (bad / "1").mkdir(parents=True)
    (bad / "config.pbtxt").write_text('name: "bad"\nbackend: "onnxruntime"\nmax_batch_size: "eight"\n')
    options = ("--model-control-mode=explicit", "--exit-on-error=false", "--load-model=made-up_slim")
    with triton(models, folder, *options) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    with client_of(request.param, server) as client:
        yield client


@pytest.mark.parametrize("route", packages.ROUTES, ids=str)
def test_every_route_answers_what_torch_answers(client: Any, route: Any) -> None:
    name = model_name("made-up", str(route))
    client.load_model(name)
    for batch in BATCHES:
        asked = images(batch, seed=batch)
        found = ask(client, name, asked).as_numpy("logits")
        np.testing.assert_allclose(found, torchs_logits(route, asked), atol=1e-4)


def test_the_server_says_of_a_route_what_its_configuration_says(client: Any) -> None:
    client.load_model("made-up_wide")
    if client.kind == "http":
        config = client.get_model_config("made-up_wide")
    else:
        config = client.get_model_config("made-up_wide", as_json=True)["config"]
    assert config["parameters"]["route"]["string_value"] == "wide"
    assert config["default_model_filename"] == "wide.onnx"


def test_one_model_answers_by_the_route_that_fits_a_requests_budget(client: Any) -> None:
    client.load_model("made-up")
    asked = images(3)
    for route in packages.ROUTES:
        answer = ask(client, "made-up", asked, route=str(route))
        np.testing.assert_allclose(answer.as_numpy("logits"), torchs_logits(route, asked), atol=1e-4)
        assert route_of(answer) == str(route)
    assert route_of(ask(client, "made-up", asked, latency_ms=60_000)) == "wide"
    assert route_of(ask(client, "made-up", asked)) == "wide"
    with pytest.raises(InferenceServerException, match="No route answers 1 image within"):
        ask(client, "made-up", images(1), latency_ms="1ns")
    with pytest.raises(InferenceServerException, match="did you mean slim"):
        ask(client, "made-up", images(1), route="slimm")


def test_a_configuration_that_triton_cannot_parse_is_refused_and_the_others_stay(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="failed to load 'bad'"):
        client.load_model("bad")
    assert client.is_model_ready("made-up_slim")


def test_images_of_another_shape_are_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        ask(client, "made-up_slim", np.zeros((1, 3, 8, 8), np.float32))


def test_a_batch_beyond_the_largest_is_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="must be <= 8"):
        ask(client, "made-up_slim", images(9))


def test_no_answer_is_wrong_or_lost_while_other_routes_are_loaded_and_unloaded(server: Server) -> None:
    asked = {seed: images(2, seed) for seed in range(4)}
    wanted = {seed: torchs_logits(packages.SLIM, one) for seed, one in asked.items()}
    right, done = [0] * 4, threading.Event()

    def work(worker: int) -> None:
        with client_of("grpc", server) as client:
            for _ in range(50):
                found = ask(client, "made-up_slim", asked[worker]).as_numpy("logits")
                right[worker] += bool(np.allclose(found, wanted[worker], atol=1e-4))

    def churn() -> None:
        with client_of("grpc", server) as client:
            while not done.is_set():
                client.load_model("made-up_wide")
                client.unload_model("made-up_wide")

    churning = threading.Thread(target=churn)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in (churning, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    churning.join()
    assert right == [50] * 4

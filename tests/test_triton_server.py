"""The real tritonserver serves a repository as it was written, and answers what torch answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import packages
import pytest
import torch
import tritonclient.grpc
import tritonclient.http
from server_processes import Server, triton
from tritonclient.utils import InferenceServerException

from klas_zoo.exporters.to_triton import TritonSettings, model_name, write_repository

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


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Any]:
    if request.param == "http":
        client = tritonclient.http.InferenceServerClient(server.http, network_timeout=60, connection_timeout=60)
    else:
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
    client.kind = {"http": tritonclient.http, "grpc": tritonclient.grpc}[request.param]
    yield client
    client.close()


def _ask(client: Any, model: str, images: np.ndarray, **parameters: Any) -> Any:
    sent = client.kind.InferInput("images", list(images.shape), "FP32")
    sent.set_data_from_numpy(images)
    return client.infer(model, [sent], **({"parameters": parameters} if parameters else {}))


def _images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *packages.SHAPE), dtype=np.float32)


def _torch(route: Any, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return packages.supernet()(torch.from_numpy(images), route).numpy()


@pytest.mark.parametrize("route", packages.ROUTES, ids=str)
def test_every_route_answers_what_torch_answers(client: Any, route: Any) -> None:
    name = model_name("made-up", str(route))
    client.load_model(name)
    for batch in BATCHES:
        images = _images(batch, seed=batch)
        found = _ask(client, name, images).as_numpy("logits")
        np.testing.assert_allclose(found, _torch(route, images), atol=1e-4)


def test_the_server_says_of_a_route_what_its_configuration_says(client: Any) -> None:
    client.load_model("made-up_wide")
    if client.kind is tritonclient.http:
        config = client.get_model_config("made-up_wide")
    else:
        config = client.get_model_config("made-up_wide", as_json=True)["config"]
    assert config["parameters"]["route"]["string_value"] == "wide"
    assert config["default_model_filename"] == "wide.onnx"


def test_a_configuration_that_triton_cannot_parse_is_refused_and_the_others_stay(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="failed to load 'bad'"):
        client.load_model("bad")
    assert client.is_model_ready("made-up_slim")


def test_images_of_another_shape_are_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        _ask(client, "made-up_slim", np.zeros((1, 3, 8, 8), np.float32))


def test_a_batch_beyond_the_largest_is_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="must be <= 8"):
        _ask(client, "made-up_slim", _images(9))


def test_no_answer_is_wrong_or_lost_while_other_routes_are_loaded_and_unloaded(server: Server) -> None:
    images = {seed: _images(2, seed) for seed in range(4)}
    wanted = {seed: _torch(packages.SLIM, one) for seed, one in images.items()}
    right, done = [0] * 4, threading.Event()

    def ask(worker: int) -> None:
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            client.kind = tritonclient.grpc
            for _ in range(50):
                found = _ask(client, "made-up_slim", images[worker]).as_numpy("logits")
                right[worker] += bool(np.allclose(found, wanted[worker], atol=1e-4))

    def churn() -> None:
        with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
            while not done.is_set():
                client.load_model("made-up_wide")
                client.unload_model("made-up_wide")

    churning = threading.Thread(target=churn)
    workers = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in (churning, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    churning.join()
    assert right == [50] * 4

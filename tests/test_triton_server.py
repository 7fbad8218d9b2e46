"""The real tritonserver serves a repository as it was written, and answers what torch answers."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import packages
import pytest
from protocol import ask, client_of, images, route_of, torchs_logits
from server_processes import Server, triton
from test_request_handler import timed_package
from tritonclient.utils import InferenceServerException

from klas_zoo.cascades.fitting import exits_of
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade
from klas_zoo.exporters.to_triton import TritonSettings, model_name, write_repository
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.records import CascadeLatency

pytestmark = pytest.mark.slow

BATCHES = (1, 3, 8)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, PackagedCascade]:
    """Routes of 100, 200 and 300 ms and 60, 70 and 80 %; a cascade of 100 or 210 ms, half each, and 75 %."""
    plain = vars(packages.latency(100.0, hardware=resolve_device("cpu").hardware, threads=1))
    latency = CascadeLatency(**plain, mean_ms=155.0, worst_ms=230.0, paths_ms=(100.0, 210.0))
    return packages.carry_cascade(timed_package(tmp_path_factory), latencies=(latency,))


@pytest.fixture(scope="module")
def server(carried: tuple[Package, PackagedCascade], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    write_repository(carried[0], folder / "repository", TritonSettings(largest_batch=8))
    models = folder / "repository" / "models"
    # the package's latencies are those of one thread, and are not to be measured again
    config = models / "made-up" / "config.pbtxt"
    threads = re.compile(r'(key: "threads"\s+value [{]\s+string_value: )"0"')
    text, changed = threads.subn(r'\1"1"', config.read_text())
    assert changed == 1
    config.write_text(text + 'parameters { key: "calibrate" value { string_value: "false" } }\n')
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


@pytest.mark.parametrize("arrow", ["→", "->"])
def test_a_cascade_answers_for_its_name_by_the_exits_that_torch_takes(
    client: Any, server: Server, carried: tuple[Package, PackagedCascade], arrow: str
) -> None:
    client.load_model("made-up")
    package, one = carried
    asked = package.references().images[:8]
    by_route = {route: torchs_logits(route, asked) for route in one.cascade.routes}
    exits = exits_of(one.cascade, by_route)
    assert 0 < exits.sum() < len(exits)
    expected = np.stack([by_route[route] for route in one.cascade.routes])[exits, np.arange(len(exits))]
    before = _answered(server, one.name)
    answer = ask(client, "made-up", asked, route=one.name.replace("→", arrow))
    np.testing.assert_allclose(answer.as_numpy("logits"), expected, atol=1e-3)
    assert route_of(answer) == one.name
    now = _answered(server, one.name)
    assert [now[k] - before[k] for k in (0, 1)] == [8 - exits.sum(), exits.sum()]


@pytest.mark.parametrize(
    ("mean_ms", "answers"), [(120, "slim"), ("160ms", "cascade"), (250, "cascade"), (350, "wide")]
)
def test_a_mean_is_kept_by_the_most_accurate_route_or_cascade(
    client: Any, carried: tuple[Package, PackagedCascade], mean_ms: int | str, answers: str
) -> None:
    client.load_model("made-up")
    wanted = carried[1].name if answers == "cascade" else answers
    assert route_of(ask(client, "made-up", images(1), mean_ms=mean_ms)) == wanted


@pytest.mark.parametrize(("latency_ms", "answers"), [(250, "slim"), (400, "cascade"), (60_000, "wide")])
def test_a_latency_is_kept_by_the_longest_path_of_a_cascade(
    client: Any, carried: tuple[Package, PackagedCascade], latency_ms: int, answers: str
) -> None:
    # a server that has just been warmed up by one image multiplies latencies by about 1.5: one call that was much
    # faster than measured says that they vary, and little more
    client.unload_model("made-up")
    client.load_model("made-up")
    wanted = carried[1].name if answers == "cascade" else answers
    assert route_of(ask(client, "made-up", images(1), latency_ms=latency_ms)) == wanted


def test_limits_of_a_mean_that_cannot_be_kept_are_refused(client: Any) -> None:
    client.load_model("made-up")
    with pytest.raises(InferenceServerException, match=r"No route answers 1 image in a mean of 50\.0 ms"):
        ask(client, "made-up", images(1), mean_ms=50)
    with pytest.raises(InferenceServerException, match="Pass one of latency_ms, mean_ms and route"):
        ask(client, "made-up", images(1), mean_ms=5, route="slim")
    with pytest.raises(InferenceServerException, match="Unknown route"):
        ask(client, "made-up", images(1), route="slim ?p<0.1 | wide")


def _answered(server: Server, cascade: str) -> list[float]:
    """Images that each of its two stages has answered, by the server's metrics."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{server.metrics}/metrics") as found:
        lines = found.read().decode().splitlines()
    counts = [0.0, 0.0]
    for line in lines:
        if line.startswith("klas_zoo_cascade_images_total{") and cascade in line:
            stage = re.search(r'stage="(\d)"', line)
            assert stage is not None
            counts[int(stage[1]) - 1] = float(line.rsplit(" ", 1)[1])
    return counts


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

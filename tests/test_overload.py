"""The real servers under more requests than their queue holds: some are refused as an overload, none is lost."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

import grpc
import packages
import pytest
from protocol import ask, client_of, images, route_of
from server_processes import Server, kserve, mlserver, triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from klas_zoo.exporters.to_triton import TritonSettings, write_repository

pytestmark = pytest.mark.slow

OVERLOAD = {
    "triton": grpc.StatusCode.UNAVAILABLE,
    "kserve": grpc.StatusCode.UNAVAILABLE,
    "mlserver": grpc.StatusCode.UNKNOWN,  # which has no code for 503
}


@pytest.fixture(scope="module", params=list(OVERLOAD))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    """A queue of one image."""
    folder = tmp_path_factory.mktemp(request.param)
    package = packages.write_package(folder / "package")
    if request.param == "triton":
        write_repository(package, folder / "repository", TritonSettings(largest_batch=1))
        config = folder / "repository" / "models" / "made-up" / "config.pbtxt"
        setting = 'parameters {\n  key: "queue_images"\n  value {\n    string_value: "1"\n  }\n}\n'
        config.write_text(config.read_text() + setting)
        options = ("--model-control-mode=explicit", "--load-model=made-up")
        started = triton(folder / "repository" / "models", folder, *options)
    elif request.param == "kserve":
        started = kserve(package.folder, folder, "made-up", "--largest_batch=1", "--queue_images=1")
    else:
        started = mlserver(package.folder, folder, "made-up", largest_batch=1, queue_images=1)
    with started as found:
        yield request.param, found


def test_every_request_of_a_flood_is_answered_or_refused_as_an_overload(server: tuple[str, Server]) -> None:
    kind, running = server
    message = service_pb2.ModelInferRequest(model_name="made-up")
    message.inputs.add(name="images", datatype="FP32", shape=[1, *packages.SHAPE])
    message.raw_input_contents.append(struct.pack("<768f", *[0.5] * 768))
    message.parameters["route"].string_param = "wide"
    outcomes: Counter[object] = Counter()
    with grpc.insecure_channel(running.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for future in [stub.ModelInfer.future(message, timeout=120) for _ in range(500)]:
            error = future.exception()
            outcomes["answered" if error is None else error.code()] += 1
            assert error is None or "images wait already, and the queue holds 1" in error.details()
    assert outcomes.keys() == {"answered", OVERLOAD[kind]}, outcomes
    with client_of("grpc", running) as client:
        assert route_of(ask(client, "made-up", images(1))) == "wide"

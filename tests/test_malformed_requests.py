"""Malformed requests to the real servers: each is the client's error, and good ones beside them are all answered."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator

import malformed
import pytest
from malformed_sending import SERVERS, TRITONS_OWN, Report, over_grpc, over_http, post, started
from server_processes import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    with started(request.param, tmp_path_factory.mktemp(request.param)) as found:
        yield request.param, found


@pytest.mark.parametrize("send", [over_http, over_grpc])
def test_200_malformed_requests_are_the_clients_errors(
    server: tuple[str, Server], send: Callable[[str, Server], Report]
) -> None:
    report = send(*server)
    assert not report.wrong, "\n".join(map(str, [report.seen, *report.wrong[:5]]))
    assert not report.lost and report.right > 20
    assert report.seen.total() == (195 if server[0] == "triton" and send is over_http else 200)


@pytest.mark.parametrize("length", ["x", "-1", "999999", "0", "5", "3.5", ""])
def test_a_body_whose_header_names_another_length_is_the_clients_error(server: tuple[str, Server], length: str) -> None:
    kind, running = server
    body = malformed.good()
    del body["inputs"][0]["data"]
    body["inputs"][0]["parameters"] = {"binary_data_size": 3072}
    status, answer = post(
        running, malformed.json.dumps(body).encode() + bytes(3072), Inference_Header_Content_Length=length,
        Content_Type="application/octet-stream",
    )  # fmt: skip
    assert 400 <= status < 500 or (kind == "triton" and answer.startswith(TRITONS_OWN)), (kind, status, answer[:300])


def test_a_good_request_is_answered_after_all_of_this(server: tuple[str, Server]) -> None:
    _, running = server
    status, body = post(running, malformed.json.dumps(malformed.good(2)).encode())
    assert status == 200, body[:300]


def test_only_outputs_that_exist_can_be_asked_for_and_only_those_are_sent(server: tuple[str, Server]) -> None:
    _, running = server
    for names, wanted in ((["route"], 200), (["logits", "route"], 200), (["logit"], 400)):
        asked = malformed.good() | {"outputs": [{"name": name} for name in names]}
        status, body = post(running, malformed.json.dumps(asked).encode())
        assert status == wanted, body[:300]
        if status == 200:
            assert {one["name"] for one in malformed.json.loads(body)["outputs"]} == set(names)


def test_answers_and_refusals_are_counted_where_the_server_publishes_its_metrics(server: tuple[str, Server]) -> None:
    _, running = server
    assert post(running, malformed.json.dumps(malformed.good()).encode())[0] == 200
    refused = malformed.good() | {"parameters": {"route": "slimm"}}
    assert post(running, malformed.json.dumps(refused).encode())[0] == 400
    deadline, text = time.monotonic() + 30, ""
    seen = ('route="wide"', 'reason="malformed"')
    while not all(one in text for one in seen) and time.monotonic() < deadline:  # Triton publishes after a while
        with urllib.request.urlopen(f"http://{running.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        time.sleep(0.1)
    lines = [line for line in text.splitlines() if line.startswith("klas_zoo_")]
    for wanted in ("answers_total", "refusals_total", "request_seconds_bucket", "queue_images", "batch_images_count"):
        assert any(line.startswith(f"klas_zoo_{wanted}") and 'model="made-up"' in line for line in lines), wanted

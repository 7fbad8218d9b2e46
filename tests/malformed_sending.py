"""Malformed requests sent to a running server, beside good ones, which all have to be answered."""

from __future__ import annotations

import http.client
import random
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import malformed
import numpy as np
import packages
from protocol import ask, client_of, images, torchs_logits
from server_processes import Server, kserve, mlserver, triton
from tritonclient.grpc import service_pb2, service_pb2_grpc

from klas_zoo.exporters.to_triton import TritonSettings, write_repository

SERVERS = ("triton", "kserve", "mlserver")
LARGEST = 8
CLIENTS_FAULT = (
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)  # fmt: skip

SERVERS_OWN = {"mlserver": ("cut", "long", "type", "shape")}
"""gRPC messages that a server answers as an internal error before the model sees them: MLServer unpacks raw tensors by
the shape and type they claim, and expects no mistake there."""
TRITONS_OWN = (b'{"error":"Unable to parse', b'{"error":"failed to parse')
"""How Triton answers JSON that it cannot read, with 500 and before the model sees it. It reads nested lists as flat
ones, and 2.51 dies of a shape in JSON that exceeds the machine's memory."""


GRPC = (
    "cut", "long", "nothing", "type", "shape", "NaN", "contents", "name", "twice", "latency", "route", "parameter",
    "batch",
)  # fmt: skip


@dataclass(kw_only=True)
class Report:
    """What became of malformed requests, and of good ones beside them.

    Attributes:
        seen: how often each status came.
        wrong: answers that are not the client's error: what was wrong with the request, the status, the answer.
        servers_own: those of them that the server gave before the model saw the request.
        right: good requests that were answered rightly.
        lost: those that were not.
    """

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    servers_own: list[tuple[str, str, str]] = field(default_factory=list)
    right: int = 0
    lost: list[str] = field(default_factory=list)


@contextmanager
def started(kind: str, folder: Path) -> Iterator[Server]:
    """One of `SERVERS` with a package, the model `made-up`, that takes batches of up to `LARGEST` images."""
    package = packages.write_package(folder / "package")
    if kind == "triton":
        write_repository(package, folder / "repository", TritonSettings(largest_batch=LARGEST))
        options = ("--model-control-mode=explicit", "--load-model=made-up")
        starting = triton(folder / "repository" / "models", folder, *options)
    elif kind == "kserve":
        starting = kserve(package.folder, folder, "made-up", f"--largest_batch={LARGEST}")
    else:
        starting = mlserver(package.folder, folder, "made-up", largest_batch=LARGEST)
    with starting as server:
        yield server


def over_http(kind: str, server: Server) -> Report:
    """200 requests; 195 to Triton, which is sent no shape that exceeds the machine's memory."""
    report = Report()
    with Neighbours(kind, server, report):
        for one in (*malformed.requests(seed=3, count=170), *malformed.broken_bodies(seed=3, count=30)):
            if kind == "triton" and one.what == "huge shape":
                continue
            status, body = post(server, one.body)
            report.seen[str(status)] += 1
            if not 400 <= status < 500 or len(body) > 20_000:
                own = kind == "triton" and (body.startswith(TRITONS_OWN) or one.what == "a list among numbers")
                (report.servers_own if own else report.wrong).append((one.what, str(status), repr(body[:200])))
    return report


def over_grpc(kind: str, server: Server) -> Report:
    """200 requests."""
    report, draw = Report(), random.Random(4)
    with grpc.insecure_channel(server.grpc) as channel, Neighbours(kind, server, report):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(200):
            what, message = _message(draw)
            code, details = "OK", ""
            try:
                stub.ModelInfer(message, timeout=60)
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
            report.seen[getattr(code, "name", code)] += 1
            if code not in CLIENTS_FAULT:
                own = code == grpc.StatusCode.INTERNAL and what in SERVERS_OWN.get(kind, ())
                told = (what, str(code), f"{details[:100]} | {str(message)[:100]}")
                (report.servers_own if own else report.wrong).append(told)
    return report


def post(server: Server, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer to an infer request; 0 where there was none."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    try:
        given = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        connection.request("POST", "/v2/models/made-up/infer", body, given)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error).encode()
    finally:
        connection.close()


class Neighbours:
    """Good requests that are sent all the time meanwhile, four at a time; every one has to be answered rightly."""

    def __init__(self, kind: str, server: Server, report: Report) -> None:
        self._server, self._binary = server, kind != "mlserver"  # which takes no bytes over HTTP
        self._report, self._done = report, threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(seed, images(1, seed))) for seed in range(4)]
        self._wanted = [torchs_logits(packages.SLIM, images(1, seed)) for seed in range(4)]

    def __enter__(self) -> None:
        for one in self._threads:
            one.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for one in self._threads:
            one.join()

    def _ask(self, seed: int, asked: np.ndarray) -> None:
        with client_of("grpc" if seed % 2 else "http", self._server) as client:
            while not self._done.is_set():
                try:
                    found = ask(client, "made-up", asked, binary=self._binary, route="slim").as_numpy("logits")
                    np.testing.assert_allclose(found, self._wanted[seed], atol=1e-4)
                    self._report.right += 1
                except Exception as error:
                    with self._lock:
                        self._report.lost.append(repr(error)[:300])


def _message(draw: random.Random) -> tuple[str, Any]:
    """A gRPC request with one thing wrong."""
    message = service_pb2.ModelInferRequest(model_name="made-up")
    tensor = message.inputs.add(name="images", datatype="FP32", shape=[1, *packages.SHAPE])
    raw = [struct.pack("<768f", *[0.5] * 768)]
    what = draw.choice(GRPC)
    if what == "cut":
        raw = [raw[0][: draw.randrange(3072)]]
    elif what == "long":
        raw = [raw[0] + bytes(draw.choice([1, 4, 3072]))]
    elif what == "nothing":
        raw = []
    elif what == "type":
        tensor.datatype = draw.choice(["FP64", "INT32", "BYTES", "BOOL", "", "fp33", "FP16"])
    elif what == "shape":
        del tensor.shape[:]
        tensor.shape.extend(draw.choice([[], [1], [1, 3, 8, 8], [-1, 3, 16, 16], [0, 3, 16, 16], [2**62, 3, 16, 16]]))
    elif what == "NaN":
        raw = [struct.pack("<768f", *[0.5] * 767, draw.choice([float("nan"), float("inf")]))]
    elif what == "contents":
        raw = []
        tensor.contents.int_contents.extend([1] * draw.randrange(1, 700))
    elif what == "name":
        tensor.name = draw.choice(["", "image", "x" * 10_000])
    elif what == "twice":
        message.inputs.add(name=draw.choice(["images", "x"]), datatype="FP32", shape=[1, *packages.SHAPE])
        raw = [*raw, *raw]
    elif what == "latency":
        message.parameters["latency_ms"].string_param = draw.choice(["soon", "", "nan", "0", "-5ms", "1ns"])
    elif what == "route":
        message.parameters["route"].string_param = draw.choice(["slimm", "", "z" * 100_000])
    elif what == "parameter":
        message.parameters[draw.choice(["latency_ms", "route"])].bool_param = True
    else:
        del tensor.shape[:]
        tensor.shape.extend([LARGEST + 1, *packages.SHAPE])
        raw = [bytes(3072 * (LARGEST + 1))]
    message.raw_input_contents.extend(raw)
    return what, message

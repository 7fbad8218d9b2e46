"""Open Inference Protocol requests to any server, by Triton's own client."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# other tests fork; a child that never uses gRPC needs none of its handlers, which can wait for ever
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import numpy as np
import packages
import torch
import tritonclient.grpc
import tritonclient.http
from server_processes import Server

KINDS: dict[str, Any] = {"http": tritonclient.http, "grpc": tritonclient.grpc}


@contextmanager
def client_of(kind: str, server: Server) -> Iterator[Any]:
    """`kind` is http or grpc; it is `client.kind` afterwards."""
    address = server.http if kind == "http" else server.grpc
    with KINDS[kind].InferenceServerClient(address) as client:
        client.kind = kind
        yield client


def ask(client: Any, model: str, images: np.ndarray, *, binary: bool = True, **parameters: Any) -> Any:
    """What a model answers to images; `binary`: as bytes over HTTP, not as JSON."""
    library = KINDS[client.kind]
    sent = library.InferInput("images", list(images.shape), "FP32")
    options: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if client.kind == "http":
        sent.set_data_from_numpy(images, binary_data=binary)
        if not binary:
            options["outputs"] = [library.InferRequestedOutput(n, binary_data=False) for n in ("logits", "route")]
            options["headers"] = {"Content-Type": "application/json"}
    else:
        sent.set_data_from_numpy(images)
    return client.infer(model, [sent], request_id="1", **options)


def route_of(answer: Any) -> str:
    """The route that answered; the same for every image."""
    (name,) = {str(one.decode() if isinstance(one, bytes) else one) for one in answer.as_numpy("route").flat}
    return name


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *packages.SHAPE), dtype=np.float32)


def torchs_logits(route: Any, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return packages.supernet()(torch.from_numpy(images), route).numpy()

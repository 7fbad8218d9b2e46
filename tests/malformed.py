"""Requests that no server may answer, drawn with a seed: each is a good request with one thing wrong."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import packages

Change = Callable[[random.Random, dict[str, Any]], None]
_SIZE = packages.SHAPE[0] * packages.SHAPE[1] * packages.SHAPE[2]


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """A request body, and what is wrong with it.

    Attributes:
        request: as JSON objects; None where the body is no JSON.
    """

    what: str
    request: dict[str, Any] | None
    body: bytes


def good(batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """A request that is answered, as JSON objects."""
    draw = random.Random(seed)
    data = [round(draw.uniform(-2, 2), 3) for _ in range(batch * _SIZE)]
    return {
        "id": "1",
        "inputs": [{"name": "images", "shape": [batch, *packages.SHAPE], "datatype": "FP32", "data": data}],
    }


def requests(seed: int, count: int) -> Iterator[Malformed]:
    """`count` malformed requests, every kind about equally often."""
    draw = random.Random(seed)
    kinds = list(_CHANGES)
    for number in range(count):
        what = kinds[number % len(kinds)]
        request = copy.deepcopy(good(draw.randint(1, 2), seed=number))
        _CHANGES[what](draw, request)
        yield Malformed(what=what, request=request, body=json.dumps(request).encode())


def broken_bodies(seed: int, count: int) -> Iterator[Malformed]:
    """Bodies that are no Open Inference Protocol requests at all, or no JSON."""
    draw = random.Random(seed)
    for number in range(count):
        body = json.dumps(good(seed=number)).encode()
        what = ("cut", "byte", "container", "missing", "nothing")[number % 5]
        if what == "cut":
            body = body[: draw.randrange(1, len(body) - 1)]
        elif what == "byte":
            at = draw.randrange(2)
            body = body[:at] + bytes([draw.choice(b"\x00\xff\\}]")]) + body[at + 1 :]
        elif what == "container":
            body = json.dumps(
                draw.choice([[], 5, "text", None, True, {"inputs": 5}, {"inputs": {}}, {"inputs": "x"}])
            ).encode()
        elif what == "missing":
            request = good(seed=number)
            del request["inputs"][0][draw.choice(["name", "shape", "datatype", "data"])]
            body = json.dumps(request).encode()
        else:
            body = b""
        yield Malformed(what=what, request=None, body=body)


def _input(**values: Callable[[random.Random], Any]) -> Change:
    def change(draw: random.Random, request: dict[str, Any]) -> None:
        request["inputs"][0] |= {name: value(draw) for name, value in values.items()}

    return change


def _value(make: Callable[[random.Random], Any]) -> Change:
    """One number of the data replaced."""

    def change(draw: random.Random, request: dict[str, Any]) -> None:
        data = request["inputs"][0]["data"]
        data[draw.randrange(len(data))] = make(draw)

    return change


def _parameter(make: Callable[[random.Random], dict[str, Any]]) -> Change:
    def change(draw: random.Random, request: dict[str, Any]) -> None:
        request["parameters"] = make(draw)

    return change


def _shape(draw: random.Random) -> Any:
    return draw.choice(
        [
            [], [1], [_SIZE], [1, 3, 16], [1, 3, 16, 16, 1], [1, 16, 16, 3], [0, 3, 16, 16], [-1, 3, 16, 16],
            [1, 3, 8, 32], [1, -3, -16, 16],
        ]
    )  # fmt: skip


def _nested(draw: random.Random) -> Any:
    """Rows of unequal length, or one level too few."""
    rows = [[[0.5] * 16 for _ in range(16)] for _ in range(3)]
    fault = draw.randrange(4)
    if fault == 0:
        rows[draw.randrange(3)][draw.randrange(16)].pop()
    elif fault == 1:
        rows[draw.randrange(3)].pop()
    elif fault == 2:
        rows[draw.randrange(3)][draw.randrange(16)] = 0.5  # type: ignore[call-overload]
    else:
        return [rows, rows]
    return [rows]


_CHANGES: dict[str, Change] = {
    "shape": _input(shape=_shape),
    "huge shape": _input(shape=lambda draw: draw.choice([[2**31, 3, 16, 16], [2**62, 3, 16, 16], [1, 3, 16, 2**40]])),
    "shape of another type": _input(
        shape=lambda draw: draw.choice(
            ["1,3,16,16", None, 5, {}, [1, "3", "x", 16], [1, 3.5, 16, 16], [[1], 3, 16, 16]]
        )
    ),
    "shape of null": _input(shape=lambda draw: [1, 3, None, 16]),
    "another type": _input(
        datatype=lambda draw: draw.choice(["FP64", "FP16", "BF16", "INT64", "INT32", "UINT8", "BOOL"])
    ),
    "no type": _input(datatype=lambda draw: draw.choice(["BYTES", "", "fp33", "FP32 ", None, 5, "x" * 1000])),
    "another name": _input(name=lambda draw: draw.choice(["image", "", "IMAGES", "logits", None, 5, "x" * 10_000])),
    "too few numbers": lambda draw, request: request["inputs"][0]["data"].pop(),
    "too many numbers": lambda draw, request: request["inputs"][0]["data"].append(0.5),
    "no numbers": _input(data=lambda draw: []),
    "data of another type": _input(data=lambda draw: draw.choice([None, 5, "text", {}, True])),
    "text": _value(lambda draw: draw.choice(["0.5", "x", ""])),
    "only text": _input(data=lambda draw: ["0.5"] * _SIZE),
    "null": _value(lambda draw: None),
    "boolean": _value(lambda draw: draw.choice([True, False])),
    "a list among numbers": _value(lambda draw: draw.choice([[], [0.5], [[0.5]]])),
    "an object among numbers": _value(lambda draw: {}),
    "ragged": _input(shape=lambda draw: [1, 3, 16, 16], data=_nested),
    "beyond fp32": _value(lambda draw: draw.choice([1e39, -1e300, 10**60])),
    "NaN": _value(lambda draw: float("nan")),
    "infinity": _value(lambda draw: draw.choice([float("inf"), float("-inf")])),
    "huge number": _value(lambda draw: 10**400),
    "two inputs": lambda draw, request: request["inputs"].append(
        dict(request["inputs"][0], name=draw.choice(["images", "x"]))
    ),
    "no inputs": lambda draw, request: request["inputs"].clear(),
    "batch too large": lambda draw, request: request.update(good(draw.randint(9, 12))),
    "latency of another type": _parameter(
        lambda draw: {"latency_ms": draw.choice([True, False, [5], {"ms": 5}, [], [[5]]])}
    ),
    "latency of null or none": _parameter(
        lambda draw: {"latency_ms": draw.choice(["", " ", "null", "None", "nan", "inf", "-inf"])}
    ),
    "latency text": _parameter(
        lambda draw: {
            "latency_ms": draw.choice(["soon", "5 parsecs", "1_000", "٣", "\x1b[31m5", "5ms5", "0x5", "x" * 10_000])
        }
    ),
    "latency out of range": _parameter(
        lambda draw: {"latency_ms": draw.choice([0, -1, -0.5, "0", "-5", "0ms", float("nan"), float("inf")])}
    ),
    "latency huge": _parameter(lambda draw: {"latency_ms": draw.choice([10**400, -(10**400), "1" * 400])}),
    "latency too short": _parameter(lambda draw: {"latency_ms": draw.choice(["1ns", 1e-9, "0.000001us"])}),
    "route unknown": _parameter(
        lambda draw: {"route": draw.choice(["slimm", "", " ", "../slim", "slim\x00", "z" * 300, "ü"])}
    ),
    "route huge": _parameter(lambda draw: {"route": "z" * draw.choice([10_000, 1_000_000])}),
    "route of another type": _parameter(
        lambda draw: {"route": draw.choice([5, 0.5, True, ["slim"], {"name": "slim"}])}
    ),
    "both": _parameter(lambda draw: {"route": "slim", "latency_ms": draw.choice([5, "5ms", 60_000])}),
}

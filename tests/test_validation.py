"""What is refused of a request, with a sentence, before anything is computed: the same for every server."""

from __future__ import annotations

import difflib
import math

import malformed
import numpy as np
import packages
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.errors import BadQuantity, UnknownName, UsageError
from klas_zoo.serving.validation import Tensor, Wish, read_images, read_outputs, read_wish

SHAPE = packages.SHAPE
COUNT = math.prod(SHAPE)


def tensor(**changes: object) -> Tensor:
    whole = {"name": "images", "datatype": "FP32", "shape": [1, *SHAPE], "data": [0.5] * COUNT}
    return Tensor(**{**whole, **changes})  # type: ignore[arg-type]


def read(**changes: object) -> np.ndarray:
    return read_images([tensor(**changes)], SHAPE, 8)


IMAGES = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)


@pytest.mark.parametrize(
    "data",
    [IMAGES, IMAGES.tobytes(), memoryview(IMAGES.tobytes()), IMAGES.ravel().tolist(), IMAGES.tolist(), IMAGES.ravel()],
    ids=["array", "bytes", "memory", "flat", "nested", "flat array"],
)
def test_images_arrive_unchanged_however_a_server_decodes_them(data: object) -> None:
    found = read(shape=(2, *SHAPE), data=data)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, IMAGES)


def test_whole_numbers_are_numbers_of_json_too() -> None:
    np.testing.assert_array_equal(read(data=[1, *[0.5] * (COUNT - 1)])[0, 0, 0, :2], [1, 0.5])


def test_what_is_read_is_a_copy_of_what_the_server_may_take_back() -> None:
    held = IMAGES.copy()
    found = read(shape=(2, *SHAPE), data=held)
    held[:] = 0
    np.testing.assert_array_equal(found, IMAGES)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1)])
def test_nested_images_of_few_pixels_are_read(shape: tuple[int, ...]) -> None:
    images = np.arange(4 * math.prod(shape), dtype=np.float32).reshape(4, *shape)
    whole = tensor(shape=[4, *shape], data=images.tolist())
    np.testing.assert_array_equal(read_images([whole], shape, 8), images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "image"}, "has one input, called images; this one has 1: 'image'"),
        ({"datatype": "FP64"}, "are FP32, not 'FP64'"),
        ({"datatype": None}, "are FP32, not None"),
        ({"shape": None}, r"list of whole numbers, \(B, 3, 16, 16\), not None"),
        ({"shape": [1, 3, 16, True]}, "list of whole numbers"),
        ({"shape": [1, 3, 16.0, 16]}, "list of whole numbers"),
        ({"shape": [1, 3, 8, 8]}, r"Images are \(B, 3, 16, 16\), B from 1 to 8, not \[1, 3, 8, 8\]"),
        ({"shape": [0, *SHAPE]}, "has no images: send 1 to 8"),
        ({"shape": [9, *SHAPE]}, "has 9 images; this server takes up to 8 at once"),
        ({"shape": [10**4000, *SHAPE]}, "has a number of more than 18 digits images"),
        ({"data": [0.5]}, "instead of|where their shape says"),
        ({"data": [0.5] * (COUNT + 1)}, "where their shape says 1"),
        ({"data": "text"}, "hold 'text' instead of a list"),
        ({"data": {}}, "hold a dict of 0 instead of a list"),
        ({"data": [None] * COUNT}, "hold null among their numbers"),
        ({"data": ["1"] * COUNT}, "hold text among their numbers"),
        ({"data": [True, *[0.5] * (COUNT - 1)]}, "hold bool among their numbers"),
        ({"data": [math.nan, *[0.5] * (COUNT - 1)]}, "hold NaN, infinity, or"),
        ({"data": [1e39, *[0.5] * (COUNT - 1)]}, "too large for FP32"),
        ({"data": [10**400, *[0.5] * (COUNT - 1)]}, "too large for FP32"),
        ({"data": np.full((1, *SHAPE), np.inf, np.float32)}, "hold NaN, infinity, or"),
        ({"data": np.zeros((1, *SHAPE))}, "768 values of float64; .* are 768 of float32"),
        ({"data": np.zeros((1, *SHAPE), np.int32)}, "values of int32"),
        ({"data": np.zeros((1, *SHAPE), object)}, "values of object"),
        ({"data": b"\x00" * 5}, "hold 5 bytes; .* are 3072"),
        ({"data": b"\xff" * 4 * COUNT}, "hold NaN"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as found:
        read(**changes)
    assert len(str(found.value)) < 400


def test_a_request_of_no_or_several_inputs_is_refused() -> None:
    for tensors in ([], [tensor(), tensor()], [tensor(), tensor(name="x")]):
        with pytest.raises(UsageError, match="has one input, called images"):
            read_images(tensors, SHAPE, 8)


@pytest.mark.parametrize(
    ("parameters", "wish"),
    [
        ({}, Wish()),
        ({"latency_ms": None, "route": None}, Wish()),
        ({"latency_ms": 3}, Wish(latency_ms=3.0)),
        ({"latency_ms": "1.5"}, Wish(latency_ms=1.5)),
        ({"latency_ms": "2500us"}, Wish(latency_ms=2.5)),
        ({"latency_ms": "800µs"}, Wish(latency_ms=0.8)),
        ({"route": "slim", "sequence_id": 7, "headers": {}}, Wish(route="slim")),
    ],
)
def test_a_wish_is_a_budget_or_a_route(parameters: dict[str, object], wish: Wish) -> None:
    assert read_wish(parameters) == wish


NO_TIMES = [
    0,
    -1,
    math.nan,
    math.inf,
    True,
    [5],
    {},
    b"5",
    10**400,
    "",
    "soon",
    "5 parsecs",
    "nan",
    "1_000",
    "٣",
    "1" * 99,
]


@pytest.mark.parametrize("latency", NO_TIMES, ids=lambda one: repr(one)[:20] if one != 10**400 else "10^400")
def test_a_budget_that_is_no_time_is_refused(latency: object) -> None:
    with pytest.raises(BadQuantity) as found:
        read_wish({"latency_ms": latency})
    assert str(found.value).isprintable() and len(str(found.value)) < 200


@pytest.mark.parametrize("route", ["", "z" * 257, 5, True, ["slim"], "slim\n", "\ud800", "\x1b[31m"], ids=repr)
def test_a_route_that_is_no_name_is_refused(route: object) -> None:
    with pytest.raises(UsageError, match="printable characters") as found:
        read_wish({"route": route})
    assert str(found.value).isprintable()


def test_a_budget_and_a_route_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="Pass one of latency_ms, mean_ms and route"):
        read_wish({"latency_ms": 5, "route": "slim"})


def test_outputs_are_those_that_are_asked_for() -> None:
    assert read_outputs([]) == ["logits", "route"]
    assert read_outputs(["route", "logits", "route"]) == ["route", "logits"]
    for name in ("", "logit", 5, None, ["logits"]):
        with pytest.raises(UsageError, match=r"There is no output .*: outputs are logits and route"):
            read_outputs(["logits", name])


def test_a_name_of_ten_megabytes_is_neither_compared_nor_sent_back(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *rest, **options: compared.append(len(name)) or [])
    error = UnknownName("route", "z" * 10**7, ["slim", "wide"])
    with pytest.raises(UsageError) as found:
        read_wish({"route": "z" * 10**7})
    assert max(compared) < 500 and len(str(error)) < 500 and len(str(found.value)) < 500


def test_every_malformed_request_of_the_generator_is_refused() -> None:
    for one in malformed.requests(seed=1, count=1000):
        assert one.request is not None
        tensors = [
            Tensor(
                name=entry.get("name"), datatype=entry.get("datatype"), shape=entry.get("shape"), data=entry.get("data")
            )
            for entry in one.request["inputs"]
        ]
        parameters = one.request.get("parameters", {})
        wish = None
        try:
            read_images(tensors, SHAPE, 8)
            wish = read_wish(parameters)
        except UsageError as error:
            assert len(str(error)) < 600 and str(error).isprintable(), one.what
        # what is left is known to be wrong only where routes and latencies are known
        assert wish is None or wish.route not in (None, *map(str, packages.ROUTES)) or (wish.latency_ms or 1) < 1e-3, (
            one
        )


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_whatever_a_request_holds_it_is_read_or_refused(
    name: object, datatype: object, shape: object, data: object, latency: object, route: object
) -> None:
    for changes in ({"name": name}, {"datatype": datatype}, {"shape": shape}, {"data": data}):
        try:
            read(**changes)
        except UsageError as error:
            assert str(error).isprintable()
    try:
        found = read_wish({"latency_ms": latency, "route": route})
    except UsageError as error:
        assert str(error).isprintable()
    else:
        assert found.latency_ms is None or 0 < found.latency_ms < math.inf

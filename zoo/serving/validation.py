"""What a request must be, the same for every server: one tensor of finite fp32 images, and parameters that make sense.

Servers decode requests differently, and some of them cast what does not fit. So each hands over what it received as
`Tensor`, and everything is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from klas_zoo.errors import BadQuantity, UsageError
from klas_zoo.units import parse_latency_ms

INPUT, DATATYPE = "images", "FP32"
OUTPUT, ROUTE = "logits", "route"
_LONGEST_TEXT = 64  # characters of a latency, and of a value that is repeated in a message
_LONGEST_ROUTE = 256
_MANY = (list, tuple, dict, set)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input of a request as the server received it; nothing of it is believed.

    Attributes:
        datatype: by the protocol's name, such as FP32.
        data: an array; bytes, little-endian, row-major; or numbers, flat or nested as `shape` says.
    """

    name: Any
    datatype: Any
    shape: Any
    data: Any


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a request wants to be answered.

    Attributes:
        latency_ms: the budget of the whole request, its time in the queue included; None: none was named.
        mean_ms: limit of the mean over images that an engine computes, its time in the queue not included.
        route: the name of the route that is to answer, not looked up yet; None: any.
    """

    latency_ms: float | None = None
    mean_ms: float | None = None
    route: str | None = None


def read_images(tensors: Sequence[Tensor], input_shape: tuple[int, ...], largest_batch: int) -> np.ndarray:
    """The images of a request, (B, *input_shape), float32.

    Raises:
        UsageError: they are missing, of another type or shape, too many, or not finite.
    """
    if len(tensors) != 1 or tensors[0].name != INPUT:
        names = ", ".join(_shown(one.name) for one in tensors[:4]) or "none"
        raise UsageError(f"A request has one input, called {INPUT}; this one has {len(tensors)}: {names}.")
    tensor = tensors[0]
    if tensor.datatype != DATATYPE:
        raise UsageError(f"{INPUT} are {DATATYPE}, not {_shown(tensor.datatype)}: convert them before they are sent.")
    shape = _shape(tensor.shape, input_shape, largest_batch)
    images = _numbers(tensor.data, shape)
    if not np.isfinite(images).all():
        raise UsageError(f"{INPUT} hold NaN, infinity, or a number that is too large for {DATATYPE}.")
    return images


def read_wish(parameters: Mapping[str, object]) -> Wish:
    """`latency_ms`, `mean_ms` and `route` of a request's parameters; all others are the server's own business.

    Raises:
        UsageError: several are given, or the route is no name.
        BadQuantity: `latency_ms` or `mean_ms` is no time above zero.
    """
    latency, mean, route = (parameters.get(name) for name in ("latency_ms", "mean_ms", "route"))
    if sum(one is not None for one in (latency, mean, route)) > 1:
        raise UsageError("Pass one of latency_ms, mean_ms and route.")
    if route is not None and not (isinstance(route, str) and 0 < len(route) <= _LONGEST_ROUTE and route.isprintable()):
        raise UsageError(f"route is a name of 1 to {_LONGEST_ROUTE} printable characters, not {_shown(route)}.")
    return Wish(
        latency_ms=None if latency is None else _milliseconds("latency_ms", latency),
        mean_ms=None if mean is None else _milliseconds("mean_ms", mean), route=route,
    )  # fmt: skip


def read_outputs(names: Sequence[Any]) -> list[str]:
    """The outputs that a request names, in its order; all of them where it names none.

    Raises:
        UsageError: there is no such output.
    """
    known = [OUTPUT, ROUTE]
    for name in names:
        if name not in known:
            raise UsageError(f"There is no output {_shown(name)}: outputs are {' and '.join(known)}.")
    return [str(name) for name in dict.fromkeys(names)] or known


def _shape(shape: Any, input_shape: tuple[int, ...], largest_batch: int) -> tuple[int, ...]:
    wanted = f"(B, {', '.join(map(str, input_shape))})"
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int for size in shape[:5]):
        raise UsageError(f"The shape of {INPUT} is a list of whole numbers, {wanted}, not {_shown(shape)}.")
    if tuple(shape[1:]) != input_shape:
        raise UsageError(f"{INPUT.capitalize()} are {wanted}, B from 1 to {largest_batch}, not {_shown(list(shape))}.")
    if shape[0] < 1:
        raise UsageError(f"The request has no images: send 1 to {largest_batch}.")
    if shape[0] > largest_batch:
        raise UsageError(
            f"The request has {_shown(shape[0])} images; this server takes up to {largest_batch} at once: send them in "
            "parts."
        )
    return tuple(shape)


def _numbers(data: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of its own: what the server holds may be memory it takes back."""
    count = math.prod(shape)
    if isinstance(data, np.ndarray):
        if data.dtype != np.float32 or data.size != count:
            raise UsageError(f"{INPUT} hold {data.size} values of {data.dtype}; {list(shape)} are {count} of float32.")
        return data.reshape(shape).copy()
    if isinstance(data, (bytes, bytearray, memoryview)):
        if len(data) != 4 * count:
            raise UsageError(f"{INPUT} hold {len(data)} bytes; {list(shape)} of {DATATYPE} are {4 * count}.")
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
    if not isinstance(data, (list, tuple)):
        raise UsageError(f"{INPUT} hold {_shown(data)} instead of a list of numbers.")
    nested = len(data) != count or isinstance(data[0], (list, tuple))
    flat = list(_flattened(data, shape)) if nested else data
    if len(flat) != count:
        raise UsageError(f"{INPUT} hold {len(flat)} numbers; {list(shape)} are {count}.")
    odd = set(map(type, flat)) - {int, float}
    if odd:
        kinds = ", ".join(sorted({type(None): "null", str: "text"}.get(kind, kind.__name__) for kind in odd))
        raise UsageError(f"{INPUT} hold {kinds} among their numbers.")
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype=np.float64).astype(np.float32).reshape(shape)
    except OverflowError as error:
        raise UsageError(f"{INPUT} hold a number that is too large for {DATATYPE}.") from error


def _flattened(data: Any, shape: tuple[int, ...]) -> Iterator[Any]:
    """The numbers of nested lists, which have to be nested as the shape says."""
    if not isinstance(data, (list, tuple)) or len(data) != shape[0]:
        held = f"{len(data)} entries" if isinstance(data, (list, tuple)) else _shown(data)
        raise UsageError(f"{INPUT} hold {held} where their shape says {shape[0]}: all rows are equally long.")
    if len(shape) == 1:
        yield from data
        return
    for one in data:
        yield from _flattened(one, shape[1:])


def _milliseconds(name: str, value: object) -> float:
    """From a number, or from text such as `5` or `800us`."""
    if isinstance(value, str):
        try:
            # no digits of other scripts, no 1_000
            number = float(value) if value.isascii() and "_" not in value and len(value) <= _LONGEST_TEXT else None
        except ValueError:
            number = None
        if number is None and value.isprintable():
            return parse_latency_ms(value)
        value = number if number is not None else value
    try:
        found = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not 0 < found < math.inf:
        raise BadQuantity(f"{name} is a time above zero in milliseconds, not {_shown(value)}.")
    return found


def _shown(value: object) -> str:
    """A value from outside, short enough for a message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a number of more than 18 digits"  # Python refuses to write very long ones
    if isinstance(value, (list, tuple)) and len(value) <= 8 and not any(isinstance(one, _MANY) for one in value):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, _MANY):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    text = repr(value[:_LONGEST_TEXT] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= _LONGEST_TEXT + 2 else f"{text[:_LONGEST_TEXT]}…"

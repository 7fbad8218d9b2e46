"""How a server runs a family: the same settings for Triton, KServe and MLServer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from klas_zoo.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """
    Attributes:
        threads: of onnxruntime; None or 0: one for each physical core that the container's quota leaves.
        largest_batch: images of one request, and of requests that are merged.
        queue_images: that may wait; a request beyond them is refused as an overload.
        target_ms: budget of requests that name none; a controller then keeps their tail latency below it. None: no
            budget, the most accurate route answers.
        calibrate: measure latencies that the package does not know, while no request waits.

    Raises:
        UsageError: a value is out of range.
    """

    threads: int | None = None
    largest_batch: int = 32
    queue_images: int = 256
    target_ms: float | None = None
    calibrate: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 0:
            raise UsageError(f"threads is 0 (one for each core) or more, not {self.threads}.")
        if self.largest_batch < 1:
            raise UsageError(f"largest_batch is at least 1, not {self.largest_batch}.")
        if self.queue_images < self.largest_batch:
            raise UsageError(
                f"queue_images is at least largest_batch, {self.largest_batch}, not {self.queue_images}: a full batch "
                "has to fit."
            )
        if self.target_ms is not None and not 0 < self.target_ms < math.inf:
            raise UsageError(f"target_ms is a time above zero in milliseconds, not {self.target_ms}.")

    @classmethod
    def read(cls, values: Mapping[str, object]) -> ServingSettings:
        """From a server's configuration, whose values may be text; unknown names are refused.

        Raises:
            UsageError: a name is unknown, or a value is no number or out of range.
        """
        known = [one.name for one in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"The model's configuration has no parameter {name!r}: known: {', '.join(known)}.")
        return cls(**{name: _READ[name](name, value) for name, value in values.items()})  # type: ignore[arg-type]


def _whole(name: str, value: object) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise UsageError(f"{name} is a whole number, not {value!r}.")
    return int(number)


def _number(name: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} is a number, not {value!r}.") from error


def _flag(name: str, value: object) -> bool:
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise UsageError(f"{name} is true or false, not {value!r}.")
    return found


_READ = {"threads": _whole, "largest_batch": _whole, "queue_images": _whole, "target_ms": _number, "calibrate": _flag}

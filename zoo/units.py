"""Quantities as people write them on a command line, and as tables show them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from klas_zoo.errors import BadQuantity

_NUMBER = re.compile(r"\s*((?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*([a-zA-Zµμ]*)\s*", re.ASCII | re.IGNORECASE)
_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "μs": 1e-3, "ms": 1.0, "s": 1e3}
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip


def _parse(text: str, units: Mapping[str, float], what: str, forms: str) -> float:
    match = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    scale = units.get(match.group(2).lower()) if match else None
    value = float(match.group(1)) * scale if match and scale else 0.0
    if not 0 < value < math.inf:
        shown = text if len(text) <= 64 else text[:61] + "..."
        raise BadQuantity(f"'{shown}' is not a {what}: write {forms}, a number above zero and its unit.")
    return value


def parse_latency_ms(text: str) -> float:
    """Milliseconds from `5ms`, `200us` or `1.5s`.

    Raises:
        BadQuantity: the text has no unit, an unknown unit, or is not above zero.
    """
    return _parse(text, _MILLISECONDS, "latency", "it as 5ms, 200us or 1.5s")


def parse_size_bytes(text: str) -> int:
    """Bytes from `50MB` (10^6), `48MiB` (2^20), `900kB` or `1GB`.

    Raises:
        BadQuantity: the text has no unit, an unknown unit, or is not above zero.
    """
    return max(1, round(_parse(text, _BYTES, "size", "it as 50MB, 48MiB, 900kB or 1GB")))


def format_latency(latency_ms: float) -> str:
    """`0.412 ms`, `12.3 ms`, `1.52 s`: three significant digits."""
    if latency_ms >= 999.5:
        return f"{latency_ms / 1_000:.{_decimals(latency_ms / 1_000)}f} s"
    return f"{latency_ms:.{_decimals(latency_ms)}f} ms"


def format_size(size_bytes: int) -> str:
    """`812 kB`, `14.2 MB`: powers of ten."""
    if size_bytes < 1_000:
        return f"{size_bytes} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        # not 1000: what rounds to it belongs to the next unit
        if size_bytes < scale * 999.5:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes / 1e9:.2f} GB"


def format_macs(macs: float) -> str:
    """`6.6 M`, `1.26 G`, `1.02 T`: multiply-adds (1 MAC = 2 FLOPs)."""
    for unit, scale in (("M", 1e6), ("G", 1e9)):
        if macs < scale * 999.5:
            return f"{macs / scale:.3g} {unit}"
    return f"{macs / 1e12:.3g} T"


def _decimals(value: float) -> int:
    """How many decimals show three significant digits; 12 at most."""
    return min(12, max(0, 2 - math.floor(math.log10(value)))) if value > 0 else 3


def printable(text: str) -> str:
    """A text from outside as terminals can show it: control characters and halves of characters as escapes.

    Line breaks stay.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)

"""Protocol buffers' text format, as much of it as a server's model configuration needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """A name of an enumeration, which stands without quotes."""

    __slots__ = ()


def to_text(message: Mapping[str, Any], indent: str = "") -> str:
    """A message, a field a line; sequences are repeated fields, None is left out."""
    lines = []
    for name, value in message.items():
        repeated = isinstance(value, Sequence) and not isinstance(value, str)
        for one in value if repeated else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{indent}{name} {{\n{to_text(one, indent + '  ')}{indent}}}\n")
            elif one is not None:
                lines.append(f"{indent}{name}: {_scalar(one)}\n")
    return "".join(lines)


def entries(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A map field: its entries are messages of key and value."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        return json.dumps(value, ensure_ascii=True)  # the format knows JSON's escapes, \u among them
    return str(value)

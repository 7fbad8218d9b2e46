"""Taking checked fields out of a JSON object; errors say which field of which file was wrong and how."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.profile import LONGEST_MS, SCHEMA_VERSION
from klas_zoo.stored import refuse_newer


class Fields:
    """The fields of one object, each taken once; `nothing_left` refuses those that nobody asked for."""

    def __init__(self, table: Mapping[str, Any], where: str, path: str) -> None:
        self.table, self.where, self.path = table, where, path
        self._left = set(table)

    def error(self, name: str, wanted: str, found: object = ...) -> ProfileError:
        found = self.table.get(name) if found is ... else found
        return ProfileError(f"{self.where}: {self.path}{name} has to be {wanted}, not {_shown(found)}.")

    def check_schema(self) -> None:
        refuse_newer(self.integer("schema_version", least=1), SCHEMA_VERSION, self.where, ProfileError)

    def peek(self, name: str, kind: type) -> Any:
        if name not in self.table:
            raise ProfileError(f"{self.where}: {self.path}{name} is missing.")
        value = self.table[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, _KINDS[kind])
        return value

    def take(self, name: str, kind: type) -> Any:
        value = self.peek(name, kind)
        self._left.discard(name)
        return value

    def text(self, name: str, *, optional: bool = False, empty: bool = False) -> Any:
        if optional and self.table.get(name, ...) is None:
            self._left.discard(name)
            return None
        value = self.take(name, str)
        if not value and not empty:
            raise self.error(name, "a text that is not empty")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> Any:
        value = self.take(name, str)
        if value not in choices:
            raise self.error(name, f"one of {', '.join(choices)}")
        return value

    def integer(self, name: str, *, least: int) -> int:
        value: int = self.take(name, int)
        if value < least or value > 10**18:
            raise self.error(name, f"a whole number from {least} on")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        value = self.take(name, float if isinstance(self.table.get(name), float) else int)
        if not least <= value <= most:
            raise self.error(name, f"between {least:g} and {most:g}")
        return float(value)

    def numbers(self, name: str) -> list[float]:
        inner = Fields(dict(enumerate(self.take(name, list))), self.where, f"{self.path}{name}.")  # type: ignore[arg-type]
        return [inner.number(index, 0, LONGEST_MS) for index in inner.table]

    def whole(self, *, name: str, count: int, least: int = 1) -> list[int]:
        values = self.take(name, list)
        inner = Fields(dict(enumerate(values)), self.where, f"{self.path}{name}.")  # type: ignore[arg-type]
        if len(values) != count:
            raise self.error(name, f"{count} numbers", f"{len(values)} of them")
        return [inner.integer(index, least=least) for index in inner.table]

    def inner(self, name: str) -> Fields:
        return Fields(self.take(name, dict), self.where, f"{self.path}{name}.")

    def children(self) -> list[tuple[str, Fields]]:
        return [(name, self.inner(name)) for name in list(self.table)]

    def object(self, value: object, name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.error(name, "an object", value)
        return value

    def each(self, name: str, read: Callable[[Fields], Any]) -> list[Any]:
        return [
            read(Fields(self.object(one, f"{name}[{index}]"), self.where, f"{self.path}{name}[{index}]."))
            for index, one in enumerate(self.take(name, list))
        ]

    def maybe(self, name: str, read: Callable[[Fields], Any]) -> Any:
        if self.table.get(name, ...) is None:
            self._left.discard(name)
            return None
        return read(self.inner(name))

    def nothing_left(self, besides: tuple[str, ...] = ()) -> None:
        left = sorted(map(str, self._left - set(besides)))
        if left:
            raise ProfileError(f"{self.where}: nobody knows the fields {', '.join(self.path + one for one in left)}.")


_KINDS: Mapping[type, str] = {
    str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object",
}  # fmt: skip


def _shown(value: object) -> str:
    text = value if isinstance(value, str) and value.endswith("of them") else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

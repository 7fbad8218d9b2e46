"""Reading JSON and TOML that others wrote: into frozen dataclasses, by msgspec, which checks what their types say.

    @dataclass(frozen=True, kw_only=True)
    class Chunk:
        sha256: Sha256
        size_bytes: Annotated[int, Meta(gt=0)]

    chunk = read(content, Chunk, "chunk.json", RemoteError)

What a type cannot say is checked in `__post_init__`, which raises ValueError. Every error is one sentence with the
file's name and the field's path: `chunk.json: size_bytes is not valid: expected int >= 1, not 0.` Imports nothing
heavy.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from klas_zoo.errors import KlasZooError

T = TypeVar("T")
Error = type[KlasZooError]
_PLAIN_NAME, _SHA256 = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,254}", r"[0-9a-f]{64}"
PlainName = Annotated[str, Meta(pattern=rf"\A{_PLAIN_NAME}\Z")]
"""Names a file of its own folder: no path, nothing hidden, nothing a file system would not take."""
Sha256 = Annotated[str, Meta(pattern=rf"\A{_SHA256}\Z")]
"""As hexdigest() writes it."""
Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0, le=10**18)]
Positive = Annotated[int, Meta(ge=1, le=10**18)]
Share = Annotated[float, Meta(ge=0, le=1)]
Percent = Annotated[float, Meta(ge=0, le=100)]


def read(
    content: str | bytes,
    kind: type[T],
    where: str,
    error: Error,
    *,
    form: Literal["JSON", "TOML"] = "JSON",
    newest: int | None = None,
    advice: str = "",
    **options: Any,
) -> T:
    """The whole content of a file as a `kind`.

    Args:
        where: the file or URL, for messages.
        error: what is raised.
        newest: the newest `schema_version` that this version knows, for files that have one.
        advice: what to do next, a sentence.
        options: see `convert`.

    Raises:
        KlasZooError: of the kind `error`.
    """
    try:
        table = parse(content, where, error, form=form)
        if newest is not None:
            check_schema(table, newest, where, error)
            table.pop("schema_version")
        return convert(table, kind, where, error, **options)
    except error as wrong:
        raise error(f"{wrong} {advice}".rstrip()) from wrong


def parse(
    content: str | bytes, where: str, error: Error, *, form: Literal["JSON", "TOML"] = "JSON"
) -> dict[str, Any]:
    """The table that JSON or TOML describes, nothing in it checked yet."""
    try:
        text = content if isinstance(content, str) else content.decode()
        # not msgspec's own parser: it does not say which word is no number
        table = tomllib.loads(text) if form == "TOML" else json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as wrong:
        what = "it is no text" if isinstance(wrong, UnicodeDecodeError) else wrong
        raise error(f"{where} is not {form}: {what}.") from wrong
    if not isinstance(table, dict):
        raise error(f"{where} is not valid: its outermost value is no object.")
    return table


def convert(
    table: Any,
    kind: type[T],
    where: str,
    error: Error,
    *,
    path: str = "",
    more: bool = False,
    hook: Callable[[type, Any], Any] | None = None,
) -> T:
    """A table as a `kind`.

    Args:
        path: of the table within the file, with a point at its end.
        more: leave out fields that `kind` does not have, instead of refusing them.
        hook: makes values of types that msgspec does not know; may raise ValueError.
    """
    try:
        found = msgspec.convert(table, kind, dec_hook=hook)
    except UnicodeEncodeError as wrong:  # a lone surrogate, which JSON can spell and no text contains
        found_in = path or "a field"
        raise error(f"{where}: {found_in} contains {wrong.object[wrong.start]!r}, which is no character.") from wrong
    except msgspec.ValidationError as wrong:
        what, _, place = str(wrong).partition(" - at `$")
        place = place.strip(".`")
        at = f"{where}: {path}{place}" if place else f"{where}: {path[:-1]}" if path else where
        raise error(f"{at} is not valid: {_sentence(what.replace('`', ''), table, kind, place)}.") from wrong
    if not more and (unknown := sorted(_unknown(table, msgspec.to_builtins(found, enc_hook=str), path))):
        raise error(f"{where}: unknown fields {', '.join(unknown)}.")
    return found


def check_schema(table: Any, newest: int, where: str, error: Error) -> None:
    """Refuses a table without the `schema_version` of a klas-zoo up to this one."""
    version = schema_of(table)
    if version is None:
        raise error(f"{where} was not written by klas-zoo: it has no schema_version.")
    refuse_newer(version, newest, where, error)


def schema_of(table: Any) -> int | None:
    """The `schema_version` of what JSON gave; None where it has none that klas-zoo could have written."""
    version = table.get("schema_version") if isinstance(table, dict) else None
    return version if type(version) is int and version >= 1 else None


def refuse_newer(found: int, known: int, where: str, error: Error) -> None:
    """
    Args:
        where: the file or URL, for the message.

    Raises:
        KlasZooError: of the kind `error`, where `found` is a schema that this version does not know.
    """
    if found > known:
        raise error(
            f"{where} was written by a newer klas-zoo: its schema is {found}, this one knows up to {known}. "
            "Upgrade klas-zoo."
        )


def is_plain_name(value: object) -> bool:
    """Whether it is a `PlainName`."""
    return isinstance(value, str) and bool(re.fullmatch(_PLAIN_NAME, value))


def is_sha256(value: object) -> bool:
    """Whether it is a `Sha256`."""
    return isinstance(value, str) and bool(re.fullmatch(_SHA256, value))


def _sentence(what: str, table: Any, kind: Any, place: str) -> str:
    """msgspec's words for what is wrong, with the value that was found and those that would have been right."""
    what = what[0].lower() + what[1:]
    if what.startswith("invalid enum value"):
        found = what.removeprefix("invalid enum value ")
        return f"expected one of {', '.join(map(repr, _choices(kind, place)))}, not {found}"
    if not what.startswith("expected") or "[...]" in place:  # msgspec does not say which value of a mapping it is
        return what
    for name, index in re.findall(r"([A-Za-z_]\w*)|\[(\d+)\]", place):
        table = table[name] if name else table[int(index)]
    shown = repr(table)
    return f"{what.partition(', got ')[0]}, not {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _choices(kind: Any, path: str) -> tuple[Any, ...]:
    """The values of the Literal at a path within a dataclass."""
    for name in re.findall(r"[A-Za-z_]\w*", path):
        kind = get_type_hints(next(filter(is_dataclass, _parts(kind))))[name]
    return next(get_args(one) for one in _parts(kind) if get_origin(one) is Literal)


def _parts(kind: Any) -> Iterator[Any]:
    yield kind
    for one in get_args(kind):
        yield from _parts(one)


def _unknown(table: Any, known: Any, path: str) -> Iterator[str]:
    """Paths of the fields in what was read that are not in what was made of it."""
    if isinstance(table, Mapping) and isinstance(known, Mapping):
        for name, value in table.items():
            if name in known:
                yield from _unknown(value, known[name], f"{path}{name}.")
            else:
                yield f"{path}{name}"
    elif isinstance(table, list) and isinstance(known, (list, tuple)):
        for index, (one, other) in enumerate(zip(table, known, strict=True)):
            yield from _unknown(one, other, f"{path.removesuffix('.')}[{index}].")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")

"""What JSON from elsewhere is checked for: its schema, and names and hashes in it. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Any

from klas_zoo.errors import KlasZooError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def schema_of(table: Any) -> int | None:
    """The `schema_version` of what JSON gave; None where it has none that klas-zoo could have written."""
    version = table.get("schema_version") if isinstance(table, dict) else None
    return version if type(version) is int and version >= 1 else None


def refuse_newer(found: int, known: int, where: str, error: type[KlasZooError]) -> None:
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
    """Whether it names a file of its own folder: no path, nothing hidden, nothing a file system would not take."""
    return isinstance(value, str) and bool(_PLAIN_NAME.fullmatch(value))


def is_sha256(value: object) -> bool:
    """Whether it is one as hexdigest() writes it."""
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))

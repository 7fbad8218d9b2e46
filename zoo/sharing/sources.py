"""What a pull needs to know about a package that lies somewhere else, whatever it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from klas_zoo.sharing.staging import Staging
from klas_zoo.sharing.urls import scheme_of


class Source(Protocol):
    """One version of a package at a URL."""

    @property
    def shown(self) -> str:
        """The URL, without credentials."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Hexadecimal digits that no other content has."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """Size in bytes of each file, by its name."""
        ...

    def receive(self, names: Iterable[str], staging: Staging, on_bytes: Callable[[int], None]) -> int:
        """Completes files; how many bytes had to come.

        Raises:
            RemoteError: a file is not to be had, or not what its digest says.
            OSError: one cannot be written.
        """
        ...

    def is_copied_to(self, folder: Path) -> bool:
        """Whether the files of a folder are those of this version."""
        ...


def open_source(
    url: str, *, name: str | None = None, version: str | None = None, options: Mapping[str, Any] | None = None
) -> Source:
    """
    Raises:
        UsageError: the URL names no place, or there is no such package or version.
        RemoteError: the place cannot be read, or does not hold what was pushed.
    """
    scheme = scheme_of(url)
    if scheme == "oci":
        from klas_zoo.sharing.oci import RegistryPackage

        return RegistryPackage.find(url, name, version)
    if scheme == "hf":
        from klas_zoo.sharing.hub import HubPackage

        return HubPackage.find(url, name, version)
    from klas_zoo.sharing.store import StoredPackage

    return StoredPackage.find(url, name, version, options)

"""Names of shared packages, and where their parts lie in a folder or an object store."""

from __future__ import annotations

import re

from klas_zoo.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")


def check_name(name: str) -> str:
    """
    Raises:
        UsageError: it cannot be the name of a shared package.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"'{name[:140]}' is no name of a package: write letters, digits, - _ . and @.")
    return name


def object_path(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"


def version_path(name: str, version: str) -> str:
    return f"packages/{name}/{version}.json"


def latest_path(name: str) -> str:
    return f"packages/{name}/latest.json"

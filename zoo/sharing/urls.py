"""URLs that packages are pushed to and pulled from, checked before anything is reached or written."""

from __future__ import annotations

from klas_zoo.addresses import is_url, without_credentials
from klas_zoo.errors import UsageError

_FORMS = "write a folder or a URL such as s3://bucket/zoo, hf://owner/name or oci://registry/name:tag"


def scheme_of(url: str) -> str:
    """`s3`, `oci` …; empty for a folder.

    Raises:
        UsageError: it names no place: an empty text (often an unset variable of a shell), a scheme alone, several
            file systems in a chain, characters that no URL has.
    """
    shown = without_credentials(url)
    if not url.strip():
        raise UsageError(f"The URL is empty: {_FORMS}.")
    if not url.isprintable():
        raise UsageError(f"{shown!r} is no URL, it has unprintable characters: {_FORMS}.")
    if "::" in url:
        raise UsageError(f"{shown} is a chain of file systems, which packages are not shared through: {_FORMS}.")
    if not is_url(url):
        return ""
    scheme, _, rest = url.partition("://")
    if not rest.strip("/ ?#@:") or ":" in scheme:
        raise UsageError(f"{shown} names no place: {_FORMS}.")
    return scheme.lower()

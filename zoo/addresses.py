"""URLs: which text is one, and how one is shown without the credentials that may stand in it."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from klas_zoo.errors import UsageError

HIDDEN = "***"
# one slash is what Path makes of two; a drive of Windows has one letter, and hf:owner/name is a data set
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|[^/]*::")
_USER = re.compile(r"(://)[^\s/?#'\"]*@")
# a password with a slash in it; what follows a colon may also be a port
_USER_WITH_SLASH = re.compile(r"(://)[^\s/:@?#'\"]+:(?!\d+/)[^\s@'\"]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*\?)[^\s#'\"]+")


def is_url(text: object) -> bool:
    """Whether a text, or what `Path` makes of it, is a URL and names no local file."""
    return bool(_URL.match(str(text)))


def local_path(value: Path | str, what: str) -> Path:
    """A local path.

    Args:
        what: that is expected, such as `a registry`, for the message.

    Raises:
        UsageError: it is a URL; as a path it would make a folder called `s3:`.
    """
    if is_url(value):
        raise UsageError(
            f"{without_credentials(str(value))} is a URL, and {what} is a local path: klas-zoo push, pull and install "
            "take packages to and from URLs."
        )
    return Path(value).expanduser()


def without_credentials(text: str, url: str = "") -> str:
    """A text with everything hidden that may be a secret in a URL: user, password and the values of a query.

    Args:
        url: whose secrets are hidden wherever they stand in the text, also outside of a URL.
    """
    for secret in _secrets(url):
        text = text.replace(secret, HIDDEN)
    text = _USER_WITH_SLASH.sub(rf"\1{HIDDEN}@", text)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    return _QUERY.sub(rf"\1{HIDDEN}", text)


def command_line() -> str:
    """How this process was called, for records, without credentials."""
    return shlex.join(["klas-zoo", *map(without_credentials, sys.argv[1:])])


def _secrets(url: str) -> list[str]:
    """Passwords and values of a query in a URL, longest first, as they are written and as they are meant."""
    try:
        parts = urlsplit(url)
        user, password = parts.username, parts.password
    except ValueError:
        return []
    found = {value for _, value in parse_qsl(parts.query)}
    found |= {password or user or ""}
    found |= {unquote(one) for one in found}
    return sorted((one for one in found if len(one) >= 4), key=len, reverse=True)

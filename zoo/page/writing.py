"""The page as one HTML file: template, styles, scripts, plotly.js and data, all inlined.

What comes from outside (names, paths, commands) reaches the page as JSON in which no character can end its element,
and the scripts only ever set it as text.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from klas_zoo.errors import KlasZooError
from klas_zoo.extras import explained
from klas_zoo.files import replacing

SCRIPTS = ("choice.js", "frontier.js", "drawing.js", "builds.js", "page.js")
LARGEST_BYTES = 6_000_000
"""A page is smaller than that; plotly.js are 4.8 MB of it."""
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def write_page(contents: Mapping[str, Any], path: Path) -> None:
    """Writes the page.

    Args:
        contents: of `klas_zoo.page.contents`.

    Raises:
        MissingPackage: plotly is not installed.
        KlasZooError: the page would be larger than `LARGEST_BYTES`, or cannot be written.
    """
    page = page_html(contents)
    if len(page) > LARGEST_BYTES:
        raise KlasZooError(
            f"The page over {len(contents['engines']):,} engines would be {len(page) / 1e6:.1f} MB: choose fewer with "
            "--family or --device."
        )
    try:
        with replacing(path.absolute()) as temporary:
            temporary.write_bytes(page)
    except OSError as error:
        raise KlasZooError(
            f"The page {path} cannot be written ({os.strerror(error.errno or 0)}): name another place with --out."
        ) from error


def page_html(contents: Mapping[str, Any]) -> bytes:
    """The whole page in UTF-8.

    Raises:
        MissingPackage: plotly is not installed.
    """
    parts = {
        "TITLE": html.escape(str(contents["title"])),
        "STYLE": _resource("page.css"),
        "DATA": json_in_html(contents),
        "PLOTLY": _plotly(),
        "SCRIPT": "\n".join(_resource(name) for name in SCRIPTS),
    }
    text = ""
    rest = _resource("page.html")
    for name, part in parts.items():  # not replace(): a part may hold the marker of another one
        before, marker, rest = rest.partition(f"@{name}@")
        assert marker, name
        text += before + part
    return (text + rest).encode("utf-8", "replace")  # halves of surrogate pairs, in a title, have no encoding


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or begins a comment. ASCII only."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def _resource(name: str) -> str:
    return files("klas_zoo.page").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    with explained("The report page"):
        from plotly.offline import get_plotlyjs
    script: str = get_plotlyjs()
    return script

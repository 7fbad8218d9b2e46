"""Reading the manifest of a package: every field of its kind and in its range, every file in the package itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from klas_zoo.errors import DamagedPackage, KlasZooError, NewerPackage
from klas_zoo.exporters.manifest import GRAPH_FORMATS, MANIFEST, SCHEMA_VERSION, Manifest, PackagedRoute
from klas_zoo.reading import convert, is_plain_name, refuse_newer, schema_of
from klas_zoo.routes import Route

T = TypeVar("T")
_TIMES = ("p90_ms", "p99_ms", "min_ms", "coefficient_of_variation")


def read_manifest(table: Any, where: str) -> Manifest:
    """Checks what JSON gave, and that every file it names is one that lies in the package itself.

    Args:
        where: the manifest's path, for messages.

    Raises:
        NewerPackage: a newer klas-zoo wrote it.
        DamagedPackage: it is no manifest, a field is missing or impossible, or it names a file that cannot be in the
            folder, or leaves one out.
    """
    version = schema_of(table)
    if version is None:
        raise DamagedPackage(f"{where} is no manifest of a package: it has no schema_version.")
    refuse_newer(version, SCHEMA_VERSION, where, NewerPackage)
    found = _read(table, Manifest, where, DamagedPackage)
    _check_names(found, where)
    return found


def route_from_json(table: Mapping[str, Any], where: str, error: type[KlasZooError] = DamagedPackage) -> PackagedRoute:
    """What `route_to_json` gave.

    Raises:
        KlasZooError: of the kind `error`; a field is missing or impossible, or the route did not pass.
    """
    return _read(table, PackagedRoute, where, error)


def _read(table: Any, kind: type[T], where: str, error: type[KlasZooError]) -> T:
    try:
        prepared = _prepared(table)
    except ValueError as wrong:
        raise error(f"{where} is not valid: {wrong}.") from wrong
    return convert(prepared, kind, where, error, more=True)


def _prepared(table: Any) -> Any:
    """With a `Route` in the place of its name and segments, and NaN for unknown times, which JSON spells null."""
    if isinstance(table, Mapping):
        found = {name: _prepared(value) for name, value in table.items()}
        if "p50_ms" in found:
            found |= {name: math.nan for name in _TIMES if found.get(name, 0) is None}
        if "route" in found:
            found["route"] = _route(found["route"], found.pop("segments", None))
        return found
    return [_prepared(one) for one in table] if isinstance(table, list) else table


def _route(name: Any, segments: Any) -> Any:
    """As `convert` takes it.

    Raises:
        ValueError: its name is not that of its segments.
    """
    if not isinstance(segments, list) or not all(isinstance(one, list) and len(one) == 3 for one in segments):
        return {"segments": segments}
    try:
        named = str(Route.from_json(segments))
    except (TypeError, ValueError, OverflowError):
        named = name  # convert says what is wrong with them
    if named != name:
        raise ValueError(f"a route {name!r:.80} has the segments {segments!r:.80}")
    return {"segments": [dict(zip(("anchor", "first", "last"), one, strict=True)) for one in segments]}


def _check_names(manifest: Manifest, where: str) -> None:
    for name in manifest.files:
        if not is_plain_name(name) or name == MANIFEST:
            raise DamagedPackage(f"{where} names a file {name!r}, which is no plain file of the package's own folder.")
    if manifest.weights is None and manifest.format in (*GRAPH_FORMATS, "torch"):
        raise DamagedPackage(f"{where} names no weights.")
    named = [("references", manifest.references)]
    named += [("supernet", manifest.supernet.file)] if manifest.supernet is not None else []
    named += [("weights", manifest.weights)] if manifest.weights is not None else []
    named += [(f"route {one.name}", one.file) for one in manifest.routes if one.file is not None]
    for what, name in named:
        if name not in manifest.files:
            raise DamagedPackage(f"{where} names {name!r} for its {what}, and no such file among its files.")

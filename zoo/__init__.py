"""klas-zoo: stitched networks for every latency budget.

Names are imported when they are first used, so that `klas_zoo.pick` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klas_zoo.chains import Chain as Chain
    from klas_zoo.chains import Layout as Layout
    from klas_zoo.errors import KlasZooError as KlasZooError
    from klas_zoo.exporters.package import Package as Package
    from klas_zoo.registry import Registry as Registry
    from klas_zoo.registry.picking import Pick as Pick
    from klas_zoo.registry.picking import pick as pick
    from klas_zoo.routes import Route as Route
    from klas_zoo.routes import Segment as Segment
    from klas_zoo.runtime import ElasticSession as ElasticSession
    from klas_zoo.runtime.controller import Controller as Controller
    from klas_zoo.supernet import Supernet as Supernet

_HOMES = {
    "Chain": "klas_zoo.chains",
    "Controller": "klas_zoo.runtime.controller",
    "ElasticSession": "klas_zoo.runtime",
    "KlasZooError": "klas_zoo.errors",
    "Layout": "klas_zoo.chains",
    "Package": "klas_zoo.exporters.package",
    "Pick": "klas_zoo.registry.picking",
    "Registry": "klas_zoo.registry",
    "Route": "klas_zoo.routes",
    "Segment": "klas_zoo.routes",
    "Supernet": "klas_zoo.supernet",
    "pick": "klas_zoo.registry.picking",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'klas_zoo' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

"""klas-zoo: stitched networks for every latency budget.

Names are imported when they are first used, so that `klas_zoo.pick` costs milliseconds.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if os.name == "nt":  # locks, and files that are opened through no link, need calls that Windows has not
    raise ImportError("klas-zoo runs on Linux and macOS. On Windows, install and run it in WSL 2.")
if TYPE_CHECKING:
    from klas_zoo.api import build as build
    from klas_zoo.catalogue.adding import Added as Added
    from klas_zoo.catalogue.adding import add as add
    from klas_zoo.catalogue.evaluating import Evaluation as Evaluation
    from klas_zoo.catalogue.evaluating import evaluate as evaluate
    from klas_zoo.catalogue.installing import Installed as Installed
    from klas_zoo.catalogue.installing import install as install
    from klas_zoo.chains import Chain as Chain
    from klas_zoo.chains import Layout as Layout
    from klas_zoo.errors import KlasZooError as KlasZooError
    from klas_zoo.exporters.package import Package as Package
    from klas_zoo.exporters.records import Verification as Verification
    from klas_zoo.families.anchors import Family as Family
    from klas_zoo.preprocess import Preprocess as Preprocess
    from klas_zoo.profiles.records import LatencyRecord as LatencyRecord
    from klas_zoo.registry import Registry as Registry
    from klas_zoo.registry.loaded import Engine as Engine
    from klas_zoo.registry.loaded import Prediction as Prediction
    from klas_zoo.registry.picked import Pick as Pick
    from klas_zoo.registry.picking import pick as pick
    from klas_zoo.registry.records import BuildRecord as BuildRecord
    from klas_zoo.registry.records import EngineRecord as EngineRecord
    from klas_zoo.routes import Route as Route
    from klas_zoo.routes import Segment as Segment
    from klas_zoo.runtime import ElasticSession as ElasticSession
    from klas_zoo.runtime.controller import Controller as Controller
    from klas_zoo.supernet import Supernet as Supernet

_HOMES = {
    "Added": "klas_zoo.catalogue.adding",
    "BuildRecord": "klas_zoo.registry.records",
    "Chain": "klas_zoo.chains",
    "Controller": "klas_zoo.runtime.controller",
    "ElasticSession": "klas_zoo.runtime",
    "Engine": "klas_zoo.registry.loaded",
    "EngineRecord": "klas_zoo.registry.records",
    "Evaluation": "klas_zoo.catalogue.evaluating",
    "Family": "klas_zoo.families.anchors",
    "Installed": "klas_zoo.catalogue.installing",
    "KlasZooError": "klas_zoo.errors",
    "LatencyRecord": "klas_zoo.profiles.records",
    "Layout": "klas_zoo.chains",
    "Package": "klas_zoo.exporters.package",
    "Pick": "klas_zoo.registry.picked",
    "Prediction": "klas_zoo.registry.loaded",
    "Preprocess": "klas_zoo.preprocess",
    "Registry": "klas_zoo.registry",
    "Route": "klas_zoo.routes",
    "Segment": "klas_zoo.routes",
    "Supernet": "klas_zoo.supernet",
    "Verification": "klas_zoo.exporters.records",
    "add": "klas_zoo.catalogue.adding",
    "build": "klas_zoo.api",
    "evaluate": "klas_zoo.catalogue.evaluating",
    "install": "klas_zoo.catalogue.installing",
    "pick": "klas_zoo.registry.picking",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'klas_zoo' has no attribute '{name}'")
    from klas_zoo.extras import explained

    with explained(f"klas_zoo.{name}"):
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

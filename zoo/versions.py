"""Which versions numbers were made with. Imports nothing heavy: packages' metadata tell."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "fvcore", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of every package that numbers can depend on."""
    return {"python": platform.python_version(), **versions_of(*PACKAGES)}


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions, of klas-zoo too."""
    return {name: _version(name) for name in ("klas-zoo", *packages)}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

"""Which versions numbers were made with. Imports nothing heavy: packages' metadata tell."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "fvcore", "numpy")


def versions() -> dict[str, str]:
    """Of Python and of every package that numbers can depend on."""
    return {"python": platform.python_version(), **versions_of(*PACKAGES)}


def versions_of(*packages: str) -> dict[str, str]:
    """Installed versions, of klas-zoo too; what is not installed is left out."""
    found = {name: _version(name) for name in ("klas-zoo", *packages)}
    return {name: version for name, version in found.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""The optional parts of klas-zoo: which package belongs to which, and the error where one is not installed.

`pip install klas-zoo` is what a machine needs that picks and runs engines. What trains and exports is in `[build]`.
Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from klas_zoo.errors import MissingPackage

# modules by the extra that brings them; a test compares them with the package's metadata
MODULES = {
    "cyclonedx": "build",
    "fvcore": "build",
    "matplotlib": "build",
    "onnx_ir": "build",
    "onnxscript": "build",
    "packageurl": "build",
    "plotly": "build",
    "timm": "build",
    "torch": "build",
    "torchvision": "build",
}


def missing_package(error: ModuleNotFoundError, what: str) -> MissingPackage | None:
    """Of an import that failed, the error that says which extra brings the module; None where none does: a bug.

    Args:
        what: that needs it, the subject of the sentence: `klas-zoo build`.
    """
    package = (error.name or "").partition(".")[0]
    return MissingPackage(what, package, MODULES[package]) if package in MODULES else None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """
    Raises:
        MissingPackage: instead of ModuleNotFoundError, see `missing_package`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        found = missing_package(error, what)
        if found is None:
            raise
        raise found from error

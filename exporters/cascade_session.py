"""A cascade opened as one engine: the same methods as the session of a single route, and counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.records import Interval
from klas_zoo.exporters.cascade_runner import CascadeCounters, CascadeRunner
from klas_zoo.exporters.package import Package
from klas_zoo.runtimes import CPU_PROVIDER, runtime_named
from klas_zoo.runtimes.base import Closing


class CascadeSession(Closing):
    """See `klas_zoo.runtimes.Session`; `raw` is the list of onnxruntime's sessions, one for each stage.

    Args:
        folder: of the package whose routes are the stages.
        expected: see `klas_zoo.exporters.cascade_runner.CascadeRunner`.
        provider, threads, options, spinning: see `klas_zoo.runtimes.open_engine`.

    Raises:
        PackageError: the package cannot be read.
        UnknownName: it has no such route.
        ExportError: an engine cannot be cut or opened.
    """

    runtime = "onnxruntime"
    smallest_batch: int = 1
    largest_batch: int | None = None

    def __init__(
        self,
        cascade: Cascade,
        folder: Path,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
        expected: Sequence[Interval] | None = None,
    ) -> None:
        package = Package.open(folder, content=False)
        self._runner = CascadeRunner(
            cascade, contents(package, cascade), folder, provider=provider, threads=threads, options=options,
            spinning=spinning, expected=expected,
        )  # fmt: skip
        self.runtime_version, self.provider = runtime_named(self.runtime).version(), provider
        self.threads, self.options, self.raw = self._runner.threads, self._runner.options, self._runner.raw
        self.input_shape: tuple[int | None, ...] = package.manifest.family.input_shape

    def run(self, images: np.ndarray) -> np.ndarray:
        """See `Session.run`; only images that a stage is unsure of go on to the next."""
        return self._runner.run(images)[0]

    def counters(self) -> CascadeCounters:
        """What the cascade did so far."""
        return self._runner.counters()

    def release_memory(self) -> None:
        """See `Session.release_memory`."""
        self._runner.release_memory()

    def close(self) -> None:
        """See `Session.close`."""
        self.raw = []
        self._runner.close()


def contents(package: Package, cascade: Cascade) -> dict[str, bytes]:
    """The engines of a cascade's stages by their routes' names.

    Raises:
        UnknownName: the package has no such route.
    """
    return {str(route): package.engine(package.route(str(route))).read_bytes() for route in cascade.routes}

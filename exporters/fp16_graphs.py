"""fp16 graphs of routes, each with its residual stream in fp32 where fp16 does not carry it.

Whether it does is measured (`klas_zoo.exporters.fp16_rounding`), not guessed from the architecture: an fp16 graph is
run with fp16's rounding on a few images, and where that misses the limits of fp16 or comes near its end, the graph is
written again with its residual stream, and whatever goes beyond fp16, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from klas_zoo.exporters.contract import Artifact
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.fp16_rounding import LARGEST, MARGIN, RoundedRun, magnitudes, rounded_run
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.precision import Convert
from klas_zoo.exporters.reduced_precision import Half


def write_fp16(
    artifact: Artifact,
    write: Callable[[Convert], None],
    half: Half,
    reference: ReferenceLogits,
    weights: str,
    *,
    threads: int | None = None,
) -> RoundedRun:
    """Writes a route's fp16 graph, narrow as far as rounding allows, and says what rounding does to it.

    Args:
        artifact: the file that `write` writes.
        write: writes the route's graph as a conversion makes it, over a former one.
        weights: as `limits_for` takes it.

    Raises:
        ExportError: names the stage that failed.
        OSError: a file cannot be written.
    """
    limits = limits_for(artifact.precision, weights)
    write(half)
    narrow = rounded_run(artifact, reference, limits, threads=threads)
    if narrow.passed:
        return narrow
    found = magnitudes(artifact, reference, limits, threads=threads)
    beyond = {name for name, magnitude in found.items() if not magnitude * MARGIN <= LARGEST}
    write(half.wide_residual(beyond))
    return replace(rounded_run(artifact, reference, limits, threads=threads), fp32_residual=True)

"""Engines of a package compared with its reference logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from klas_zoo.exporters.contract import Artifact, OpenEngine, Verdict
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.limits import VerificationLimits, limits_for
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.verification import verify_engines


def verify_routes(
    package: Package,
    artifacts: Sequence[Artifact],
    open_engine: OpenEngine,
    reference: ReferenceLogits | None = None,
) -> list[Verdict]:
    """The verdict on every artifact, each of a route of the package.

    A package stores few images, so that logits are compared, and no shares. A difference that was
    allowed when an engine was exported, on more images, is allowed here too: the spread of the logits
    of a few images may be smaller.

    Args:
        reference: that the package was verified with, where it is at hand. Default: what the package stores.

    Raises:
        DamagedPackage: its references cannot be read.
        UnknownName: there is no precision as the manifest's.
    """
    if reference is None:
        stored = package.references()
        reference = ReferenceLogits.of_arrays(stored.images, stored.logits)
    known = {one.name: one.verification for one in package.routes}
    weights = package.manifest.family.weights

    def limits(artifact: Artifact) -> VerificationLimits:
        before = known[artifact.route]
        found = limits_for(artifact.precision, weights)
        return found if before is None else replace(found, tolerance=before.tolerance)

    return verify_engines(artifacts, open_engine, reference, limits)

"""ONNX engines as verification opens and runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from klas_zoo.cores import physical_cores
from klas_zoo.errors import CannotRunHere, ExportError
from klas_zoo.exporters.contract import Artifact, OpenedEngine, Verdict
from klas_zoo.exporters.decoded_images import Listener, ReferenceLogits
from klas_zoo.exporters.fp16_rounding import RoundedRun, confirm_fp16
from klas_zoo.exporters.graphs import deployed_bytes
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.verification import verify_engines
from klas_zoo.runtimes import CPU_PROVIDER, open_engine, runtime_named

_AT_ONCE = 4  # engines
_MOST_BYTES = 512 * 2**20  # of weights, in engines that run at once


def verify_onnx(
    artifacts: Sequence[Artifact],
    reference: ReferenceLogits,
    weights: str,
    *,
    provider: str,
    threads: int | None,
    runtime: str = "onnxruntime",
    rounded: Mapping[str, RoundedRun] | None = None,
    listener: Listener = lambda stage, route: None,
) -> list[Verdict]:
    """The verdict on ONNX artifacts by the limits of their precisions.

    On a CPU several engines run at once and share its cores: threads that compute one operator together wait for
    one another at its end, those of several engines do not. Engines that are too large for it run alone.

    Args:
        weights: as `limits_for` takes it.
        threads: of all engines together; None: one for each physical core.
        rounded: what is known of fp16 engines by their routes; others are run with rounding here, on a CPU.

    Raises:
        VerificationError: there are no images.
        KlasZooError: the runtime is not installed, or its provider does not start.
    """

    def verified(some: Sequence[Artifact], at_once: int, threads: int | None) -> list[Verdict]:
        return verify_engines(
            some,
            partial(open_onnx, provider=provider, threads=threads, runtime=runtime, rounded=rounded),
            reference,
            lambda one: limits_for(one.precision, weights),
            parallel=at_once,
            listener=listener,
        )

    if provider != runtime_named(runtime).providers.get("cpu"):
        return verified(artifacts, 1, threads)
    threads = threads or physical_cores()
    at_once = min(_AT_ONCE, threads, max(1, len(artifacts)))
    small = [one for one in artifacts if deployed_bytes(one.path) * at_once <= _MOST_BYTES]
    found = verified(small, at_once, threads // at_once)
    found += verified([one for one in artifacts if one not in small], 1, threads)
    by_route = {one.artifact.route: one for one in found}
    return [by_route[one.route] for one in artifacts]


def open_onnx(
    artifact: Artifact,
    *,
    provider: str,
    threads: int | None,
    runtime: str = "onnxruntime",
    rounded: Mapping[str, RoundedRun] | None = None,
) -> OpenedEngine:
    """Opens an ONNX artifact as it is timed and loaded later: the same runtime, provider and options.

    Args:
        rounded: see `verify_onnx`.

    Raises:
        CannotRunHere: the provider cannot compute in the artifact's precision.
        ExportError: the runtime cannot load it.
    """
    try:
        session = open_engine(artifact.path, runtime=runtime, provider=provider, threads=threads)
    except ExportError as error:
        # onnxruntime's CPU kernels compute fp16 by casting to fp32 and back, and do not exist for bf16
        if artifact.precision == "bf16" and "NOT_IMPLEMENTED" in str(error):
            raise CannotRunHere(f"{runtime}'s {provider} does not compute in bf16.") from error
        raise
    sizes = allowed_sizes(session.smallest_batch, session.largest_batch)
    confirm = None
    if artifact.precision == "fp16" and provider == CPU_PROVIDER:
        confirm = partial(confirm_fp16, artifact, threads, (rounded or {}).get(artifact.route))
    return OpenedEngine(outputs=session.run, batch_sizes=sizes, confirm=confirm)


def allowed_sizes(smallest: int, largest: int | None, usual: int = 8) -> tuple[int, ...]:
    """The batch sizes to verify an engine with that takes `smallest` to `largest` images; empty: any."""
    if smallest <= 1 and largest is None:
        return ()
    return (max(smallest, min(usual, largest or usual)),)

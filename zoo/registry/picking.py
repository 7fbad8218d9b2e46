"""Picking: the most accurate registered engine within every limit.

Imports neither torch nor onnx nor numpy, so that it takes milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from klas_zoo.costs.estimates import origin_of
from klas_zoo.errors import BadQuantity, KlasZooError, NothingFits, RegistryError, UnknownName, UsageError
from klas_zoo.registry import Registry
from klas_zoo.registry.latencies import with_profiles
from klas_zoo.registry.picks import Limits, Pick, RunnerUp
from klas_zoo.registry.records import PERCENTILES, EngineRecord, percentile_ms
from klas_zoo.registry.store import check_file
from klas_zoo.units import format_latency, format_size, parse_latency_ms, parse_size_bytes

__all__ = ["Limits", "Pick", "RunnerUp", "pick"]


def pick(
    latency: str | float,
    *,
    device: str | None = None,
    family: str | None = None,
    percentile: str = "p50",
    batch: int = 1,
    min_accuracy: float | None = None,
    max_size: str | int | None = None,
    measured_only: bool = False,
    registry: Registry | Path | str | None = None,
) -> Pick:
    """The most accurate registered engine within every limit; of equals the faster, then the smaller.

    Args:
        latency: the budget for one batch, `"5ms"` or milliseconds.
        device: its name or an alias of it; may be left out where engines of one device only are registered.
        family: may be left out where all were evaluated on the same images; or a tag such as `deit@prod`.
        percentile: `p50`, `p90` or `p99` of the latency; a roofline tells only the first.
        batch: the batch size the latency is known at.
        min_accuracy: the lowest top-1, per cent.
        max_size: the largest file, `"20MB"` or bytes.
        measured_only: no latency that was interpolated or predicted by a roofline counts.
        registry: a registry or its folder, by default `klas_zoo.registry.default_root()`.

    Raises:
        UsageError: a name that is not registered, a quantity that is none, or too few of them.
        NothingFits: no engine is within every limit; the message names the nearest.
        RegistryError: there is no registry, it is empty, damaged, or of a newer klas-zoo.
    """
    limits = _limits(latency, percentile, batch, min_accuracy, max_size)
    if not isinstance(registry, Registry):
        registry = Registry.open(registry, create=False)
    engines = _candidates(registry, family, device, limits, measured_only=measured_only)
    fitting = [engine for engine in engines if not limits.misses(engine)]
    if not fitting:
        raise NothingFits(_nothing_fits(engines, limits))
    best = min(fitting, key=lambda engine: _preference(engine, limits))
    check_file(best, content=False)
    measured = best.latency(batch)
    assert measured is not None  # _candidates leaves no engine without it

    def runner_up(engine: EngineRecord | None) -> RunnerUp | None:
        if engine is None:
            return None
        latency_ms = limits.latency_ms(engine)
        return RunnerUp(
            engine=engine,
            latency_ms=latency_ms,
            latency_difference_ms=latency_ms - limits.latency_ms(best),
            top1_difference=engine.top1 - best.top1,
            origin=_origin(engine, limits),
        )

    faster = [engine for engine in fitting if limits.latency_ms(engine) < limits.latency_ms(best)]
    slower = [e for e in engines if e.top1 > best.top1 and limits.misses(e).keys() == {"latency"}]
    return Pick(
        engine=best,
        latency=measured,
        limits=limits,
        fitting=len(fitting),
        candidates=len(engines),
        runner_up_faster=runner_up(min(faster, key=lambda e: _preference(e, limits), default=None)),
        runner_up_slower=runner_up(min(slower, key=lambda e: (limits.latency_ms(e), -e.top1), default=None)),
    )


def _limits(
    latency: str | float,
    percentile: str,
    batch: int,
    min_accuracy: float | None,
    max_size: str | int | None,
) -> Limits:
    named = next((known for known in PERCENTILES if known == percentile), None)
    if named is None:
        raise UnknownName("percentile", percentile, PERCENTILES)
    budget_ms = parse_latency_ms(latency) if isinstance(latency, str) else latency
    if not 0 < budget_ms < math.inf:
        raise BadQuantity(f"A latency of {budget_ms} ms is no budget: it has to be finite and above zero.")
    if min_accuracy is not None and not 0 <= min_accuracy <= 100:
        raise UsageError(f"The lowest accuracy is a top-1 in per cent, 0 to 100, not {min_accuracy}.")
    max_size_bytes = parse_size_bytes(max_size) if isinstance(max_size, str) else max_size
    if max_size_bytes is not None and not 0 < max_size_bytes < math.inf:
        raise BadQuantity(f"A size of {max_size_bytes} bytes is no limit: it has to be above zero.")
    return Limits(
        budget_ms=float(budget_ms),
        percentile=named,
        batch=batch,
        min_accuracy=min_accuracy,
        max_size_bytes=max_size_bytes,
    )


def _candidates(
    registry: Registry, family: str | None, device: str | None, limits: Limits, *, measured_only: bool
) -> list[EngineRecord]:
    """The engines that can be compared with one another: one device, one set of images, that batch size."""
    engines = registry.engines(family, device)
    if not engines and device is not None:
        from klas_zoo.profiles.catalog import canonical

        device = canonical(device)
        engines = registry.engines(family, device)
    if not engines:
        raise _none_registered(registry, family, device)
    if len({engine.device for engine in engines}) > 1:
        devices = _listed(engine.device for engine in engines)
        raise UsageError(f"Engines for several devices are registered, {devices}: say --device.")
    if len({engine.data_fingerprint for engine in engines}) > 1:
        names = _listed(engine.family for engine in engines)
        raise UsageError(
            f"The engines of {names} were evaluated on different images, so that their accuracies "
            f"do not compare: say --family."
        )
    engines = with_profiles(engines, registry.root)
    timed = [engine for engine in engines if engine.latency(limits.batch)]
    if not timed:
        raise UsageError(_no_such_batch(engines, limits.batch))
    usable = [engine for engine in timed if not _why_not(engine, limits, measured_only)]
    if not usable:
        raise UsageError(_why_not(timed[0], limits, measured_only))
    return usable


def _no_such_batch(engines: Sequence[EngineRecord], batch: int) -> str:
    batches = sorted({latency.batch for engine in engines for latency in engine.latencies})
    only = f"only at {', '.join(map(str, batches))}" if batches else "nor at any other"
    first = engines[0]
    advice = f": measure a profile on such a machine (klas-zoo profile --family {first.family} --batch {batch})"
    return f"No engine was measured at batch size {batch}, {only}{'' if batches else advice}."


def _why_not(engine: EngineRecord, limits: Limits, measured_only: bool) -> str:
    """Why an engine's latency at the batch size does not count; empty where it does."""
    latency = engine.latency(limits.batch)
    assert latency is not None
    where = f"{engine.family} on {engine.device} at batch size {limits.batch}"
    if measured_only and latency.origin != "measured":
        return (
            f"No latency of {where} was measured, there is only {origin_of(latency)}: import a profile that "
            "measured it, or leave out --measured-only."
        )
    if math.isnan(percentile_ms(latency, limits.percentile)):
        return (
            f"A roofline predicts the median only, and there is nothing else of {where}: say --percentile p50, or "
            "import a profile."
        )
    return ""


def _none_registered(registry: Registry, family: str | None, device: str | None) -> KlasZooError:
    """Why there is no engine of that family and device."""
    tagged = family if family is not None and "@" in family else None
    registered = registry.engines(tagged)
    families = {tagged} if tagged is not None else {engine.family for engine in registered}
    devices = {engine.device for engine in registered}
    if not registered:
        return RegistryError(f"The registry {registry.root} holds no engines: run klas-zoo build first.")
    if family is not None and family not in families:
        return UnknownName("family", family, families)
    if device is not None and device not in devices:
        return UnknownName("device", device, devices)
    others = _listed(engine.device for engine in registered if tagged is not None or engine.family == family)
    return UsageError(f"{family} has no engines for {device}, only for {others}: build them first.")


def _origin(engine: EngineRecord, limits: Limits) -> str:
    latency = engine.latency(limits.batch)
    return origin_of(latency) if latency else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _preference(engine: EngineRecord, limits: Limits) -> tuple[float, float, int, str]:
    """Sorts the better engine first; the route's name only makes the order of equals the same each time."""
    return -engine.top1, limits.latency_ms(engine), engine.size_bytes, str(engine.route)


def _nothing_fits(engines: Sequence[EngineRecord], limits: Limits) -> str:
    """What was asked, the engine with the smallest sum of relative misses, and each bound it misses."""
    nearest = min(engines, key=lambda e: (sum(limits.misses(e).values()), _preference(e, limits)))
    misses = limits.misses(nearest)
    parts = []
    if "latency" in misses:
        latency_ms = limits.latency_ms(nearest)
        over = format_latency(latency_ms - limits.budget_ms)
        origin = _origin(nearest, limits)
        parts.append(f"{format_latency(latency_ms)}{'' if origin == 'measured' else f' {origin}'}, {over} over")
    if "accuracy" in misses and limits.min_accuracy is not None:
        short = f"{limits.min_accuracy - nearest.top1:.3g}"
        parts.append(f"top-1 {nearest.top1:.2f} %, {short} point{'' if short == '1' else 's'} short")
    if "size" in misses and limits.max_size_bytes is not None:
        over = format_size(nearest.size_bytes - limits.max_size_bytes)
        parts.append(f"{format_size(nearest.size_bytes)}, {over} over")
    families = _listed(engine.family for engine in engines)
    return (
        f"No engine of {families} on {nearest.device} is {limits}: "
        f"the nearest is {nearest.route}, {'; '.join(parts)}."
    )

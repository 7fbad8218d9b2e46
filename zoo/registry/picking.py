"""Picking: the most accurate registered engine within every limit.

Imports neither torch nor onnx nor numpy, so that it takes milliseconds. The database applies the budget.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from klas_zoo.budget import Budget, Candidates
from klas_zoo.errors import BadQuantity, DamagedRegistry, NothingFits, UnknownName, UsageError
from klas_zoo.profiles.records import LatencyRecord, origin_of
from klas_zoo.registry import Registry, rows
from klas_zoo.registry.candidates import Comparable, Query, comparable
from klas_zoo.registry.picked import Pick, RunnerUp, described
from klas_zoo.registry.records import PERCENTILES, EngineRecord, Statistic
from klas_zoo.registry.store import check_file
from klas_zoo.registry.tags import registered_device
from klas_zoo.units import format_latency, format_size, parse_latency_ms, parse_size_bytes

__all__ = ["pick"]

_RETRIES = 2


def pick(
    latency: str | float | None = None,
    *,
    mean: str | float | None = None,
    worst: str | float | None = None,
    device: str | None = None,
    family: str | None = None,
    percentile: str = "p50",
    batch: int = 1,
    min_accuracy: float | None = None,
    max_size: str | int | None = None,
    measured_only: bool = False,
    hardware: str | None = None,
    threads: int | None = None,
    claimed: bool = False,
    registry: Registry | Path | str | None = None,
) -> Pick:
    """The most accurate registered engine within every limit; of equals the faster, then the smaller.

    All families, precisions and runtimes compete, and cascades with them, by the mixture of their paths. Latencies are
    compared under one set of conditions, those that `Pick.load` reproduces, and accuracies on one set of images;
    `Pick.left_out` says what that excluded.

    Args:
        latency: the budget for one batch, `"5ms"` or milliseconds.
        mean: limit for the mean latency over images, likewise; of an engine that is no cascade its median counts.
        worst: limit for an image that every stage of a cascade executes; of other engines their 99th percentile.
        device: its name or an alias of it; may be omitted where engines of one device only are registered.
        family: only this one; or a tag such as `deit@prod`.
        percentile: `p50`, `p90` or `p99` of the latency; a roofline predicts only the first.
        batch: the batch size the latency is known at.
        min_accuracy: the lowest top-1, per cent.
        max_size: the largest deployed size of graph and weights, `"20MB"` or bytes.
        measured_only: exclude latencies that were interpolated or predicted by a roofline.
        hardware: part of a description of hardware whose latencies count instead of this machine's.
        threads: only latencies measured with so many. Default: the number most engines were measured with.
        claimed: include engines whose accuracy was claimed instead of measured.
        registry: a registry or its folder, by default `klas_zoo.registry.default_root()`.

    Raises:
        UsageError: a name that is not registered, an invalid quantity, too few of them, or no limit.
        NothingFits: no engine is within every limit; the message names the nearest.
        RegistryError: there is no registry, it is empty, damaged, or of a newer klas-zoo.
    """
    budget, named = _budget({str(percentile): latency, "mean": mean, "worst": worst}, min_accuracy, max_size)
    for name, count in (("batch", batch), ("threads", threads)):
        if count is not None and (not isinstance(count, int) or count < 0):
            raise UsageError(f"{name} is a whole number from 0 on, not {count!r}.")
    family, device, hardware = _text(family), _text(device), _text(hardware)
    if not isinstance(registry, Registry):
        registry = Registry.open(registry, create=False)
    query = Query(
        family=family, device=device, batch=batch, hardware=hardware, threads=threads,
        measured_only=measured_only, claimed=claimed,
    )  # fmt: skip
    for _ in range(_RETRIES):
        # the engine of a row that was read may be replaced and deleted before its file is looked at
        with suppress(DamagedRegistry):
            return _pick(registry, query, budget, named)
    return _pick(registry, query, budget, named)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One comparable latency of an engine: the numbers a choice is made by."""

    engine_id: int
    conditions_id: int
    name: str
    top1: float
    size_bytes: int
    ms: float
    mean_ms: float
    worst_ms: float


def _budget(
    limits: Mapping[str, str | float | None], min_accuracy: float | None, max_size: str | int | None
) -> tuple[Budget, Statistic]:
    """
    Args:
        limits: by the name of a statistic; the first is that of the percentile.
    """
    percentile = next(iter(limits))
    if percentile not in PERCENTILES:
        raise UnknownName("percentile", str(percentile), PERCENTILES)
    bounds = {cast(Statistic, name): _milliseconds(limit) for name, limit in limits.items() if limit is not None}
    if not bounds:
        raise UsageError("Pass a limit: latency, mean or worst.")
    named, *others = bounds
    if min_accuracy is not None and not (_is_number(min_accuracy) and 0 <= min_accuracy <= 100):
        raise UsageError(f"The lowest accuracy is a top-1 in per cent, 0 to 100, not {min_accuracy!r}.")
    if min_accuracy is not None and 0 < min_accuracy < 1:
        raise UsageError(
            f"The lowest accuracy is a top-1 in per cent: for {100 * min_accuracy:g} % pass {100 * min_accuracy:g}, "
            f"not {min_accuracy:g}."
        )
    max_size_bytes = parse_size_bytes(max_size) if isinstance(max_size, str) else max_size
    if max_size_bytes is not None and not (_is_number(max_size_bytes) and 0 < max_size_bytes < math.inf):
        raise BadQuantity(f"A size of {max_size_bytes} bytes is no limit: it has to be above zero.")
    budget = Budget(
        latency_ms=bounds[named], min_accuracy=min_accuracy, max_size_bytes=max_size_bytes,
        also={name: bounds[name] for name in others},
    )  # fmt: skip
    return budget, named


def _milliseconds(latency: str | float) -> float:
    found = parse_latency_ms(latency) if isinstance(latency, str) else latency
    if not (_is_number(found) and 0 < found < math.inf):
        raise BadQuantity(f"A latency of {found} ms is no budget: it has to be finite and above zero.")
    return float(found)


def _is_number(value: object) -> bool:
    """Whether it compares with numbers: also one of numpy's, a Decimal or a Fraction."""
    from numbers import Number  # not at the top: it takes a while

    return isinstance(value, Number) and not isinstance(value, (bool, complex))


def _text(name: object) -> str | None:
    """A name; also a torch.device's."""
    return None if name is None else str(name)


def _pick(registry: Registry, query: Query, budget: Budget, percentile: Statistic) -> Pick:
    with registry.reading() as connection:
        query = replace(query, device=registered_device(connection, query.device))
        choice = _Choice(registry, connection, budget, percentile)
        found = comparable(connection, query, str(registry.root))
        choice.refuse_unknown_percentile(found)
        fits = choice.fits()
        order = "ORDER BY top1 DESC, ms, size_bytes, name LIMIT 1"
        best = choice.row(f"{fits} {order}")
        if best is None:
            raise _nothing_fits(choice, query)
        faster = choice.row(f"{fits} AND ms < :best_ms {order}", best_ms=best.ms)
        others = choice.fits(latency=False)
        slower = choice.row(
            f"{others} AND ms > :latency_ms AND top1 > :best_top1 ORDER BY ms, top1 DESC, size_bytes, name LIMIT 1",
            best_top1=best.top1,
        )
        engine, latency = choice.read(best)
        check_file(engine, content=False)
        return Pick(
            engine=engine, latency=latency, budget=budget, percentile=percentile, fitting=choice.count(fits),
            candidates=found.engines, runner_up_faster=choice.runner_up(faster, best),
            runner_up_slower=choice.runner_up(slower, best), left_out=found.left_out,
        )  # fmt: skip


@dataclass(frozen=True)
class _Choice:
    """Queries on the temporary table that `comparable` fills; conditions are SQL on its columns and on `ms`."""

    registry: Registry
    connection: sqlite3.Connection
    budget: Budget
    percentile: Statistic

    def fits(self, *, latency: bool = True) -> str:
        """The budget as a condition; `Budget.misses` is the same in Python."""
        conditions = ["ms <= :latency_ms"] if latency else ["ms IS NOT NULL"]
        conditions += [f"{name}_ms <= :also_{name}" for name in self.budget.also]
        conditions += ["top1 >= :min_accuracy"] if self.budget.min_accuracy is not None else []
        conditions += ["size_bytes <= :max_size_bytes"] if self.budget.max_size_bytes is not None else []
        return " AND ".join(conditions)

    def rows(self, rest: str, **more: object) -> list[_Row]:
        found = self._execute("engine_id, conditions_id, name, top1, size_bytes, ms, mean_ms, worst_ms", rest, more)
        return [_Row(**dict(row)) for row in found]

    def row(self, rest: str, **more: object) -> _Row | None:
        return next(iter(self.rows(rest, **more)), None)

    def count(self, condition: str) -> int:
        """Engines for which it holds."""
        return int(next(self._execute("count(DISTINCT engine_id)", condition, {}))[0])

    def families(self) -> list[str]:
        return [row["family"] for row in self._execute("DISTINCT family", "TRUE ORDER BY family", {})]

    def read(self, row: _Row) -> tuple[EngineRecord, LatencyRecord]:
        """The engine of a row, and its latency under the conditions of the pick."""
        with rows.readable():  # a damaged index does not find what the table has
            (engine,) = self.registry.read_engines(self.connection, "engines.id = :id", {"id": row.engine_id})
            (timed,) = self.connection.execute(
                f"SELECT * FROM {rows.LATENCIES} WHERE engine_id = ? AND conditions_id = ?",
                (row.engine_id, row.conditions_id),
            )
            return engine, rows.read_latency(timed)

    def runner_up(self, row: _Row | None, best: _Row) -> RunnerUp | None:
        if row is None:
            return None
        engine, timed = self.read(row)
        return RunnerUp(
            engine=engine, latency_ms=row.ms, latency_difference_ms=row.ms - best.ms,
            top1_difference=row.top1 - best.top1, origin=origin_of(timed),
        )  # fmt: skip

    def refuse_unknown_percentile(self, found: Comparable) -> None:
        """
        Raises:
            UsageError: it is known of no engine.
        """
        if not self.count("ms IS NOT NULL"):
            raise UsageError(
                f"A roofline predicts the median only, and nothing else is known of these engines on {found.hardware}: "
                "pass --percentile p50, or import a profile."
            )

    def _execute(self, columns: str, rest: str, more: Mapping[str, object]) -> sqlite3.Cursor:
        table = f"(SELECT *, {self.percentile}_ms AS ms FROM candidates)"
        largest = min(self.budget.max_size_bytes or 0, 2**63 - 1)  # of SQLite's integers
        also = {f"also_{name}": bound for name, bound in self.budget.also.items()}
        parameters = {**vars(self.budget), **also, "max_size_bytes": largest, **more}
        return self.connection.execute(f"SELECT {columns} FROM {table} WHERE {rest}", parameters)


def _nothing_fits(choice: _Choice, query: Query) -> NothingFits:
    """What was asked, the engine with the smallest sum of relative misses, and each bound it misses."""
    budget = choice.budget
    candidates = Candidates(
        items=choice.rows("ms IS NOT NULL"), latency_ms=lambda r: r.ms, accuracy=lambda r: r.top1,
        size_bytes=lambda r: r.size_bytes, name=lambda r: r.name,
        also=lambda r, name: cast(float, getattr(r, f"{name}_ms")),
    )  # fmt: skip
    row = candidates.nearest(budget)
    assert row is not None  # refuse_unknown_percentile leaves no empty set
    nearest, latency = choice.read(row)
    misses = candidates.misses(row, budget)
    parts = []
    if "latency" in misses:
        over = format_latency(row.ms - budget.latency_ms)
        origin = origin_of(latency)
        parts.append(f"{format_latency(row.ms)}{'' if origin == 'measured' else f' {origin}'}, {over} over")
    for name, bound in budget.also.items():
        if name in misses:
            found_ms = candidates.also(row, name)
            parts.append(f"{name} {format_latency(found_ms)}, {format_latency(found_ms - bound)} over")
    if "accuracy" in misses and budget.min_accuracy is not None:
        short = f"{budget.min_accuracy - nearest.top1:.3g}"
        parts.append(f"top-1 {nearest.top1:.2f} %, {short} point{'' if short == '1' else 's'} short")
    if "size" in misses and budget.max_size_bytes is not None:
        over = format_size(nearest.size_bytes - budget.max_size_bytes)
        parts.append(f"{format_size(nearest.size_bytes)}, {over} over")
    return NothingFits(
        f"No engine of {', '.join(choice.families())} on {nearest.device} is "
        f"{budget.describe(choice.percentile, query.batch)}: the nearest is {described(nearest)}, {'; '.join(parts)}."
    )

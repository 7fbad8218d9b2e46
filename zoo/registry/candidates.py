"""Which engines of a registry can be compared with one another, as SQL conditions. Imports nothing heavy.

A pick compares latencies under one set of conditions, and accuracies on one set of images. Both are chosen here,
from counts that the database makes; what is left out is counted too.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from klas_zoo.errors import KlasZooError, RegistryError, UnknownName, UsageError
from klas_zoo.hardware import describe_cpu
from klas_zoo.registry.records import NOT_RUN, TO_COMPILE, VERIFIED
from klas_zoo.registry.tags import builds_of

_TIMED = (
    "FROM builds CROSS JOIN engines ON engines.build_id = builds.id"
    " CROSS JOIN latencies ON latencies.engine_id = engines.id"
)
_ORIGINS = ("measured", "interpolated", "roofline")


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a pick asks for.

    Attributes:
        hardware: part of the hardware's description; None: this machine's for `cpu`, else the best known.
        threads: None: as many as most engines were measured with.
        claimed: also consider accuracies that were claimed instead of measured.
    """

    family: str | None = None
    device: str | None = None
    batch: int = 1
    hardware: str | None = None
    threads: int | None = None
    measured_only: bool = False
    claimed: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparable:
    """What the rows of the temporary table `candidates` have in common, and what was left out of it.

    The table has a row for each comparable latency: `engine_id`, `conditions_id`, `family`, `name`, `top1`,
    `size_bytes` and `p50_ms`, `p90_ms`, `p99_ms`, `mean_ms`, `worst_ms`, the last two as
    `klas_zoo.registry.records.percentile_ms` gives them.

    Attributes:
        engines: how many there are in the table.
    """

    engines: int
    hardware: str
    left_out: tuple[str, ...]


def comparable(connection: sqlite3.Connection, query: Query, root: str) -> Comparable:
    """Chooses the conditions and the images under which most engines compare, and collects those engines.

    Raises:
        UsageError: a name that is not registered, or nothing that compares; the message says what to pass.
        RegistryError: the registry holds no engines.
    """
    chosen, parameters = builds_of(connection, query.family, query.device)
    registered = _check_engines(connection, chosen, parameters, query, root)
    narrowing = _Narrowing(connection, chosen, parameters, query.batch)
    hardware = _narrow(narrowing, query)
    connection.execute("DROP TABLE IF EXISTS temp.candidates")
    connection.execute(
        "CREATE TEMP TABLE candidates AS SELECT engine_id, conditions_id, family, route AS name, top1, size_bytes,"
        " p50_ms, p90_ms, p99_ms, coalesce(mean_ms, p50_ms) AS mean_ms,"
        f" coalesce(worst_ms, p99_ms, p90_ms, p50_ms) AS worst_ms {_TIMED}"
        f" WHERE {' AND '.join([chosen, *narrowing.rules])}",
        narrowing.parameters,
    )
    (engines,) = connection.execute("SELECT count(DISTINCT engine_id) FROM candidates").fetchone()
    left_out = narrowing.left_out() if engines < registered else ()
    return Comparable(engines=engines, hardware=hardware, left_out=left_out)


def _narrow(narrowing: _Narrowing, query: Query) -> str:
    """Applies every rule in turn: the first ones depend on the query alone, the others on what is left.

    Returns:
        The hardware on which latencies are compared.
    """
    for status in (NOT_RUN, TO_COMPILE):
        narrowing.by(partial(_differs, status), status, sql=f"engines.status <> '{status}'")
    narrowing.by(
        lambda g: g["batch"] == query.batch, f"no latency at batch size {query.batch}",
        lambda groups: _no_such_batch(groups, query),
    )  # fmt: skip
    # what load() reproduces: the host's clock, copies included, and the options an engine is opened with
    narrowing.by(
        lambda g: g["clock"] == "host" and not g["options"], "timed by the device's clock or with other options only",
        _not_reproducible,
    )  # fmt: skip
    claims = query.claimed or query.family is not None
    if not claims:
        narrowing.by(lambda g: not g["claimed"], "the accuracy is claimed (--claimed)", sql="accuracy_source = ''")
    hardware = _hardware(query, narrowing.groups)
    narrowing.by(lambda g: g["hardware"] == hardware, "measured on other hardware (--hardware)", _elsewhere)
    if query.measured_only:
        narrowing.by(
            lambda g: g["origin"] == "measured", "the latency is predicted (--measured-only)",
            lambda groups: _only_predicted(groups, query), sql="origin = 'measured'",
        )  # fmt: skip
    threads = query.threads if query.threads is not None else _most(narrowing.groups, "threads")
    narrowing.by(
        lambda g: g["threads"] == threads, "measured with another number of threads (--threads)",
        lambda groups: _no_such_threads(groups, query),
    )  # fmt: skip
    runtimes = {g["runtime"] for g in narrowing.groups}
    versions = {one: _most([g for g in narrowing.groups if g["runtime"] == one], "version") for one in runtimes}
    narrowing.by(lambda g: versions.get(g["runtime"]) == g["version"], "measured with another version of their runtime")
    images = _most([g for g in narrowing.groups if not g["claimed"]] or narrowing.groups, "images")
    narrowing.by(
        lambda g: g["images"] == images or bool(claims and g["claimed"]), "evaluated on other images (--family)",
        sql=f"(engines.data_fingerprint = :images{' OR accuracy_source <> :measured' if claims else ''})",
        images=images, measured="",
    )  # fmt: skip
    return hardware


Group = Mapping[str, Any]
"""Engines with a latency of one origin under the same conditions: these conditions, `status`, `images`, `claimed`,
`origin`, `from_profile`, how many `engines`, and when the `newest` latency was measured."""


class _Narrowing:
    """Groups of latencies that become fewer rule by rule, and the same rules as SQL."""

    def __init__(
        self, connection: sqlite3.Connection, chosen: str, parameters: Mapping[str, object], batch: int
    ) -> None:
        self._connection, self._chosen = connection, chosen
        self.parameters = dict(parameters)
        self._conditions: dict[int, Group] = {
            row["id"]: {**dict(row), "version": row["runtime_version"]}
            for row in connection.execute("SELECT * FROM conditions")
        }
        # of one batch size, unless there is none: then the others are needed for the message
        self.groups = self._read([n for n, one in self._conditions.items() if one["batch"] == batch])
        self.groups = self.groups or self._read(list(self._conditions))
        self.rules: list[str] = []
        self._reasons: list[str] = []

    def by(
        self, keeps: Callable[[Group], bool], reason: str,
        otherwise: Callable[[list[Group]], KlasZooError] | None = None, *, sql: str | None = None, **parameters: object,
    ) -> None:  # fmt: skip
        """Keeps the groups for which a rule holds.

        Args:
            reason: a clause about the engines that the rule leaves out.
            otherwise: the error where no group is left, made of the groups before.
            sql: the rule; None: it looks at the conditions only.

        Raises:
            KlasZooError: no group is left.
        """
        before, self.groups = self.groups, [group for group in self.groups if keeps(group)]
        if not self.groups and (before or otherwise):
            raise otherwise(before) if otherwise else _nothing_left(before, reason)
        if sql is None:
            sql = _among([number for number, conditions in self._conditions.items() if keeps(conditions)])
        self.rules.append(sql)
        self._reasons.append(reason)
        self.parameters |= parameters

    def _read(self, conditions: Sequence[int]) -> list[Group]:
        """The groups of latencies under these conditions."""
        found = self._connection.execute(
            "SELECT engines.status, engines.data_fingerprint AS images, accuracy_source <> '' AS claimed,"
            " conditions_id, origin, from_profile, family, builds.device, count(*) AS engines,"
            f" max(measured_at) AS newest {_TIMED} WHERE {self._chosen} AND {_among(conditions)}"
            " GROUP BY 1, 2, 3, 4, 5, 6",
            self.parameters,
        )
        return [{**self._conditions[row["conditions_id"]], **dict(row)} for row in found]

    def left_out(self) -> tuple[str, ...]:
        """A clause for each rule that engines were left out by: those without a latency that keeps all rules."""
        passed = str(len(self.rules))
        for number, rule in reversed(list(enumerate(self.rules))):
            passed = f"CASE WHEN {rule} THEN {passed} ELSE {number} END"
        engines = _TIMED.replace("CROSS JOIN latencies", "LEFT JOIN latencies")  # also those without any
        found = self._connection.execute(
            f"SELECT family, passed, count(*) AS engines FROM (SELECT builds.family AS family, max({passed}) AS passed"
            f" {engines} WHERE {self._chosen} GROUP BY engines.id)"
            " WHERE passed < :rules GROUP BY passed, family ORDER BY passed, family",
            {**self.parameters, "rules": len(self.rules)},
        ).fetchall()
        clauses = []
        for number, reason in enumerate(self._reasons):
            those = [row for row in found if row["passed"] == number]
            if those:
                count = sum(row["engines"] for row in those)
                families = _listed(row["family"] for row in those)
                clauses.append(f"{count} engine{'' if count == 1 else 's'} of {families}: {reason}")
        return tuple(clauses)


def _among(conditions: Sequence[int]) -> str:
    # the + keeps SQLite from a search in the index for each of them
    return f"+conditions_id IN ({', '.join(map(str, conditions))})"


def _check_engines(
    connection: sqlite3.Connection, chosen: str, parameters: Mapping[str, object], query: Query, root: str
) -> int:
    """How many engines there are of what was asked for, verified or not.

    Raises:
        UsageError, RegistryError: no engine that was asked for, only unverified ones, or engines of several devices.
    """
    found = connection.execute(
        "SELECT builds.device, status, count(*) AS engines FROM builds"
        f" CROSS JOIN engines ON engines.build_id = builds.id WHERE {chosen} GROUP BY 1, 2 ORDER BY 1, 2",
        dict(parameters),
    ).fetchall()
    if not found:
        raise _none_registered(connection, query, root)
    devices = {row["device"] for row in found}
    if len(devices) > 1:
        raise UsageError(f"Engines for several devices are registered, {_listed(devices)}: pass --device.")
    if all(row["status"] != VERIFIED for row in found):
        states = ", ".join(f"{row['engines']} {row['status']}" for row in found)
        raise UsageError(
            f"No engine for {found[0]['device']} was run on one yet ({states}): run klas-zoo install on such a machine."
        )
    return sum(row["engines"] for row in found)


def _none_registered(connection: sqlite3.Connection, query: Query, root: str) -> KlasZooError:
    """Why there is no engine of that family and device."""
    family, device = query.family, query.device
    tagged = family if family is not None and "@" in family else None
    chosen, parameters = builds_of(connection, tagged, None)
    registered = connection.execute(
        f"SELECT DISTINCT family, device FROM builds WHERE {chosen} AND id IN (SELECT build_id FROM engines)",
        parameters,
    ).fetchall()
    families = {tagged} if tagged is not None else {row["family"] for row in registered}
    devices = {row["device"] for row in registered}
    if not registered:
        return RegistryError(f"The registry {root} holds no engines: run klas-zoo build, add or install first.")
    if family is not None and family not in families:
        return UnknownName("family", family, families)
    if device is not None and device not in devices:
        return UnknownName("device", device, devices)
    others = _listed(row["device"] for row in registered if tagged is not None or row["family"] == family)
    return UsageError(f"{family} has no engines for {device}, only for {others}: build them first.")


def _hardware(query: Query, groups: Sequence[Group]) -> str:
    """The hardware whose latencies are compared."""
    known = {group["hardware"] for group in groups}
    if query.hardware is not None:
        found = sorted(name for name in known if query.hardware.lower() in name.lower())
        if not found:
            raise UnknownName("hardware", query.hardware, known)
        if len(found) > 1 and query.hardware not in found:
            raise UsageError(f"--hardware '{query.hardware}' fits {'; '.join(found)}: pass more of the name.")
        return query.hardware if query.hardware in found else found[0]
    if groups[0]["device"] == "cpu":
        return describe_cpu()
    return str(_most(groups, "hardware"))


def _most(groups: Sequence[Group], name: str) -> object:
    """The value that has the best kind of latency, that builds measured under, of most engines, and the newest."""

    def rank(value: object) -> tuple[object, ...]:
        mine = [group for group in groups if group[name] == value]
        counts = {origin: sum(g["engines"] for g in mine if g["origin"] == origin) for origin in _ORIGINS}
        best = next((origin for origin in _ORIGINS if counts[origin]), "")
        by_build = any(not group["from_profile"] for group in mine if group["origin"] == best)
        newest = max(group["newest"] for group in mine)
        return -(_ORIGINS.index(best) if best else 3), by_build, *counts.values(), newest

    return max(sorted({group[name] for group in groups}, key=str), key=rank)


def _no_such_batch(groups: Sequence[Group], query: Query) -> UsageError:
    batches = sorted({group["batch"] for group in groups})
    if batches:
        only = ", ".join(map(str, batches))
        return UsageError(f"No engine was measured at batch size {query.batch}, only at {only}.")
    family = query.family or "FAMILY"
    return UsageError(
        f"No engine was measured at batch size {query.batch}, nor at any other: measure a profile on such a machine "
        f"(klas-zoo profile --family {family} --batch {query.batch})."
    )


def _not_reproducible(groups: Sequence[Group]) -> UsageError:
    return UsageError(
        f"The latencies of {groups[0]['family']} on {groups[0]['device']} are device times, or were measured with "
        "options that loading an engine does not set: measure it on such a machine (klas-zoo install, or klas-zoo "
        "profile)."
    )


def _elsewhere(groups: Sequence[Group]) -> UsageError:
    known = "; ".join(sorted({group["hardware"] for group in groups}))
    return UsageError(
        f"No engine was measured on this machine ({describe_cpu()}), only on {known}: run klas-zoo build or install "
        "here, or pass --hardware."
    )


def _only_predicted(groups: Sequence[Group], query: Query) -> UsageError:
    group = groups[0]
    return UsageError(
        f"No latency of {group['family']} on {group['device']} at batch size {query.batch} was measured, there are "
        f"only predictions ({group['origin']}): import a profile that measured it, or omit --measured-only."
    )


def _no_such_threads(groups: Sequence[Group], query: Query) -> UsageError:
    known = ", ".join(sorted({str(group["threads"]) for group in groups}))
    return UsageError(f"No engine was measured with {query.threads} threads, only with {known}.")


def _nothing_left(groups: Sequence[Group], reason: str) -> UsageError:
    count = sum(group["engines"] for group in groups)
    return UsageError(f"Nothing can be picked: for all {count} candidates, {reason}.")


def _differs(status: str, group: sqlite3.Row) -> bool:
    return bool(group["status"] != status)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))

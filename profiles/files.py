"""Profiles as JSON: one record a profile, sorted keys, readable and diffable; and all that is checked on the way in.

A file that came from another machine counts only after every field was found, of its kind and in
its range. What is absurd is refused too: a network that computes faster than its device can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, Literal

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.catalog import PRECISIONS, find_spec
from klas_zoo.profiles.profile import SCHEMA_VERSION, MeasuredNetwork, Profile, Statistics
from klas_zoo.reading import Count, Positive, check_schema, convert, parse
from klas_zoo.routes import Route, Segment

# no processor comes near; of a GPU the catalog knows the peak
_MOST_CPU_TFLOPS = 500
_BEYOND_PEAK = 1.1  # boost clocks are above those that peaks are computed with


def to_json(profile: Profile) -> dict[str, Any]:
    """What `from_json` reads."""
    table = asdict(profile)
    table["networks"] = [
        asdict(one) | {"route": str(one.route), "segments": one.route.to_json()} for one in profile.networks
    ]
    return {"schema_version": SCHEMA_VERSION, "unit": "ms", **_rounded(table)}


def to_text(profiles: list[Profile]) -> str:
    """One profile as its record, several as a list of records in one file."""
    records = [to_json(one) for one in profiles]
    whole = records[0] if len(records) == 1 else {"schema_version": SCHEMA_VERSION, "profiles": records}
    return json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def from_text(text: str, where: str) -> list[Profile]:
    """The profiles of one file.

    Args:
        where: the file's name, for errors.

    Raises:
        ProfileError: it is no JSON, of a newer klas-zoo, or a field is missing, of the wrong kind or absurd.
    """
    table = parse(text, where, ProfileError)
    check_schema(table, SCHEMA_VERSION, where, ProfileError)
    records = table.get("profiles", [table])
    if not isinstance(records, list) or not records:
        raise ProfileError(f"{where} holds no profiles.")
    paths = [f"profiles[{index}]." for index in range(len(records))] if "profiles" in table else [""]
    return [from_json(record, where, path) for record, path in zip(records, paths, strict=True)]


def from_json(table: Any, where: str, path: str = "") -> Profile:
    """One record, checked.

    Raises:
        ProfileError: see `from_text`.
    """
    table = upgraded(table)
    check_schema(table, SCHEMA_VERSION, where, ProfileError)
    record = {name: value for name, value in table.items() if name != "schema_version"}
    found = convert(record, _Record, where, ProfileError, path=path)
    networks = {"networks": tuple(one.measured for one in found.networks)}
    return Profile(**{field.name: getattr(found, field.name) for field in fields(Profile)} | networks)


def upgraded(table: Any) -> Any:
    """A record of schema 1 in the present schema; any other as it is.

    In schema 1 a GPU's `latency` is the device's time, and `host` is the host's time without copies: no caller of
    an engine waits for that time, so it is dropped, and the record is one of the device's clock. Options are in other
    words.
    """
    if not isinstance(table, Mapping) or table.get("schema_version") != 1 or "profiles" in table:
        return table
    options, networks = table.get("options"), table.get("networks")
    if not isinstance(options, Mapping) or not isinstance(networks, list):
        return table  # damaged; `from_json` reports where
    graph = "cuda_graph" if table.get("runtime") == "torch" else "enable_cuda_graph"
    on = {"compile": options.get("compiled") is True, graph: options.get("cuda_graph") is True}
    measured = [
        {key: value for key, value in one.items() if key != "host"} | {"device": None}
        if isinstance(one, Mapping) and "host" in one
        else one
        for one in networks
    ]
    return {
        **table,
        "schema_version": SCHEMA_VERSION,
        "clock": "device" if table.get("kind") == "gpu" and networks else "host",
        "options": {name: "1" for name, value in on.items() if value},
        "networks": measured,
    }


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A `MeasuredNetwork` as it is written: `route` is the name of the segments."""

    route: str
    segments: tuple[tuple[str, int, int], ...]
    macs: Positive
    parameters: Count
    latency: Statistics
    device: Statistics | None = None

    def __post_init__(self) -> None:
        if str(self.measured.route) != self.route:
            raise ValueError(f"route is '{self.route}', and its segments are those of '{self.measured.route}'")

    @property
    def measured(self) -> MeasuredNetwork:
        return MeasuredNetwork(
            route=Route(tuple(Segment(*one) for one in self.segments)), macs=self.macs, parameters=self.parameters,
            latency=self.latency, device=self.device,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Record(Profile):
    """A `Profile` as it is written, and what no field can be checked for alone."""

    unit: Literal["ms"]
    networks: tuple[_Network, ...] = ()  # type: ignore[assignment]  # which is why it is never used as a Profile

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is '{self.precision}', not one of {', '.join(PRECISIONS)}")
        if datetime.fromisoformat(self.measured_at).tzinfo is None:
            raise ValueError(f"measured_at is '{self.measured_at}', without its time zone")
        for name in ("hardware", "device", "family"):
            if not getattr(self, name).isprintable():
                raise ValueError(f"{name} is {ascii(getattr(self, name))[:80]}, which no terminal shows")
        if len({one.route for one in self.networks}) < len(self.networks):
            raise ValueError("networks has one route twice")
        if not self.networks and not self.failure and (self.origin == "measured" or self.model is None):
            raise ValueError("networks has none, and there is no failure that says why")
        for index, one in enumerate(self.networks):
            self._check_network(f"networks[{index}]", one.measured)

    def _check_network(self, name: str, one: MeasuredNetwork) -> None:
        if self.model and self.model.covers(one.route) and self.model.macs(one.route) != one.macs:
            raise ValueError(f"{name}.macs is {one.macs}, and {self.model.macs(one.route)} in its model")
        tflops, most = 2 * one.macs * self.batch / one.latency.p50_ms / 1e9, _most_tflops(self)
        if tflops > most:
            raise ValueError(
                f"{name}.latency is absurd, {one.route} would compute at {tflops:.3g} TFLOPS, and {self.device} "
                f"reaches {most:.3g} in {self.precision} at best"
            )


def _most_tflops(profile: Profile) -> float:
    spec = find_spec(profile.device)
    if spec is None or not spec.peak_tflops:
        return _MOST_CPU_TFLOPS if profile.kind == "cpu" else math.inf
    peak = spec.peak(profile.precision)
    if profile.precision == "fp32":
        peak = max(peak or 0, spec.peak("tf32") or 0)  # torch rounds convolutions to TF32 by default
    return _BEYOND_PEAK * (peak or max(spec.peak_tflops.values()))


def _rounded(value: Any) -> Any:
    """Floats to seven digits: more would be noise, and noise makes no good diff."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value

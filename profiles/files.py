"""Profiles as JSON: one record a profile, sorted keys, readable and diffable; and all that is checked on the way in.

A file that came from another machine counts only after every field was found, of its kind and in
its range. What is absurd is refused too: a network that computes faster than its device can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from itertools import pairwise
from typing import Any

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.catalog import PRECISIONS, find_spec
from klas_zoo.profiles.fields import Fields
from klas_zoo.profiles.profile import (
    LONGEST_MS,
    SCHEMA_VERSION,
    SHORTEST_MS,
    AnchorModel,
    LatencyModel,
    MeasuredNetwork,
    PredictionError,
    Profile,
    Statistics,
)
from klas_zoo.routes import Route

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
    try:
        table = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where} is no profile: it is not JSON ({error}).") from error
    if not isinstance(table, dict):
        raise ProfileError(f"{where} is no profile: its outermost value is no object.")
    fields = Fields(table, where, "")
    fields.check_schema()
    if "profiles" not in table:
        return [from_json(table, where)]
    records = fields.take("profiles", list)
    if not records:
        raise ProfileError(f"{where} holds no profiles.")
    return [
        from_json(fields.object(record, f"profiles[{index}]"), where, f"profiles[{index}].")
        for index, record in enumerate(records)
    ]


def from_json(table: Mapping[str, Any], where: str, path: str = "") -> Profile:
    """One record, checked.

    Raises:
        ProfileError: see `from_text`.
    """
    fields = Fields(table, where, path)
    fields.check_schema()
    if fields.text("unit") != "ms":
        raise fields.error("unit", "'ms', the only unit of a profile")
    profile = Profile(
        **{name: fields.text(name) for name in ("family", "family_sha256", "device", "hardware", "runtime")},
        **{name: fields.text(name) for name in ("runtime_version", "provider", "measured_at")},
        **{name: fields.take(name, dict) for name in ("options", "method", "conditions", "versions")},
        kind=fields.one_of("kind", ("cpu", "gpu")),
        origin=fields.one_of("origin", ("measured", "roofline")),
        precision=fields.one_of("precision", PRECISIONS),
        compute_capability=fields.text("compute_capability", optional=True),
        input_shape=tuple(fields.whole(name="input_shape", count=3)),
        batch=fields.integer("batch", least=1),
        threads=fields.integer("threads", least=0),
        networks=tuple(fields.each("networks", _network)),
        model=fields.maybe("model", _model),
        failure=fields.text("failure", empty=True),
        warnings=tuple(fields.take("warnings", list)),
    )
    fields.nothing_left(besides=("schema_version", "unit"))
    _check_whole(profile, fields)
    return profile


def _network(fields: Fields) -> MeasuredNetwork:
    segments, name = fields.take("segments", list), fields.text("route")
    try:
        route = Route.from_json(segments)
    except (ValueError, TypeError) as error:
        raise fields.error("segments", f"those of a route ({error})") from error
    if str(route) != name:
        raise fields.error("route", f"'{route}', which is what its segments are")
    found = MeasuredNetwork(
        route=route,
        macs=fields.integer("macs", least=1),
        parameters=fields.integer("parameters", least=0),
        latency=_statistics(fields.inner("latency")),
        host=fields.maybe("host", _statistics),
    )
    fields.nothing_left()
    return found


def _statistics(fields: Fields) -> Statistics:
    names = ("min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")
    values = {name: fields.number(name, SHORTEST_MS, LONGEST_MS) for name in names}
    for before, after in pairwise(names):
        if values[before] > values[after]:
            raise fields.error(after, f"at least {before}, {values[before]:g}", values[after])
    found = Statistics(
        **values,
        runs=fields.integer("runs", least=1),
        coefficient_of_variation=fields.number("coefficient_of_variation", 0, 1000),
    )
    fields.nothing_left()
    return found


def _model(fields: Fields) -> LatencyModel:
    anchors = {name: _anchor(one) for name, one in fields.inner("anchors").children()}
    rates = fields.inner("seam_ms_per_gmac")
    error = fields.inner("error")
    found = LatencyModel(
        anchors=anchors,
        seam_ms=fields.number("seam_ms", 0, LONGEST_MS),
        seam_ms_per_gmac={name: rates.number(name, 0, LONGEST_MS) for name in anchors},
        error=PredictionError(
            checked=error.integer("checked", least=0),
            **{name: error.number(name, 0, 1e6) for name in ("median_percent", "p90_percent", "largest_percent")},
            method=error.text("method"),
        ),
    )
    for one in (rates, error, fields):
        one.nothing_left()
    return found


def _anchor(fields: Fields) -> AnchorModel:
    depth = len(fields.peek("block_ms", list))
    found = AnchorModel(
        stem_ms=fields.number("stem_ms", 0, LONGEST_MS),
        head_ms=fields.number("head_ms", 0, LONGEST_MS),
        stem_macs=fields.integer("stem_macs", least=0),
        head_macs=fields.integer("head_macs", least=0),
        block_ms=tuple(fields.numbers("block_ms")),
        block_macs=tuple(fields.whole(name="block_macs", count=depth, least=0)),
        vectors=tuple(fields.whole(name="vectors", count=depth + 1)),
        widths=tuple(fields.whole(name="widths", count=depth + 1)),
    )
    fields.nothing_left()
    return found


def _check_whole(profile: Profile, fields: Fields) -> None:
    try:
        zone = datetime.fromisoformat(profile.measured_at).tzinfo
    except ValueError as error:
        raise fields.error("measured_at", "a date and time of ISO 8601") from error
    if zone is None:
        raise fields.error("measured_at", "a date and time with its zone")
    if len({one.route for one in profile.networks}) < len(profile.networks):
        raise fields.error("networks", "networks that are all different")
    if not profile.failure and profile.model is None and not profile.networks:
        raise fields.error("networks", "at least one network, or a failure that says why there is none")
    if profile.origin == "measured" and not profile.failure and not profile.networks:
        raise fields.error("networks", "at least one network of a measured profile")
    most = _most_tflops(profile)
    for index, one in enumerate(profile.networks):
        if profile.model and profile.model.covers(one.route) and profile.model.macs(one.route) != one.macs:
            raise fields.error(f"networks[{index}].macs", f"{profile.model.macs(one.route)}, as in its model", one.macs)
        tflops = 2 * one.macs * profile.batch / one.latency.p50_ms / 1e9
        if tflops > most:
            raise ProfileError(
                f"{fields.where}: {fields.path}networks[{index}].latency is absurd: {one.route} would compute at "
                f"{tflops:.3g} TFLOPS, and {profile.device} reaches {most:.3g} in {profile.precision} at best."
            )


def _most_tflops(profile: Profile) -> float:
    spec = find_spec(profile.device)
    if spec is None or not spec.peak_tflops:
        return _MOST_CPU_TFLOPS if profile.kind == "cpu" else math.inf
    peak = spec.peak(profile.precision)
    if profile.precision == "fp32":
        peak = max(peak or 0, spec.peak("tf32") or 0)  # torch rounds convolutions to TF32 by default
    return _BEYOND_PEAK * (peak or max(spec.peak_tflops.values()))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _rounded(value: Any) -> Any:
    """Floats to seven digits: more would be noise, and noise makes no good diff."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value

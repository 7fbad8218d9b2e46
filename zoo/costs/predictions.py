"""Latencies of routes on a device, for a build: from a profile of it, or predicted by a roofline.

A device need not be here: a stored, measured profile of it is used if there is one, else a roofline of public figures,
which is stored too so that `pick` can answer from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from klas_zoo.errors import AbsentDevice
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.catalog import DeviceSpec, find_spec
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.estimates import estimate
from klas_zoo.profiles.files import to_json
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.records import UNCHECKED, EstimatedLatency, origin_of
from klas_zoo.profiles.roofline import calibration_of, corrected, roofline_model
from klas_zoo.profiles.shapes import Counted, architecture_sha256, count, is_profile_of
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.routes import Route
from klas_zoo.versions import versions


@dataclass(frozen=True, kw_only=True)
class PredictedCosts:
    """Milliseconds of any route of a family on a device, by one profile's model."""

    profile: Profile

    def __call__(self, route: Route) -> float:
        """The median of a batch: as it was measured, where it was, else as the model says."""
        seen = self.profile.network(route)
        return seen.latency.p50_ms if seen else self.estimate(route).p50_ms

    def estimate(self, route: Route) -> EstimatedLatency:
        return estimate(self.profile, route)

    def anchors_ms(self) -> dict[str, float]:
        """Of every whole anchor."""
        assert self.profile.model is not None
        return {
            name: self(Route.anchor(name, len(model.block_ms))) for name, model in self.profile.model.anchors.items()
        }

    def origin(self, route: Route) -> str:
        """`measured`, or what it was predicted by, with its error."""
        return "measured" if self.profile.network(route) else origin_of(self.estimate(route))

    @property
    def tell_routes_apart(self) -> bool:
        """Whether a frontier may be drawn over these latencies."""
        assert self.profile.model is not None
        return self.profile.origin != "roofline" or self.profile.model.hidden_by_the_floor is None

    def describe(self) -> str:
        """A sentence about where the latencies come from."""
        one, model = self.profile, self.profile.model
        assert model is not None
        unchecked = model.error.method.startswith(UNCHECKED)
        error = model.error.method if unchecked else f"±{model.error.p90_percent:.2g} %, {model.error.method}"
        if one.origin == "roofline":
            said = f"Latencies on {one.device} are predicted by a roofline ({error}): it has not been measured."
            return said if self.tell_routes_apart else f"{said} {floor_warning(one)}"
        what = f"{one.measured_at} ({one.runtime}, {one.precision})"
        return f"Latencies on {one.device} are those of its profile of {what}; interpolated ones {error}."

    def key(self) -> dict[str, object]:
        """What determines the numbers; the date of a roofline does not."""
        table = to_json(self.profile)
        return {name: table[name] for name in ("family_sha256", "device", "batch", "origin", "networks", "model")}


def floor_warning(profile: Profile) -> str:
    """A sentence for a roofline that cannot tell anchors apart; empty for others."""
    pair = profile.model.hidden_by_the_floor if profile.model and profile.origin == "roofline" else None
    if pair is None:
        return ""
    return (
        f"At batch {profile.batch} {pair[0]} and {pair[1]} come out alike, since starting kernels takes longer than "
        "what they compute: a larger --batch or a measured profile tells them apart."
    )


def predict_profiles(
    family: Family,
    spec: DeviceSpec,
    *,
    runtime: str,
    precision: str,
    batches: Sequence[int],
    store: ProfileStore,
    counted: Counted | None = None,
) -> list[Profile]:
    """Rooflines of a device as profiles, one for each batch size, corrected by what `store` holds of others.

    Raises:
        ProfileError: no public figures of the device, none in the precision, or no roofline of the runtime.
    """
    counted = counted or count(family.chains, family.input_shape)
    measured = [
        one for one in store.profiles(family.name) if one.runtime == runtime and one.origin == "measured"
    ]
    calibration = corrected(calibration_of(runtime), counted, spec, measured)
    return [
        Profile(
            family=family.name,
            family_sha256=counted.sha256,
            input_shape=tuple(family.input_shape),
            device=spec.name,
            hardware=f"{spec.vendor} {spec.name}, public figures",
            kind="gpu",
            compute_capability=spec.compute_capability,
            runtime=runtime,
            runtime_version="none: nothing was run",
            provider="CUDAExecutionProvider" if runtime == "onnxruntime" else runtime,
            precision=precision,
            batch=batch,
            threads=0,
            origin="roofline",
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=roofline_model(counted, spec, calibration, precision=precision, batch=batch),
            method={
                "calibrated_on": calibration.based_on,
                **{name: getattr(calibration, name) for name in ("compute", "memory", "kernel_us", "host_us")},
                "factor_of_profiles": calibration.factor,
            },
            versions=versions(),
        )
        for batch in batches
    ]


def predicted_costs(
    family: Family, device: Device, *, batches: Sequence[int], store: ProfileStore, runtime: str = "onnxruntime",
    precision: str = "fp32", also: Sequence[tuple[str, str]] = (), keep: bool = True,
) -> PredictedCosts | None:  # fmt: skip
    """What routes cost on a device by the newest measured profile of it, or by a roofline where it is not here.

    None where a device of this machine has no profile: then multiply-adds have to do, or the anchors
    are timed.

    Args:
        batches: the first one is what routes are priced at.
        also: other (runtime, precision) that engines are made for, in the order in which their measured profiles of a
            device elsewhere are taken where there is none of the first: better than a roofline.
        keep: store a roofline of each, so that `pick` can answer from it.

    Raises:
        AbsentDevice: the device is not here and nothing can be said about it.
        ProfileError: a stored profile cannot be read, or the device has no such precision.
    """
    sha256 = architecture_sha256(family.chains, family.input_shape)
    counted: Counted | None = None
    wanted = [(runtime, precision), *(() if device.here else also)]
    held = [one for one in store.profiles(family.name, device.name) if (one.runtime, one.precision) in wanted]
    for one in sorted(held, key=lambda one: wanted.index((one.runtime, one.precision))):  # stable: the newest first
        there = not device.here or one.hardware == device.hardware
        if one.batch != batches[0] or not there or one.origin != "measured" or one.model is None:
            continue
        if one.family_sha256 != sha256:  # of other networks, or of an earlier version; counting takes seconds
            counted = counted or count(family.chains, family.input_shape)
            if not is_profile_of(one, counted):
                continue
        return PredictedCosts(profile=one)
    if device.here:
        return None
    spec = find_spec(device.name)
    if spec is None:
        raise AbsentDevice(
            f"There is no profile of {family.name} on {device.name} at batch {batches[0]} ({runtime}, {precision}), "
            "and no public figures of that device: import a profile."
        )
    found = predict_profiles(family, spec, runtime=runtime, precision=precision, batches=batches, store=store)
    if keep:
        store.add(found)
    return PredictedCosts(profile=found[0])

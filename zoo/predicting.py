"""What routes cost on a device, for a build: from a profile of it, or predicted by a roofline.

A device need not be here. What is stored of it answers: a measured profile if there is one, else a
roofline of public figures, which is stored too so that `pick` can answer from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from klas_zoo.anchors import Family
from klas_zoo.build import versions
from klas_zoo.errors import AbsentDevice, UnknownName
from klas_zoo.profiles.catalog import DeviceSpec, find_spec, unknown
from klas_zoo.profiles.devices import Device, elsewhere, resolve_device
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.roofline import calibration_of, corrected, roofline_model
from klas_zoo.profiles.shapes import Counted, architecture_sha256, count
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.route_costs import PredictedCosts


def target_device(name: str, store: ProfileStore) -> Device:
    """The device to build for: of this machine, or elsewhere where anything is known of it.

    Raises:
        UnknownName: nothing is.
        AbsentDevice: `cuda`, which names no device in particular, on a machine without one.
        KlasZooError: it is here, but what is installed cannot use it.
    """
    try:
        return resolve_device(name)
    except AbsentDevice:
        spec = find_spec(name)
        if spec is None:
            raise
        return elsewhere(spec.name, f"not here: {spec.vendor} {spec.name}")
    except UnknownName as error:
        held = store.devices()
        if name not in held:
            raise unknown(name, frozenset(held)) from error
        return elsewhere(name, f"not here: {held[name][0].hardware}")


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
                **{name: getattr(calibration, name) for name in ("compute", "memory", "kernel_us", "host_us", "factor")},
                "calibrated_on": calibration.based_on,
            },
            versions=versions(),
        )
        for batch in batches
    ]


def predicted_costs(
    family: Family, device: Device, *, batch: int, store: ProfileStore, runtime: str = "onnxruntime",
    precision: str = "fp32",
) -> PredictedCosts | None:  # fmt: skip
    """What routes cost on a device by the newest measured profile of it, or by a roofline where it is not here.

    None where a device of this machine has no profile: then multiply-adds have to do, or the anchors
    are timed.

    Raises:
        ProfileError: the device is not here and nothing can be said about it.
    """
    sha256 = architecture_sha256(family.chains, family.input_shape)
    for one in store.profiles(family.name, device.name):
        same = (one.runtime, one.precision, one.batch) == (runtime, precision, batch)
        alike = one.family_sha256 == sha256 and (not device.here or one.hardware == device.hardware)
        if same and alike and one.origin == "measured" and one.model is not None:
            return PredictedCosts(profile=one)
    if device.here:
        return None
    spec = find_spec(device.name)
    if spec is None:
        raise AbsentDevice(
            f"There is no profile of {family.name} on {device.name} at batch {batch} ({runtime}, {precision}), and no "
            "public figures of that device: import a profile."
        )
    (found,) = predict_profiles(family, spec, runtime=runtime, precision=precision, batches=(batch,), store=store)
    store.add([found])
    return PredictedCosts(profile=found)

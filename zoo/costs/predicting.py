"""What routes cost on a device, for a build: from a profile of it, or predicted by a roofline.

A device need not be here. What is stored of it answers: a measured profile if there is one, else a
roofline of public figures, which is stored too so that `pick` can answer from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from klas_zoo.costs.predicted import PredictedCosts
from klas_zoo.errors import AbsentDevice
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.catalog import DeviceSpec, find_spec
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.roofline import calibration_of, corrected, roofline_model
from klas_zoo.profiles.shapes import Counted, architecture_sha256, count
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.versions import versions


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
    precision: str = "fp32", keep: bool = True,
) -> PredictedCosts | None:  # fmt: skip
    """What routes cost on a device by the newest measured profile of it, or by a roofline where it is not here.

    None where a device of this machine has no profile: then multiply-adds have to do, or the anchors
    are timed.

    Args:
        batches: the first one is what routes are priced at.
        keep: store a roofline of each, so that `pick` can answer from it.

    Raises:
        AbsentDevice: the device is not here and nothing can be said about it.
        ProfileError: a stored profile cannot be read, or the device has no such precision.
    """
    sha256 = architecture_sha256(family.chains, family.input_shape)
    for one in store.profiles(family.name, device.name):
        same = (one.runtime, one.precision, one.batch) == (runtime, precision, batches[0])
        alike = one.family_sha256 == sha256 and (not device.here or one.hardware == device.hardware)
        if same and alike and one.origin == "measured" and one.model is not None:
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

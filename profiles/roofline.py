"""A roofline: what a network takes on a device that was not measured, from public figures of the device.

Every operator takes what takes longer, its arithmetic at a share of the peak or its bytes at a share
of the bandwidth, and no less than a kernel does; all of them together no less than the host needs to
start them (Williams, Waterman and Patterson 2009, with a floor for each kernel). The shares and floors
were fitted for each runtime to public tables of other devices (benchmarks/public_figures.py, which
also tells how far devices are off that were left out of the fit); profiles measured on other devices
of the user's then correct them: `corrected`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.catalog import BYTES_OF, DeviceSpec, find_spec
from klas_zoo.profiles.interpolation import summarise
from klas_zoo.profiles.profile import AnchorModel, LatencyModel, PredictionError, Profile
from klas_zoo.profiles.records import UNCHECKED
from klas_zoo.profiles.shapes import Counted, is_profile_of
from klas_zoo.profiles.traffic import Operation, PartTraffic

_FILE = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much of a device's peaks a runtime reaches.

    Attributes:
        compute, memory: shares of the peak and of the bandwidth.
        kernel_us: the least that an operator takes on the device, host_us on the host.
        factor: what measured profiles say on top of it.
        error: how far predictions were off that the fit had not seen.
        based_on: the runtime whose measurements these are.
        copy_gb_s: rate at which images in fp32 are copied to the device; None: they lie there already.
        devices: those that the error holds for; None: any, as each device was predicted from the others.
        smallest_batch: that the error holds for.
    """

    compute: float
    memory: float
    kernel_us: float
    host_us: float
    error: PredictionError
    based_on: str
    factor: float = 1.0
    copy_gb_s: float | None = None
    devices: tuple[str, ...] | None = None
    smallest_batch: int = 8


@cache
def calibrations() -> Mapping[str, Calibration]:
    """By runtime."""
    table = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        runtime: Calibration(
            **{
                **one,
                "error": PredictionError(**one["error"]),
                "devices": None if one["devices"] is None else tuple(one["devices"]),
            }
        )
        for runtime, one in table["runtimes"].items()
    }


def calibration_of(runtime: str) -> Calibration:
    """A runtime's calibration.

    Raises:
        ProfileError: there is none.
    """
    found = calibrations().get(runtime)
    if found is None:
        raise ProfileError(f"There is no roofline of {runtime}, only of {', '.join(calibrations())}.")
    return found


def error_of(calibration: Calibration, spec: DeviceSpec, batch: int) -> PredictionError:
    """How far predictions are off, or that this was never checked on such a device or at such a batch size."""
    known = calibration.devices is None or spec.name in calibration.devices
    if known and batch >= calibration.smallest_batch:
        return calibration.error
    on = f"on {' and '.join(calibration.devices)}" if calibration.devices else "on other devices"
    method = f"{UNCHECKED}: the roofline of this runtime was checked {on}, batch {calibration.smallest_batch} or more"
    return PredictionError(checked=0, median_percent=0.0, p90_percent=0.0, largest_percent=0.0, method=method)


def operations_ms(
    operations: Sequence[Operation], spec: DeviceSpec, calibration: Calibration, *, precision: str, batch: int
) -> tuple[float, float]:
    """Milliseconds of operators on the device, and on the host that starts them.

    Raises:
        ProfileError: the device has no such precision, or its speed is unknown.
    """
    peak, bandwidth = spec.peak(precision), spec.bandwidth_gb_s
    if bandwidth is None:
        raise ProfileError(f"There are no public figures of {spec.name}: measure a profile, it takes minutes.")
    if peak is None:
        raise ProfileError(f"{spec.name} has no {precision}: it has {', '.join(spec.peak_tflops)}.")
    rows = np.array([(one.macs, one.activations, one.weights) for one in operations], float).reshape(-1, 3)
    arithmetic = 2 * batch * rows[:, 0] / (peak * 1e12 * calibration.compute)
    transport = BYTES_OF[precision] * (batch * rows[:, 1] + rows[:, 2]) / (bandwidth * 1e9 * calibration.memory)
    device_s = np.maximum(np.maximum(arithmetic, transport), calibration.kernel_us * 1e-6).sum()
    return 1e3 * float(device_s), 1e-3 * calibration.host_us * len(operations)


def roofline_model(
    counted: Counted, spec: DeviceSpec, calibration: Calibration, *, precision: str, batch: int
) -> LatencyModel:
    """Latency of every route of a family on a device.

    Raises:
        ProfileError: see `operations_ms`.
    """

    def part_ms(part: PartTraffic) -> float:
        # part by part the larger of the two: a route is bound by its host where its parts are
        both = operations_ms(part.operations, spec, calibration, precision=precision, batch=batch)
        return calibration.factor * max(both)

    copies_ms = 0.0
    if calibration.copy_gb_s is not None:
        copies_ms = calibration.factor * 1e-6 * 4 * batch * math.prod(counted.input_shape) / calibration.copy_gb_s
    anchors = {}
    for name, cost in counted.costs.items():
        times = [part_ms(part) for part in counted.traffic[name].parts]
        times[0] += copies_ms
        anchors[name] = AnchorModel(
            stem_ms=times[0],
            block_ms=tuple(times[1:-1]),
            head_ms=times[-1],
            stem_macs=cost.stem_macs,
            block_macs=cost.block_macs,
            head_macs=cost.head_macs,
            vectors=counted.vectors[name],
            widths=counted.widths[name],
        )
    floor_ms = 1e-3 * calibration.factor * max(calibration.kernel_us, calibration.host_us)
    rates = {name: 1e9 * sum(one.block_ms) / max(sum(one.block_macs), 1) for name, one in anchors.items()}
    error = error_of(calibration, spec, batch)
    return LatencyModel(anchors=anchors, seam_ms=floor_ms, seam_ms_per_gmac=rates, error=error)


def corrected(
    calibration: Calibration, counted: Counted, spec: DeviceSpec, profiles: Sequence[Profile]
) -> Calibration:
    """A calibration with what profiles of the same networks, measured on other devices, say about it.

    The factor is the median over devices of measured over predicted. Where there are two devices or
    more, the error is what each one is off by the others' factor; the calibration's own is kept otherwise.

    Args:
        profiles: measured ones; those of this device or of devices the catalog does not know are passed over.
    """
    ratios: dict[str, list[float]] = {}
    for one in profiles:
        other = find_spec(one.device)
        if other is None or other.bandwidth_gb_s is None or other.name == spec.name or not one.networks:
            continue
        if not is_profile_of(one, counted) or other.peak(one.precision) is None:
            continue
        model = roofline_model(counted, other, calibration, precision=one.precision, batch=one.batch)
        ratios.setdefault(other.name, []).extend(
            seen.latency.p50_ms / model.predict_ms(seen.route) for seen in one.networks if model.covers(seen.route)
        )
    if not ratios:
        return calibration
    medians = {name: float(np.median(found)) for name, found in ratios.items()}
    factor = calibration.factor * float(np.median(list(medians.values())))
    error = calibration.error
    if len(medians) > 1:
        errors = [
            100 * (float(np.median([m for other, m in medians.items() if other != name])) / ratio - 1)
            for name, found in ratios.items()
            for ratio in found
        ]
        error = summarise(errors, f"each of {', '.join(sorted(medians))} predicted from profiles of the others")
        calibration = replace(calibration, devices=None, smallest_batch=1)
    return replace(calibration, factor=factor, error=error)

"""Which device a build is for: one of this machine, or one elsewhere. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import replace

from klas_zoo.errors import AbsentDevice, UnknownName
from klas_zoo.gpus import visible_gpus, why_no_gpu
from klas_zoo.profiles.catalog import find_spec, unknown
from klas_zoo.profiles.devices import Device, elsewhere, resolve_device
from klas_zoo.profiles.store import ProfileStore


def target_device(name: str, store: ProfileStore, compute: str | None = None) -> Device:
    """The device to build for: of this machine, or elsewhere where anything is known of it.

    Args:
        compute: where torch computes, `cpu` or `cuda`. Default: on the device itself, and for one that is elsewhere
            on the GPU that is here, if there is one.

    Raises:
        UnknownName: nothing is.
        AbsentDevice: `cuda`, which names no device in particular, on a machine without one, also as `compute`.
    """
    found = _target(name, store)
    if compute is None or compute == found.torch_device:
        return found
    if compute == "cuda" and not visible_gpus():
        raise AbsentDevice(f"--compute cuda: this machine has no CUDA device ({why_no_gpu()}).")
    return replace(found, torch_device=compute)


def _target(name: str, store: ProfileStore) -> Device:
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

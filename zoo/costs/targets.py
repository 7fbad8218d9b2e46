"""Which device a build is for: one of this machine, or one elsewhere. Imports nothing heavy."""

from __future__ import annotations

from klas_zoo.errors import AbsentDevice, UnknownName
from klas_zoo.profiles.catalog import find_spec, unknown
from klas_zoo.profiles.devices import Device, elsewhere, resolve_device
from klas_zoo.profiles.store import ProfileStore


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

"""Profiles that travel: from one machine's store into a file, and from a file into another's, once checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from klas_zoo.errors import ProfileError, UnknownName
from klas_zoo.families.specs import FamilySpec, builtin_families, find_family
from klas_zoo.files import replacing
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.catalog import find_spec, spec_of_cuda_device
from klas_zoo.profiles.devices import device_name
from klas_zoo.profiles.files import from_text, to_text
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.store import ProfileStore, is_in_the_future

if TYPE_CHECKING:
    from klas_zoo.profiles.shapes import Counted

_MOST_BYTES = 64 * 10**6


def export_file(
    root: Path, file: Path, *, family: str | None = None, device: str | None = None, name: str | None = None,
    every: bool = False,
) -> list[Profile]:  # fmt: skip
    """Writes a registry's measured profiles into one file; gives them.

    Args:
        name: what the device is called in the file.
        every: older measurements and predictions too.

    Raises:
        ProfileError: there are none, or several devices would get one name.
    """
    held = ProfileStore.of(root).profiles(family, device_name(device) if device else None)
    found = held if every else _newest([one for one in held if one.origin == "measured" and not one.failure])
    if not found:
        which = f"{'' if every else 'measured '}profiles{f' of {family}' if family else ''}"
        where = f" on {device}" if device else ""
        raise ProfileError(f"There are no {which}{where} in {root}: run klas-zoo profile first.")
    if name is not None:
        devices = sorted({one.device for one in found})
        if len(devices) > 1:
            raise ProfileError(f"Profiles of {', '.join(devices)} cannot all be called {name}: pass --device.")
        found = [replace(one, device=name) for one in found]
    with replacing(file) as temporary:
        temporary.write_text(to_text(found), encoding="utf-8")
    return found


def import_file(
    root: Path, file: Path, *, family: str | None = None, name: str | None = None
) -> list[tuple[Profile, Path]]:
    """Takes a file's profiles into a registry's store, all of them or none; gives them and where they lie.

    Args:
        family: the TOML file of a family that is not built in.
        name: what the device is called here.

    Raises:
        ProfileError: the file cannot be read, or a profile in it cannot be believed: see
            `profiles.files.from_text`; or it is of another device than it says, or of other networks.
    """
    found = [replace(one, device=name or one.device) for one in _read(file)]
    for one in found:
        _check_device(one, file)
    specs = {one.family: _spec(one.family, family, file) for one in found}
    counted = {family: _counted(spec) for family, spec in specs.items()}
    _check_families(found, counted, file)
    # profiles of earlier versions have another hash of the same networks
    found = [replace(one, family_sha256=counted[one.family].sha256) for one in found]
    return list(zip(found, ProfileStore.of(root).add(found), strict=True))


def _newest(profiles: list[Profile]) -> list[Profile]:
    """The first of each kind; profiles come newest first."""
    kinds: dict[tuple[object, ...], Profile] = {}
    for one in profiles:
        kinds.setdefault((one.family, one.device, one.runtime, one.precision, one.batch, one.threads), one)
    return list(kinds.values())


def _read(file: Path) -> list[Profile]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ProfileError(f"{file} is no profile: it is larger than {_MOST_BYTES // 10**6} MB.")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(f"{file} is no profile: it is no text.") from error
    except OSError as error:
        raise ProfileError(f"{file} cannot be read: {error.strerror}.") from error
    return from_text(text, str(file))


def _check_device(profile: Profile, file: Path) -> None:
    """A name stands for one kind of hardware, here as there."""
    if is_in_the_future(profile.measured_at):
        raise ProfileError(
            f"{file}: the profile was measured at {profile.measured_at}, which is in the future: set the clock of the "
            "machine that measured it, or of this one."
        )
    spec = find_spec(profile.device)
    if profile.device == "cpu" and profile.hardware != describe_cpu():
        raise ProfileError(
            f"{file}: cpu is this machine's ({describe_cpu()}), and the profile is of {profile.hardware}: give it a "
            "name of its own with --as NAME."
        )
    if spec is None or profile.kind == "cpu" == spec.kind:
        return
    if profile.kind != spec.kind:
        raise ProfileError(f"{file}: {spec.name} is a {spec.kind}, and the profile is of a {profile.kind}.")
    if profile.compute_capability != spec.compute_capability:
        raise ProfileError(
            f"{file}: {spec.name} has compute capability {spec.compute_capability}, and the profile is of a device "
            f"with {profile.compute_capability}: it is called wrongly, or give it another name with --as NAME."
        )
    measured_on = spec_of_cuda_device(profile.hardware.partition(",")[0])
    if profile.origin == "measured" and measured_on is not None and measured_on.name != spec.name:
        raise ProfileError(
            f"{file}: the device is called {spec.name}, and the profile was measured on {measured_on.name}."
        )


def _spec(family: str, path: str | None, file: Path) -> FamilySpec:
    known = builtin_families()
    if path is not None:
        spec = find_family(path)
        if spec.name == family:
            return spec
    if family not in known:
        hint = f"{file} is of it; a family of your own is said by --family FILE.toml."
        raise UnknownName("family", family, known, hint)
    return known[family]


def _counted(spec: FamilySpec) -> Counted:
    from klas_zoo.families.anchors import load_family
    from klas_zoo.profiles.shapes import count

    loaded = load_family(spec, random_weights=True)
    return count(loaded.chains, loaded.input_shape)


def _check_families(profiles: Sequence[Profile], counted: Mapping[str, Counted], file: Path) -> None:
    """All profiles of one hash are of the same networks, also one that only says that a batch did not fit."""
    from klas_zoo.profiles.shapes import is_profile_of

    here = {(one.family, one.family_sha256) for one in profiles if is_profile_of(one, counted[one.family])}
    for one in profiles:
        if (one.family, one.family_sha256) not in here:
            raise ProfileError(
                f"{file}: the profile is of other networks that are called {one.family} too: their architecture's "
                f"SHA-256 is {one.family_sha256[:12]}…, that of the family here {counted[one.family].sha256[:12]}…."
            )

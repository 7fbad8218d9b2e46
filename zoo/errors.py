"""Every error klas-zoo raises on purpose.

    KlasZooError                exit 1: it cannot be done
    ├── UsageError              exit 2: what was asked makes no sense
    │   ├── UnknownName         a family, device, route … nobody knows; names the nearest
    │   └── BadQuantity         a latency or size that does not parse; names the forms
    ├── FamilyError             a family file or its anchors do not fit together
    │   └── WeightsError        a checkpoint is missing, truncated or of another model
    ├── DataError               images or labels that cannot be used
    ├── CountingError           a network uses an operator whose multiply-adds nobody can count
    ├── SelectionError          no stitch can be chosen (no seam, probes gone wrong …)
    ├── ExportError             a route could not be turned into an engine
    │   ├── VerificationError   an engine is not the same function as its route
    │   └── CannotRunHere       an engine was built for something this machine has not got
    ├── PackageError            a package cannot be read or written
    │   ├── NewerPackage        it was made by a newer klas-zoo
    │   └── DamagedPackage      a file of it is missing, altered, or reaches outside
    ├── AbsentDevice            this machine does not have the device
    ├── ProfileError            a profile that cannot be read, measured or believed
    ├── RegistryError           the registry cannot be read or written
    │   ├── NewerRegistry       it was made by a newer klas-zoo
    │   └── DamagedRegistry     a file does not hold what the registry says
    ├── RemoteError             a place that packages are pushed to or pulled from cannot be used
    ├── NothingFits             no engine is within every limit of a pick
    └── Interrupted             SIGTERM or Ctrl-C; exit 128 + the signal's number

A message is one sentence (or two): what was asked, what was found, what to do next. The
command line prints it without a traceback; anything else that is raised is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class KlasZooError(Exception):
    """Root of all errors raised on purpose; `exit_code` is the command line's answer."""

    exit_code = 1


class UsageError(KlasZooError):
    """The request itself makes no sense."""

    exit_code = 2


class UnknownName(UsageError):
    """A name nobody knows.

    Args:
        kind: what was named, such as "family".
        name: what the user wrote.
        known: every name that would have been right.
        hint: what else could be done, a sentence.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if nearest:
            advice = f"did you mean {' or '.join(nearest)}?"
        elif known:
            advice = f"known: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}."
        else:
            advice = "none is known yet."
        super().__init__(f"Unknown {kind} '{name}': {advice}{' ' + hint if hint else ''}")
        self.kind, self.name, self.nearest = kind, name, nearest


class BadQuantity(UsageError):
    """A latency or size on the command line that does not parse."""


class FamilyError(KlasZooError):
    """A family file or its anchors do not fit together."""


class WeightsError(FamilyError):
    """A checkpoint is missing, truncated or belongs to another model."""


class DataError(KlasZooError):
    """Images or labels that cannot be used."""


class CountingError(KlasZooError):
    """A network uses an operator whose multiply-adds nobody can count."""


class SelectionError(KlasZooError):
    """No stitch can be chosen."""


class ExportError(KlasZooError):
    """A route could not be turned into an engine."""


class VerificationError(ExportError):
    """An engine does not compute what its route computes."""


class CannotRunHere(ExportError):
    """An engine was built for something this machine has not got: built, not run."""


class PackageError(KlasZooError):
    """A package cannot be read or written."""


class NewerPackage(PackageError):
    """The package was made by a newer klas-zoo."""


class DamagedPackage(PackageError):
    """A file of a package is missing, altered, or reaches outside of it; the message names the file."""


class AbsentDevice(KlasZooError):
    """This machine does not have the device."""


class ProfileError(KlasZooError):
    """A profile that cannot be read, measured or believed."""


class RegistryError(KlasZooError):
    """The registry cannot be read or written."""


class NewerRegistry(RegistryError):
    """The registry was made by a newer klas-zoo."""


class DamagedRegistry(RegistryError):
    """A file of the registry does not hold what the registry says."""


class RemoteError(KlasZooError):
    """A place that packages are pushed to or pulled from cannot be used, or does not hold what was pushed."""


class NothingFits(KlasZooError):
    """No engine is within every limit of a pick; the message names the nearest one."""


class Interrupted(KlasZooError):
    """A signal asked the process to stop, and it did.

    Args:
        received: the signal.
        where: how far the work had come, the end of a sentence.
    """

    def __init__(self, received: signal.Signals, where: str = "") -> None:
        super().__init__(
            f"Stopped by {received.name}{f' {where}' if where else ''}. What was done is kept: run the same command "
            "again (without --redo) to go on from there."
        )
        self.exit_code = 128 + received

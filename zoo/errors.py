"""Every error klas-zoo raises on purpose.

    KlasZooError                exit 1: it cannot be done
    ├── UsageError              exit 2: what was asked makes no sense
    │   ├── UnknownName         an unknown family, device, route …; names the nearest
    │   └── BadQuantity         a latency or size that does not parse; names the forms
    ├── FamilyError             a family file or its anchors do not fit together
    │   └── WeightsError        a checkpoint is missing, truncated or of another model
    ├── DataError               images or labels that cannot be used
    ├── CountingError           a network uses an operator that multiply-adds cannot be counted for
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
    ├── TimeLimitExceeded       a call took longer than it was given
    ├── ProcessDied             the process of a call was ended by the system
    ├── Overloaded              a server has more requests than it can answer in time
    ├── NothingFits             no engine is within every limit of a pick
    ├── MissingPackage          a part of klas-zoo is not installed; names the command that brings it
    └── Interrupted             SIGTERM or Ctrl-C; exit 128 + the signal's number

A message is one sentence (or two): what was asked, what was found, what to do next. The
command line prints it without a traceback; anything else that is raised is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from typing import Any

_LONGEST_NAME = 200  # characters of an unknown name that are compared and repeated


class KlasZooError(Exception):
    """Root of all errors raised on purpose; `exit_code` is the command line's answer.

    All of them survive pickling, so that process pools can hand them on.
    """

    exit_code = 1


class UsageError(KlasZooError):
    """The request itself makes no sense."""

    exit_code = 2


class UnknownName(UsageError):
    """An unknown name.

    Args:
        kind: what was named, such as "family".
        name: what the user wrote.
        known: every name that would have been right.
        hint: what else could be done, a sentence.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        if len(name) > _LONGEST_NAME:  # names come from requests too; comparing takes time in their length
            name = f"{name[:_LONGEST_NAME]}…"
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if nearest:
            advice = f"did you mean {' or '.join(nearest)}?"
        elif known:
            advice = f"known: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}."
        else:
            advice = "none is known yet."
        super().__init__(f"Unknown {kind} '{name}': {advice}{' ' + hint if hint else ''}")
        self.kind, self.name, self.nearest = kind, name, nearest
        self._arguments = kind, name, known, hint

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class BadQuantity(UsageError):
    """A latency or size on the command line that does not parse."""


class FamilyError(KlasZooError):
    """A family file or its anchors do not fit together."""


class WeightsError(FamilyError):
    """A checkpoint is missing, truncated or belongs to another model."""


class DataError(KlasZooError):
    """Images or labels that cannot be used."""


class CountingError(KlasZooError):
    """A network uses an operator that multiply-adds cannot be counted for."""


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


class TimeLimitExceeded(KlasZooError):
    """A call took longer than it was given, and was stopped."""


class ProcessDied(KlasZooError):
    """The process of a call was ended by the system, for example because memory ran out."""


class Overloaded(KlasZooError):
    """A server has more requests than it can answer in time; the same request may be answered later."""


class NothingFits(KlasZooError):
    """No engine is within every limit of a pick; the message names the nearest one."""


class MissingPackage(KlasZooError):
    """An optional part of klas-zoo is not installed.

    Args:
        what: that needs it, the subject of the sentence.
        package: that was not found.
        extra: that brings it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'klas-zoo[{extra}]' brings it.")
        self.package, self.extra = package, extra
        self._arguments = what, package, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


class Interrupted(KlasZooError):
    """A signal asked the process to stop, and it did.

    Args:
        received: the signal.
        where: how far the work had come, the end of a sentence.
    """

    def __init__(self, received: signal.Signals, where: str = "") -> None:
        super().__init__(
            f"Stopped by {received.name}{f' {where}' if where else ''}. What was done is cached: run the same command "
            "again (without --redo) to resume."
        )
        self.exit_code = 128 + received
        self._arguments = received, where

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for another message; libraries add pages of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

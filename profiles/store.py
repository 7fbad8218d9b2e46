"""The profiles of a registry: JSON files in a folder of their own.

    <registry>/profiles/<family>/<device>/<runtime>-<precision>-batch<n>/<time>-<sha256>.json   measured
                                                                     .../predicted-<networks>.json

Two measurements of the same thing are two files: the newer one is used, both are kept. Of predictions only
the last one of the same networks is kept: it can be computed again. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from klas_zoo.errors import ProfileError
from klas_zoo.files import replacing
from klas_zoo.profiles.files import from_text, to_text
from klas_zoo.profiles.profile import Profile

_PREDICTED = "predicted-"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


def check_name(name: str) -> None:
    """
    Raises:
        ProfileError: of a device or family, which cannot name a folder.
    """
    if not _SAFE.fullmatch(name):
        raise ProfileError(f"'{name}' cannot name a folder: letters, digits, '.', '-' and '_' can.")


@dataclass(frozen=True)
class ProfileStore:
    """Profiles beside a registry, or anywhere else; the folder need not be there."""

    root: Path

    @classmethod
    def of(cls, registry_root: Path) -> ProfileStore:
        return cls(registry_root / "profiles")

    def add(self, profiles: Iterable[Profile]) -> list[Path]:
        """Writes each profile into a file of its own; a prediction replaces those before it.

        Raises:
            ProfileError: a name that cannot be part of a path, or the folder cannot be written.
        """
        texts = [(self._path(one, text), text) for one, text in ((p, to_text([p])) for p in profiles)]
        try:
            for path, text in texts:
                if not path.is_file() or path.name.startswith(_PREDICTED):
                    self._forget_predictions(path)
                    with replacing(path) as file:
                        file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ProfileError(f"Cannot write {error.filename or self.root}: {error.strerror}.") from error
        return [path for path, _ in texts]

    def profiles(self, family: str | None = None, device: str | None = None) -> list[Profile]:
        """Every profile, or those of a family or a device; the newest first.

        Raises:
            ProfileError: a file in the folder cannot be read or is no profile.
        """
        found = [(one, path.name) for path in self.paths(family, device) for one in self.read(path)]
        # not as text: times may come from other zones
        found.sort(key=lambda pair: (*_age(pair[0].measured_at), pair[1]), reverse=True)
        return [one for one, _ in found]

    def paths(self, family: str | None = None, device: str | None = None) -> list[Path]:
        """The files themselves."""
        if any(name is not None and not _SAFE.fullmatch(name) for name in (family, device)):
            return []
        return sorted(self.root.glob(f"{family or '*'}/{device or '*'}/*/*.json"))

    def devices(self) -> dict[str, list[Profile]]:
        """Profiles by the device they are of, the newest first."""
        found: dict[str, list[Profile]] = {}
        for one in self.profiles():
            found.setdefault(one.device, []).append(one)
        return found

    def _path(self, profile: Profile, text: str) -> Path:
        for name in (profile.family, profile.device, profile.runtime):
            check_name(name)
        kind = f"{profile.runtime}-{profile.precision}-batch{profile.batch}"
        folder = self.root / profile.family / profile.device / kind
        if profile.origin != "measured":
            return folder / f"{_PREDICTED}{profile.family_sha256[:12]}.json"
        when = re.sub(r"[^0-9]", "", profile.measured_at)[:14]
        import hashlib  # not at the top: it brings OpenSSL, and picking does not hash

        sha256 = hashlib.sha256(text.encode()).hexdigest()[:12]
        return folder / f"{when}-{sha256}.json"

    def _forget_predictions(self, path: Path) -> None:
        """Earlier versions of klas-zoo left a file for every prediction, each of which every pick would read."""
        if path.name.startswith(_PREDICTED):
            for other in path.parent.glob("[0-9]*.json"):
                found = self.read(other)
                if all(one.origin != "measured" and self._path(one, "") == path for one in found):
                    other.unlink(missing_ok=True)

    @staticmethod
    def read(path: Path) -> list[Profile]:
        """The profiles in one file.

        Raises:
            ProfileError: it cannot be read or is no profile.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ProfileError(f"The profile {path} cannot be read: {why}.") from error
        return from_text(text, str(path))


def is_in_the_future(measured_at: str) -> bool:
    """Whether a time is more than a day ahead of this machine's clock, which no zone or small error explains."""
    return datetime.fromisoformat(measured_at) > datetime.now(UTC) + timedelta(days=1)


def _age(measured_at: str) -> tuple[bool, datetime]:
    """Grows with how new a time is; one in the future, of a wrong clock, is older than all others."""
    return not is_in_the_future(measured_at), datetime.fromisoformat(measured_at)

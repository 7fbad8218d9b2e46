"""The profiles of a registry: JSON files in a folder of their own, nothing is ever overwritten.

    <registry>/profiles/<family>/<device>/<runtime>-<precision>-batch<n>/<time>-<sha256>.json

Two measurements of the same thing are two files: the newer one is used, both are kept. Imports
nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.errors import ProfileError
from klas_zoo.files import replacing
from klas_zoo.profiles.files import from_text, to_text
from klas_zoo.profiles.profile import Profile

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")


@dataclass(frozen=True)
class ProfileStore:
    """Profiles beside a registry, or anywhere else; the folder need not be there."""

    root: Path

    @classmethod
    def of(cls, registry_root: Path) -> ProfileStore:
        return cls(registry_root / "profiles")

    def add(self, profiles: Iterable[Profile]) -> list[Path]:
        """Writes each profile into a file of its own; one that is there already stays one.

        Raises:
            ProfileError: a name that cannot be part of a path, or the folder cannot be written.
        """
        texts = [(self._path(one, text), text) for one, text in ((p, to_text([p])) for p in profiles)]
        try:
            for path, text in texts:
                if not path.is_file():
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
        found = [(one, path.name) for path in self.paths(family, device) for one in self._read(path)]
        found.sort(key=lambda pair: (pair[0].measured_at, pair[1]), reverse=True)
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
            if not _SAFE.fullmatch(name):
                raise ProfileError(f"'{name}' cannot name a folder: letters, digits, '.', '-' and '_' can.")
        kind = f"{profile.runtime}-{profile.precision}-batch{profile.batch}"
        when = re.sub(r"[^0-9]", "", profile.measured_at)[:14]
        import hashlib  # not at the top: it brings OpenSSL, and picking does not hash

        sha256 = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self.root / profile.family / profile.device / kind / f"{when}-{sha256}.json"

    @staticmethod
    def _read(path: Path) -> list[Profile]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ProfileError(f"The profile {path} cannot be read: {why}.") from error
        return from_text(text, str(path))

"""The registry: verified engines with their accuracy and latency, safe against a death at any moment.

    <root>/registry.sqlite      builds, engines, latencies and tags
    <root>/packages/<digest>/   each package under the SHA-256 of its manifest: engines, weights, references
    <root>/build.lock           held by the build that is timing engines
    <root>/store.lock           held while files are added or removed: one process at a time

Files come first and one transaction refers to them last. A build that dies before its commit leaves at
most files that nothing refers to, and the build before it stays current. Paths in the database are relative,
so a registry can be moved as a folder. Reading takes no lock. Registries of earlier versions also hold
`engines/` and `supernets/`, which stay readable until `klas-zoo registry gc` finds them unused.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.addresses import local_path
from klas_zoo.errors import DamagedRegistry, RegistryError, VerificationError
from klas_zoo.exporters.records import explain
from klas_zoo.files import locked, sha256_of, share_like
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry import database, rows
from klas_zoo.registry.packages import MANIFEST, add_package, check_package, package_folder, size_of
from klas_zoo.registry.records import BuildRecord, EngineRecord, NewEngine, PackageRecord
from klas_zoo.registry.tags import builds_of, machine_of

__all__ = ["BuildRecord", "EngineRecord", "NewEngine", "Registry", "check_file", "default_root"]


def default_root() -> Path:
    """The folder `KLAS_ZOO_REGISTRY` names, else the user's data folder of this platform."""
    named = os.environ.get("KLAS_ZOO_REGISTRY")
    if named:
        return local_path(named, "KLAS_ZOO_REGISTRY").absolute()
    import platformdirs

    return platformdirs.user_data_path("klas-zoo", appauthor=False)


def check_file(engine: EngineRecord, *, content: bool) -> None:
    """Compares an engine's file with its record: its size, and with `content` its SHA-256.

    With `content` also the files of its package that it may read: all but the other engines, which have the same
    suffix.

    Raises:
        DamagedRegistry: a file is missing, cannot be read, or is not what was registered.
    """
    try:
        same = engine.path.stat().st_size == engine.file_bytes
        found = "is not the file that was registered"
        same = same and (not content or sha256_of(engine.path) == engine.sha256)
    except OSError as error:
        same, found = False, f"cannot be read ({error.strerror})"
    if not same:
        raise DamagedRegistry(
            f"The file of engine {engine.route} of {engine.family} {found}: {engine.path}. "
            f"Run klas-zoo build or install again."
        )
    if content and engine.package:
        check_package(
            engine.path.parent, engine.package, content=lambda name: not name.endswith(engine.path.suffix or "\0")
        )


@dataclass(frozen=True)
class Registry:
    """A folder of engines. It holds no connection: every method opens its own, in any thread or process."""

    root: Path

    @classmethod
    def open(cls, root: Path | str | None = None, *, create: bool) -> Registry:
        """The registry at `root`, by default at `default_root()`; with `create`, made when there is none.

        Raises:
            NewerRegistry: a newer klas-zoo made it; nothing in it was touched.
            DamagedRegistry: what stands there is no registry.
            RegistryError: there is none and `create` is false, or it cannot be read or made.
        """
        registry = cls(local_path(root, "a registry").absolute() if root is not None else default_root())
        with database.in_one_sentence(registry.root, "opened"):
            if not database.is_there(registry.database_path):
                if not create:
                    raise RegistryError(f"No registry at {registry.root}: run klas-zoo build, add or install first.")
                registry.root.mkdir(parents=True, exist_ok=True)
                with registry.changing_files():
                    if not database.is_there(registry.database_path):  # else another process was faster
                        _refuse_lost_database(registry)
                        database.create(registry.database_path)
            if create:  # reading finds out when it connects
                database.connect(registry.database_path).close()
        return registry

    @contextmanager
    def writing(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds the lock of builds over all processes; calls `on_wait` once if another one has it.

        The system frees the lock when the process dies. One process cannot take it twice.

        Raises:
            RegistryError: the registry's folder cannot be written.
        """
        with self._holding("build.lock", on_wait):
            yield

    @contextmanager
    def changing_files(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds the lock for adding or removing files, as `writing` does; for as long as that takes.

        Raises:
            RegistryError: the registry's folder cannot be written.
        """
        with self._holding("store.lock", on_wait):
            yield

    def register(self, build: BuildRecord, engines: Sequence[NewEngine], *, link: bool = False) -> int:
        """Makes `engines` the current ones of the build's family, device and machine; returns the build's id.

        Every engine's file is part of a package, which is stored as a whole. All or nothing: whatever happens
        before the end, the current build stays current. Of two processes that register at once one waits;
        both builds are kept, and the later one is current. Latencies of these engines that are in profiles
        beside the registry are stored too.

        Args:
            link: link the packages' files instead of copying them where the file system can: for folders that are
                not changed later.

        Raises:
            VerificationError: an engine did not pass; nothing was written.
            RegistryError: the disk is full, the folder cannot be written, an engine's file cannot be read.
            ValueError: there is no engine, or one that does not belong to the build or to a package.
        """
        _check(build, engines)
        with self.changing_files(), database.in_one_sentence(self.root, "written"):
            stored = self._store({engine.file.parent for engine in engines}, link)
            try:
                files = [self._file(engine, stored[engine.file.parent][0]) for engine in engines]
                with self.changing() as connection:
                    for number in _current(connection, build.family, build.device, build.hardware):
                        connection.execute("UPDATE builds SET current = 0 WHERE id = ?", (number,))
                    build_id = rows.insert_build(connection, build)
                    self._insert_packages(connection, build_id, engines, stored)
                    for engine, file in zip(engines, files, strict=True):
                        rows.insert_engine(connection, build_id, engine, file)
                    self._apply_profiles(connection, build.family, build.device)
            except BaseException:
                self._discard(stored)
                raise
        return build_id

    def engines(self, family: str | None = None, device: str | None = None) -> list[EngineRecord]:
        """The engines of every current build, or of one family or device; the fewest MACs first.

        Args:
            family: its name, or a tag such as `deit@prod`: then of the builds the tag points to.

        Raises:
            UnknownName: there is no such tag.
            DamagedRegistry: an entry cannot be understood.
            RegistryError: the registry cannot be read.
        """
        with self.reading() as connection:
            chosen, names = builds_of(connection, family, device)
            return self.read_engines(connection, chosen, names)

    def read_engines(
        self, connection: sqlite3.Connection, condition: str, parameters: Mapping[str, object]
    ) -> list[EngineRecord]:
        """The engines for which an SQL condition on `builds` and `engines` holds; the fewest MACs first."""
        # CROSS JOIN keeps the order: few builds are chosen of many, and all else follows from them
        engines = "FROM builds CROSS JOIN engines ON engines.build_id = builds.id"
        latencies: dict[int, list[LatencyRecord]] = {}
        for row in connection.execute(
            f"SELECT latencies.*, conditions.* {engines} CROSS JOIN {rows.LATENCIES}"
            f" WHERE latencies.engine_id = engines.id AND {condition} ORDER BY {rows.IN_ORDER}",
            parameters,
        ):
            latencies.setdefault(row["engine_id"], []).append(rows.read_latency(row))
        found = connection.execute(
            f"SELECT engines.*, finished_at, {', '.join(rows.OF_A_BUILD)} {engines}"
            f" WHERE {condition} ORDER BY engines.macs, engines.id",
            parameters,
        )
        return [rows.read_engine(row, tuple(latencies.get(row["id"], ())), self.root) for row in found]

    def packages(self, build_id: int) -> list[PackageRecord]:
        """The packages of a build.

        Raises:
            RegistryError: the registry cannot be read.
        """
        with self.reading() as connection:
            found = connection.execute("SELECT * FROM packages WHERE build_id = ? ORDER BY id", (build_id,)).fetchall()
        return [
            PackageRecord(
                digest=row["digest"], format=row["format"], precision=row["precision"],
                size_bytes=row["size_bytes"], path=package_folder(self.root, row["digest"]),
            )
            for row in found
        ]  # fmt: skip

    def current_build(self, family: str, device: str, hardware: str) -> int | None:
        """The number of the current build of a family for a device on a machine; None where there is none.

        Raises:
            RegistryError: the registry cannot be read.
        """
        with self.reading() as connection:
            return max(_current(connection, family, device, hardware), default=None)

    def build(self, build_id: int) -> BuildRecord:
        """A build, current or not, as it was registered.

        Raises:
            RegistryError: there is no such build, or the registry cannot be read.
        """
        with self.reading() as connection:
            row = connection.execute("SELECT * FROM builds WHERE id = ?", (build_id,)).fetchone()
            if row is None:
                raise RegistryError(f"The registry {self.root} has no build {build_id}.")
            return rows.read_build(row)

    @property
    def database_path(self) -> Path:
        return self.root / "registry.sqlite"

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one moment and changes nothing.

        Raises:
            DamagedRegistry: what is read cannot be understood.
            RegistryError: the registry cannot be read.
        """
        try:
            with (
                database.in_one_sentence(self.root, "read"),
                database.reading(self.database_path, self._on_upgrade) as connection,
            ):
                yield connection
        except rows.UnreadableRow as error:
            raise DamagedRegistry(
                f"An entry of the registry {self.root} cannot be understood ({error}): "
                f"move it away and run klas-zoo build again."
            ) from error

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are all kept at the end, or none of them.

        Raises:
            RegistryError: the registry cannot be written.
        """
        try:
            with (
                database.in_one_sentence(self.root, "written"),
                database.transaction(self.database_path, self._on_upgrade) as connection,
            ):
                yield connection
        except rows.UnreadableRow as error:
            raise DamagedRegistry(
                f"An entry of the registry {self.root} cannot be understood ({error}); nothing was changed."
            ) from error

    def _on_upgrade(self, connection: sqlite3.Connection) -> None:
        """Registries of earlier versions looked into profiles with every pick; now latencies are in the database."""
        self._apply_profiles(connection)

    def _apply_profiles(
        self, connection: sqlite3.Connection, family: str | None = None, device: str | None = None
    ) -> None:
        """A profile that cannot be read is skipped: it must not stop a build from being registered."""
        if (self.root / "profiles").is_dir():
            from klas_zoo.registry.latencies import apply_to

            apply_to(connection, self.root, family, device)

    @contextmanager
    def _holding(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        path = self.root / name
        with database.in_one_sentence(self.root, "locked"):
            path.open("ab").close()
            if database.is_there(self.database_path):
                share_like(path, self.database_path)
        with ExitStack() as held:
            with database.in_one_sentence(self.root, "locked"):
                held.enter_context(locked(path, on_wait=on_wait))
            yield

    def _store(self, folders: set[Path], link: bool) -> dict[Path, tuple[str, bool]]:
        """Stores packages; the digest of each, and whether it is new. On an error none stays that is new."""
        stored: dict[Path, tuple[str, bool]] = {}
        try:
            for folder in sorted(folders):
                stored[folder] = add_package(self.root, folder, link=link, model=self.database_path)
        except BaseException:
            self._discard(stored)
            raise
        return stored

    def _discard(self, stored: Mapping[Path, tuple[str, bool]]) -> None:
        """The lock is held and nothing refers to new packages: on a full disk their space is needed."""
        import shutil

        for digest, new in stored.values():
            if new:
                shutil.rmtree(package_folder(self.root, digest), ignore_errors=True)

    def _file(self, engine: NewEngine, digest: str) -> dict[str, str | int]:
        path = package_folder(self.root, digest) / engine.file.name
        return {
            "file": path.relative_to(self.root).as_posix(), "package": digest, "sha256": sha256_of(path),
            "file_bytes": path.stat().st_size, "size_bytes": engine.size_bytes or path.stat().st_size,
        }  # fmt: skip

    def _insert_packages(
        self, connection: sqlite3.Connection, build_id: int, engines: Sequence[NewEngine],
        stored: Mapping[Path, tuple[str, bool]],
    ) -> None:  # fmt: skip
        seen = set()
        for engine in engines:
            digest, _ = stored[engine.file.parent]
            if digest not in seen:
                seen.add(digest)
                about = {"format": engine.format, "precision": engine.precision}
                size = size_of(package_folder(self.root, digest))
                rows.insert(
                    connection, "packages", {**about, "build_id": build_id, "digest": digest, "size_bytes": size}
                )


def _current(connection: sqlite3.Connection, family: str, device: str, hardware: str) -> list[int]:
    """The current builds of a family and device on one machine: one, or one for each driver it has had."""
    found = connection.execute(
        "SELECT id, hardware FROM builds WHERE family = ? AND device = ? AND current", (family, device)
    )
    return [row["id"] for row in found if machine_of(row["hardware"]) == machine_of(hardware)]


def _refuse_lost_database(registry: Registry) -> None:
    """
    Raises:
        DamagedRegistry: there are engines, and no database that knows them: a new one would make them garbage.
    """
    for name in ("packages", "engines"):
        if any((registry.root / name).glob("*/*")):
            raise DamagedRegistry(
                f"{registry.root / name} holds engines, but {registry.database_path} is missing or empty: put it back "
                "from a backup, or move that folder away."
            )


def _check(build: BuildRecord, engines: Sequence[NewEngine]) -> None:
    if not engines:
        raise ValueError("a build without engines would hide the one before it")
    if len({(engine.file, engine.runtime, engine.route) for engine in engines}) < len(engines):
        raise ValueError("two engines have one file, one runtime and one route")
    for engine in engines:
        for name in rows.OF_A_BUILD:
            if getattr(engine, name) != getattr(build, name):
                raise ValueError(f"{engine.route} and its build differ in {name}")
        if not (engine.file.parent / MANIFEST).is_file():
            raise ValueError(f"{engine.file} is no file of a package")
        seen = engine.verification
        if seen is not None and not seen.passed:
            raise VerificationError(
                f"The engine {engine.route} of {engine.family} was not registered, nor any other of its build. "
                f"{explain(seen)}"
            )

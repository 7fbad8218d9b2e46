"""The registry: verified engines with their accuracy and latency, safe against a death at any moment.

    <root>/registry.sqlite            builds, engines, latencies and tags
    <root>/engines/ab/ab12….onnx      each engine under its own SHA-256
    <root>/supernets/                 what the newest build of a family and device tuned
    <root>/build.lock                 held by the build that is timing engines
    <root>/store.lock                 held by whoever adds or removes files: one at a time

Files come first and one transaction refers to them last. A build that dies before its
commit leaves at most files nobody refers to, and the build before it stays current. Paths
follow from the SHA-256, so a registry can be moved as a folder. Reading takes no lock.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.errors import DamagedRegistry, RegistryError, VerificationError
from klas_zoo.files import replacing, sha256_of
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry import database, rows
from klas_zoo.registry.records import BuildRecord, EngineRecord, NewEngine
from klas_zoo.registry.tags import builds_of

__all__ = ["BuildRecord", "EngineRecord", "NewEngine", "Registry", "check_file", "default_root", "supernet_path"]


def default_root() -> Path:
    """The folder `KLAS_ZOO_REGISTRY` names, else the user's data folder of this platform."""
    named = os.environ.get("KLAS_ZOO_REGISTRY")
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_data_path("klas-zoo", appauthor=False)


def supernet_path(root: Path, family: str, device: str) -> Path:
    """Where the newest build of a family and device leaves what it tuned; see klas_zoo.building.tuned."""
    return root / "supernets" / f"{family}-{device}.safetensors"


def check_file(engine: EngineRecord, *, content: bool) -> None:
    """Compares an engine's file with its record: its size, and its SHA-256 where `content` is true.

    Raises:
        DamagedRegistry: the file is missing, cannot be read, or is not what was registered.
    """
    try:
        same = engine.path.stat().st_size == engine.size_bytes
        found = "is not the file that was registered"
        same = same and (not content or sha256_of(engine.path) == engine.sha256)
    except OSError as error:
        same, found = False, f"cannot be read ({error.strerror})"
    if not same:
        raise DamagedRegistry(
            f"The file of engine {engine.route} of {engine.family} {found}: {engine.path}. "
            f"Run klas-zoo build again."
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
        registry = cls(Path(root).expanduser().absolute() if root is not None else default_root())
        with database.in_one_sentence(registry.root, "opened"):
            if not database.is_there(registry.database_path):
                if not create:
                    raise RegistryError(f"No registry at {registry.root}: run klas-zoo build first.")
                registry.root.mkdir(parents=True, exist_ok=True)
                with registry.changing_files():
                    if not database.is_there(registry.database_path):  # else another process was faster
                        database.create(registry.database_path)
            if create:  # else whoever reads looks at the same when it connects
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
        """Holds the lock of whoever adds or removes files, as `writing` does; for as long as that takes.

        Raises:
            RegistryError: the registry's folder cannot be written.
        """
        with self._holding("store.lock", on_wait):
            yield

    def register(self, build: BuildRecord, engines: Sequence[NewEngine]) -> int:
        """Makes `engines` the current ones of the build's family and device; gives the build's id.

        All or nothing: whatever happens before the end, what was current stays current. Of two
        that register at once one waits; both builds are kept, and the later one is current.

        Raises:
            VerificationError: an engine did not pass; nothing was written.
            RegistryError: the disk is full, the folder cannot be written, an engine's file cannot be read.
            ValueError: there is no engine, or one that does not belong to the build.
        """
        _check(build, engines)
        with self.changing_files(), database.in_one_sentence(self.root, "written"):
            stored = self._store(engine.file for engine in engines)
            with database.transaction(self.database_path) as connection:
                connection.execute(
                    "UPDATE builds SET current = 0 WHERE family = :family AND device = :device AND current",
                    {"family": build.family, "device": build.device},
                )
                build_id = rows.insert_build(connection, build)
                for engine, file in zip(engines, stored, strict=True):
                    rows.insert_engine(connection, build_id, engine, file)
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
            # CROSS JOIN keeps the order: few builds are chosen of many, and all else follows from them
            engines = "FROM builds CROSS JOIN engines ON engines.build_id = builds.id"
            latencies: dict[int, list[LatencyRecord]] = {}
            for row in connection.execute(
                f"SELECT latencies.* {engines} CROSS JOIN latencies ON latencies.engine_id = engines.id"
                f" WHERE {chosen} ORDER BY latencies.batch",
                names,
            ):
                latencies.setdefault(row["engine_id"], []).append(rows.read_latency(row))
            found = connection.execute(
                f"SELECT engines.*, finished_at, {', '.join(rows.OF_A_BUILD)} {engines}"
                f" WHERE {chosen} ORDER BY engines.macs, engines.id",
                names,
            )
            return [
                rows.read_engine(row, tuple(latencies.get(row["id"], ())), self.path_of(row["sha256"]))
                for row in found
            ]

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

    def path_of(self, sha256: str) -> Path:
        """Where the engine of that content lies, or would."""
        return self.root / "engines" / sha256[:2] / f"{sha256}.onnx"

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one moment and changes nothing.

        Raises:
            DamagedRegistry: what is read cannot be understood.
            RegistryError: the registry cannot be read.
        """
        try:
            with database.in_one_sentence(self.root, "read"), database.reading(self.database_path) as connection:
                yield connection
        except (ValueError, TypeError, KeyError) as error:
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
        with database.in_one_sentence(self.root, "written"), database.transaction(self.database_path) as connection:
            yield connection

    @contextmanager
    def _holding(self, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
        import fcntl  # not at the top: picking also works where there is no fcntl

        with database.in_one_sentence(self.root, "locked"):
            lock = (self.root / name).open("ab")
        with lock:
            with database.in_one_sentence(self.root, "locked"):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    waits = False
                except BlockingIOError:
                    waits = True
            if waits:
                on_wait()
                with database.in_one_sentence(self.root, "locked"):
                    fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # a forked worker that lives on has the lock too: closing alone would not free it
                fcntl.flock(lock, fcntl.LOCK_UN)

    def _store(self, files: Iterable[Path]) -> list[dict[str, str | int]]:
        """Copies files into the store, or finds them there; of each its `sha256` and its `size_bytes`."""
        stored: list[dict[str, str | int]] = []
        new: list[Path] = []
        try:
            for file in files:
                sha256 = sha256_of(file)
                target = self.path_of(sha256)
                if not target.is_file() or sha256_of(target) != sha256:
                    new += [] if target.exists() else [target]
                    self._copy(file, target, sha256)
                stored.append({"sha256": sha256, "size_bytes": target.stat().st_size})
        except BaseException:
            for target in new:  # the lock is held and nothing refers to them: on a full disk, give the space back
                target.unlink(missing_ok=True)
            raise
        return stored

    def _copy(self, file: Path, target: Path, sha256: str) -> None:
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
            if sha256_of(temporary) != sha256:
                raise RegistryError(f"{file} changed while it was copied to {self.root}: build again.")


def _check(build: BuildRecord, engines: Sequence[NewEngine]) -> None:
    if not engines:
        raise ValueError("a build without engines would hide the one before it")
    for engine in engines:
        for name in rows.OF_A_BUILD:
            if getattr(engine, name) != getattr(build, name):
                raise ValueError(f"{engine.route} and its build differ in {name}")
        seen = engine.verification
        if not seen.passed:
            raise VerificationError(
                f"The engine {engine.route} of {engine.family} is not the same function as its route: over "
                f"{seen.images} images its logits differ by up to {seen.max_abs_difference:.3g} (allowed: "
                f"{seen.tolerance:.3g}) and {seen.top1_agreement:.2%} of its answers agree (at least "
                f"{seen.min_agreement:.2%} have to). Nothing was registered."
            )

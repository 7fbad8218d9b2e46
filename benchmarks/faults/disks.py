"""Disks that are full, read-only or forbidden, clocks that go backwards, two builds at once.

Everything here is real: a tmpfs of a few hundred kilobytes that is filled up and mounted read-only
(needs root), another user, libfaketime, and whole `klas-zoo build` processes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_up

from faults import Figure, Outcome
from klas_zoo.errors import KlasZooError, RegistryError
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import history, move_tag
from klas_zoo.registry.upkeep import builds, collect

DISK_BYTES = 1024 * 1024
PAGE = 4096
_SENTENCE = re.compile(r"Error: [^\n]+\n")


def run(scale: float) -> Outcome:
    parts: list[tuple[Callable[..., Figure], tuple[Any, ...]]] = [
        (full_disk, (max(1, round(1 / scale)),)),
        (read_only_disk, ()),
        (forbidden_folder, ()),
        (clock_backwards, ()),
        (two_builds_at_once, ()),
    ]
    figures = []
    for part, arguments in parts:
        with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as folder:
            os.chmod(folder, 0o755)
            figures.append(part(Path(folder), *arguments))
    return Outcome(figures=tuple(figures), numbers={"disk_bytes": DISK_BYTES})


def full_disk(folder: Path, stride: int) -> Figure:
    """Registers, tags and tidies with every number of free pages there is, from none to enough."""
    wanted = "a sentence or done; nothing lost"
    tried = refused = 0
    wrong: list[str] = []
    with _small_disk(folder) as disk:
        if disk is None:
            return _skipped("full disk", wanted, "mounting a tmpfs needs root")
        for free in range(0, 140, stride):
            root = disk / "registry"
            registry = made_up.filled_registry(root)
            move_tag(registry, "deit-micro@prod")
            before = registry.engines()
            filler = _fill(disk, but_pages=free)
            outcome = _try(lambda registry=registry: _register_many(registry, folder))  # type: ignore[misc]
            moved = _try(lambda registry=registry: move_tag(registry, "deit-micro@next"))  # type: ignore[misc]
            wrong += [f"{free} pages: {one}" for one in (outcome, moved) if one and "Free some space" not in one]
            if _try(lambda root=root: pick("1s", registry=root)):  # type: ignore[misc]
                wrong.append(f"{free} pages: no pick while the disk is full")
            filler.unlink()
            wrong += [f"{free} pages: {one}" for one in _losses(registry, before, "new" if not outcome else "old")]
            tried, refused = tried + 1, refused + bool(outcome)
            _register_many(registry, folder)
            collect(registry)
            wrong += [f"{free} pages: {one.what} after gc" for one in check(registry)]
            shutil.rmtree(root)
    return Figure(name="full disk, at every page", wanted=wanted, kept=not wrong and 0 < refused < tried,
                  measured=wrong[0] if wrong else f"{tried} fill levels, {refused} refused in a sentence")  # fmt: skip


def _register_many(registry: Registry, folder: Path) -> None:
    engines = []
    for index in range(6):
        file = folder / f"engine{index}"
        file.write_bytes(os.urandom(30_000))
        engines.append(made_up.new_engine(file, f"new{index}"))
    made_up.register(registry, made_up.build(command="x" * 20_000), engines)


def _losses(registry: Registry, before: list[Any], now: str) -> Iterator[str]:
    """What is not as it was, or as a whole build makes it."""
    engines = registry.engines()
    if now == "old" and engines != before:
        yield "the build before is no longer current"
    if now == "new" and [str(one.route) for one in engines] != [f"new{index}" for index in range(6)]:
        yield "the new build is not whole"
    if registry.engines("deit-micro@prod") != before:
        yield "the tag points elsewhere"
    yield from (one.what for one in check(registry) if not one.harmless)


def read_only_disk(folder: Path) -> Figure:
    wanted = "a sentence; pick and check work"
    with _small_disk(folder) as disk:
        if disk is None:
            return _skipped("read-only disk", wanted, "mounting a tmpfs needs root")
        registry = made_up.filled_registry(disk / "registry")
        before = registry.engines()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        wrong = list(_refusals(registry, folder, "Read-only file system"))
        wrong += [one.what for one in check(registry)] + ([] if registry.engines() == before else ["it changed"])
        code, _, error = _command(["pick", "--latency", "1s", "--registry", str(registry.root)])
        wrong += [f"pick ended with {code}: {error}"] if code else []
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    said = wrong[0] if wrong else "5 refused in a sentence"
    return Figure(name="read-only disk", wanted=wanted, kept=not wrong, measured=said)


def forbidden_folder(folder: Path) -> Figure:
    """The same, as a user who may read and not write; root, who may do all, becomes another one for it."""
    wanted = "a sentence; pick and check work"
    registry = made_up.filled_registry(folder / "registry")
    for path in (registry.root, *registry.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    process = os.fork()
    if process == 0:
        try:
            import fcntl  # noqa: F401  where this Python lies the other user may not look
            import hashlib  # noqa: F401

            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            with tempfile.TemporaryDirectory() as own:
                wrong = list(_refusals(registry, Path(own), "Permission denied"))
            wrong += [one.what for one in check(registry)] + ([] if registry.engines() else ["it is empty"])
            pick("1s", registry=registry)
            for one in wrong:
                print(one, file=sys.stderr)
            os._exit(1 if wrong else 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(2)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for path in (registry.root, *registry.root.rglob("*")):
        path.chmod(0o755)
    return Figure(name="permission denied", wanted=wanted, kept=code == 0,
                  measured="5 refused in a sentence" if code == 0 else "see above")  # fmt: skip


def _refusals(registry: Registry, folder: Path, says: str) -> Iterator[str]:
    """What is wrong with how writing is refused, where nothing can be written."""
    attempts: dict[str, Callable[[], object]] = {
        "register": lambda: _register_many(registry, folder),
        "tag": lambda: move_tag(registry, "deit-micro@prod"),
        "gc": lambda: collect(registry),
        "build's lock": lambda: registry.writing().__enter__(),
        "a new registry": lambda: Registry.open(registry.root / "inner", create=True),
    }
    for name, attempt in attempts.items():
        said = _try(attempt)
        if said is None or not (says in said or "Check who may write" in said):
            yield f"{name}: {said}"


def clock_backwards(folder: Path) -> Figure:
    """A build and a tag, each by a process whose clock is two years behind the ones before."""
    wanted = "the later build is current, history in order"
    try:
        import libfaketime
    except ImportError:
        return _skipped("clock going backwards", wanted, "needs pip install libfaketime")
    registry = made_up.filled_registry(folder / "registry")
    move_tag(registry, "deit-micro@prod")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import made_up\n"
        "from pathlib import Path; from klas_zoo.registry import Registry; from klas_zoo.registry import tags, upkeep\n"
        "registry = Registry.open(sys.argv[2], create=False); new = Path(sys.argv[2]) / 'new.made-up'\n"
        "made_up.register(registry, made_up.build(started_at=tags.now(), finished_at=tags.now()),"
        " [made_up.new_engine(new, 'late')])\n"
        "tags.move_tag(registry, 'deit-micro@prod'); upkeep.collect(registry)\n"
    )
    library = next(Path(libfaketime.__file__).parent.rglob("libfaketime.so.1"))
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAKETIME": "-730d"}
    subprocess.run([sys.executable, "-c", code, made_up.__file__.rpartition("/")[0], str(registry.root)],
                   env=environment, check=True)  # fmt: skip
    (found,) = registry.engines("deit-micro")
    moves = history(registry, "deit-micro@prod")
    wrong = [one.what for one in check(registry)]
    if str(found.route) != "late" or registry.engines("deit-micro@prod") != [found]:
        wrong.append("the later build is not current")
    if [move.build_id for move in moves] != [2, 1] or not moves[0].moved_at < moves[1].moved_at:
        wrong.append("the history is out of order, or the clock did not go backwards")
    said = wrong[0] if wrong else "as wanted"
    return Figure(name="clock going backwards", wanted=wanted, kept=not wrong, measured=said)


def two_builds_at_once(folder: Path) -> Figure:
    """Two whole builds of one small family, started together; their seeds differ, so that neither is the other's."""
    wanted = "both registered, the later is current"
    from conftest import TINY_FAMILY
    from toys import write_images

    (folder / "tiny-vits.toml").write_text(TINY_FAMILY)
    for split, count in (("train", 24), ("val", 8)):
        write_images(folder / "images" / split, ("ant", "bee", "cat", "dog"), count, seed=count)
    words = ["build", "--family", "tiny-vits.toml", "--data", "images", "--random-weights", "--device", "cpu"]
    words += ["--tune-steps", "2", "--registry", "registry"]
    command = [sys.executable, "-m", "klas_zoo", *words]
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    started = [
        subprocess.Popen([*command, "--seed", seed], cwd=folder, stdout=quiet, stderr=pipe, text=True)
        for seed in ("1", "2")
    ]
    errors = [process.communicate()[1] for process in started]
    failed = [error for error, process in zip(errors, started, strict=True) if process.returncode]
    wrong = [error.strip().splitlines()[-1] for error in failed]
    registry = Registry(folder / "registry")
    if not wrong:
        found = builds(registry)
        wrong += [one.what for one in check(registry)]
        if len(found) != 2 or [one.current for one in found] != [True, False] or not all(one.engines for one in found):
            wrong.append(f"{len(found)} builds are there")
    waited = sum("waiting for it" in error for error in errors)
    return Figure(name="two builds of one family at once", wanted=wanted, kept=not wrong,
                  measured=wrong[0] if wrong else f"both there; {waited} said that it waited")  # fmt: skip


def _try(attempt: Callable[[], object]) -> str | None:
    """The sentence an attempt is refused with; None: it was done. Anything else is a bug and is raised."""
    try:
        attempt()
    except RegistryError as error:
        return str(error)
    except KlasZooError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _command(words: list[str]) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "klas_zoo", *words], capture_output=True, text=True)
    if done.returncode and not _SENTENCE.fullmatch(done.stderr):
        return done.returncode, done.stdout, f"no sentence: {done.stderr}"
    return done.returncode, done.stdout, done.stderr


def _fill(disk: Path, *, but_pages: int) -> Path:
    """Fills the disk with a file, and leaves that many pages."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"x" * PAGE)
            except OSError:
                break
        file.truncate(max(0, file.tell() - but_pages * PAGE))
    return filler


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of its own of `DISK_BYTES`; None where none can be mounted."""
    disk = folder / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "klas-zoo-faults", str(disk)]
    if subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _skipped(name: str, wanted: str, why: str) -> Figure:
    return Figure(name=name, wanted=wanted, measured=f"not run: {why}", kept=False)

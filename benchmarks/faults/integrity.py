"""What is verified is what is used: bits flipped in packages, and a registry beside its gc.

* One random bit of a random file of a package, in every format that needs no GPU: opening it has to refuse.
* Picks beside two processes that delete old builds and one that registers: every pick gets an engine that is there.
* A tag that is set while old builds are deleted: it is refused, or its engines stay.
* A database with random bytes or pages damaged: no traceback, and gc deletes no engine.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import made_up
import packages
import torch

from faults import Figure, Outcome, kills
from klas_zoo.errors import KlasZooError, PackageError
from klas_zoo.exporters import model_package, trt_package
from klas_zoo.exporters.checking import open_package
from klas_zoo.exporters.family import VerificationImages
from klas_zoo.exporters.gpu_targets import ComputeCapability
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.to_triton import TritonSettings, write_repository
from klas_zoo.exporters.torch_package import export_torch
from klas_zoo.exporters.triton_repository import check_repository, is_repository
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import move_tag
from klas_zoo.registry.upkeep import collect

PACKAGE_FLIPS, PICKS, RACES, DATABASES = 2_000, 5_000, 200, 300
SEED = 0
_PAGE = 4096


def run(scale: float) -> Outcome:
    torch.set_num_threads(1)
    draw, figures = random.Random(SEED), []
    numbers: dict[str, object] = {"seed": SEED}
    parts: list[tuple[str, int, str, Callable[[Path, int, random.Random], tuple[list[str], dict[str, int]]]]] = [
        ("random one-bit flips over all files of packages", PACKAGE_FLIPS, "all found", _packages),
        ("picks beside two gcs and a build", PICKS, "0 false alarms", _picks),
        ("tags set while old builds are deleted", RACES, "0 that point to deleted engines", _races),
        ("damaged databases", DATABASES, "0 tracebacks, 0 engines deleted by gc", _databases),
    ]
    for name, full, wanted, part in parts:
        count, started = max(1, round(full * scale)), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as place:
            wrong, seen = part(Path(place), count, draw)
        told = ", ".join(f"{what} {times:,}" for what, times in seen.items())
        figures.append(
            Figure(name=f"{count:,} {name}", wanted=wanted, measured=f"{len(wrong)} wrong ({told})", kept=not wrong)
        )
        numbers[name] = {
            "count": count, "wrong": wrong[:20], "seen": seen, "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
    return Outcome(figures=tuple(figures), numbers=numbers)


def flip(file: Path, draw: random.Random) -> Callable[[], None]:
    """Flips one bit; gives what turns it back."""
    place, bit = draw.randrange(file.stat().st_size), draw.randrange(8)

    def turn() -> None:
        with file.open("r+b") as content:
            content.seek(place)
            (byte,) = content.read(1)
            content.seek(place)
            content.write(bytes([byte ^ 1 << bit]))

    turn()
    return turn


def _packages(folder: Path, count: int, draw: random.Random) -> tuple[list[str], dict[str, int]]:
    places = {precision: packages.write_package(folder / precision, precision=precision).folder
              for precision in ("fp32", "fp16", "int8", "bf16")}  # fmt: skip
    package = Package.open(places["fp32"])
    model_package.derive(package, places.setdefault("model-package", _made(folder / "model-package")), {})
    for name, copied in (("triton", False), ("triton --copy", True)):
        write_repository(package, places.setdefault(name, folder / name), TritonSettings(copy=copied))
    images = VerificationImages(test=packages.batches, calibration=packages.batches)
    places["torch"] = folder / "torch"
    export_torch(packages.source(), places["torch"], precision="fp32", images=images)
    if find_spec("tensorrt_rtx"):  # builds for a GPU that is not here
        options = {"format": "tensorrt-rtx", "capabilities": (ComputeCapability.parse("a100"),)}
        trt_package.derive(package, places.setdefault("tensorrt-rtx", _made(folder / "tensorrt-rtx")), options)
    kills.shorten_measurements()
    kills.prepare(folder)
    assert kills.finish(folder, folder / "registry") == 0
    for one in map(Package.open, (folder / "registry" / "packages").iterdir()):
        places[f"registered {one.manifest.precision}"] = one.folder
    wrong, seen = [], Counter(dict.fromkeys(places, 0))
    for number in range(count):
        form = list(places)[number % len(places)]
        files = [path for path in sorted(places[form].rglob("*")) if path.is_file() and path.stat().st_size]
        file = draw.choice(files)
        turn_back = flip(file, draw)
        try:
            _open(places[form])
            wrong.append(f"a bit of {form}/{file.name} was not found")
        except PackageError:
            seen[form] += 1
        except Exception as error:
            wrong.append(f"a bit of {form}/{file.name}: {type(error).__name__}: {error}"[:300])
        turn_back()
    for place in places.values():  # they were turned back
        _open(place)
    return wrong, dict(seen)


def _open(place: Path) -> None:
    """What `klas-zoo verify` does before it runs engines."""
    if is_repository(place):
        check_repository(place)
        place = place / "family"
    open_package(place)


def _picks(folder: Path, count: int, draw: random.Random) -> tuple[list[str], dict[str, int]]:
    registry = Registry.open(folder / "registry", create=True)
    _register(registry, folder, 0)

    def register() -> None:
        number = 1
        while True:
            _register(registry, folder, number)
            number += 1

    def delete() -> None:
        while True:
            collect(registry, old_builds=True)

    children, wrong = [_fork(one) for one in (register, delete, delete)], []
    try:
        for number in range(count):
            try:
                if not pick("5ms", registry=registry).engine.route:
                    wrong.append(f"pick {number}: nothing")
            except KlasZooError as error:
                wrong.append(f"pick {number}: {error}")
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
    with registry.reading() as connection:
        (builds,) = connection.execute("SELECT COUNT(*) FROM builds").fetchone()
    wrong += [one.what for one in check(registry) if not one.harmless]
    return wrong, {"answered": count - len(wrong), "builds registered meanwhile": builds}


def _races(folder: Path, count: int, draw: random.Random) -> tuple[list[str], dict[str, int]]:
    wrong, seen = [], Counter({"tagged": 0, "refused": 0})
    for number in range(count):
        registry = Registry.open(folder / str(number), create=True)
        for build in range(12):
            _register(registry, folder / str(number), build)
        target, after_s = draw.randint(1, 11), draw.uniform(0, 0.03)
        child = _fork(lambda registry=registry: collect(registry, old_builds=True) and None)
        time.sleep(after_s)
        try:
            move_tag(registry, "deit-micro@prod", build_id=target)
            tagged = True
        except KlasZooError:
            tagged = False
        os.waitpid(child, 0)
        seen["tagged" if tagged else "refused"] += 1
        if tagged and (not registry.engines("deit-micro@prod") or any(not one.harmless for one in check(registry))):
            wrong.append(f"race {number}: the tag points to engines that are gone")
        shutil.rmtree(registry.root)
    return wrong, dict(seen)


def _databases(folder: Path, count: int, draw: random.Random) -> tuple[list[str], dict[str, int]]:
    whole = made_up.filled_registry(folder / "whole")
    files = {path.relative_to(whole.root) for path in (whole.root / "packages").rglob("*") if path.is_file()}
    content = whole.database_path.read_bytes()
    wrong, seen = [], Counter({"gc deleted nothing": 0, "gc refused": 0})
    for number in range(count):
        root = Path(shutil.copytree(whole.root, folder / "damaged"))
        damaged = bytearray(content)
        if number % 2:
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(100, len(damaged))] = draw.randrange(256)
        else:
            page = draw.randrange(len(damaged) // _PAGE) * _PAGE
            damaged[page + 100 : page + _PAGE] = draw.choice([bytes, draw.randbytes])(_PAGE - 100)
        (root / "registry.sqlite").write_bytes(damaged)
        registry = Registry(root)
        for attempt in (registry.engines, lambda: pick("5ms", registry=registry), lambda: check(registry)):  # noqa: B023
            try:
                attempt()
            except KlasZooError:
                pass
            except Exception as error:
                wrong.append(f"database {number}: {type(error).__name__}: {error}"[:300])
        try:
            collect(registry)
            seen["gc deleted nothing"] += 1
        except KlasZooError:
            seen["gc refused"] += 1
        except Exception as error:
            wrong.append(f"database {number}: gc: {type(error).__name__}: {error}"[:300])
        left = {path.relative_to(root) for path in (root / "packages").rglob("*") if path.is_file()}
        wrong += [f"database {number}: gc deleted {len(files - left)} files"] if files - left else []
        shutil.rmtree(root)
    return wrong, dict(seen)


def _register(registry: Registry, folder: Path, number: int) -> None:
    file = folder / f"engine-{os.getpid()}-{number}.onnx"
    made_up.register(registry, made_up.build(), [made_up.new_engine(file, f"engine{number}")])
    file.unlink()


def _fork(do: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        do()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder

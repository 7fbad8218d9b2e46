"""Builds that are killed with SIGKILL at random moments and then run again.

A moment is drawn in two steps: one of the build's stages, all as likely, then a share of the time that
this stage took in undisturbed builds, counted from when it begins. So short stages are hit as often as
long ones, and a machine that is slower now than before makes no kill come after the end. One that does
come after the end is not counted, and drawn again.

Whatever the moment, the second run has to end with the registry of a build that nobody killed: the same
engines, byte for byte, one build, and nothing that `registry check` calls wrong. In between, right after
the kill, the registry is either empty or complete, and every file in it that no row refers to is one that
`registry check` finds.

The build is a real one, only small: two anchors of two blocks, a few dozen images, engines timed for
milliseconds. A process that has imported everything forks for each run, so that 400 runs take minutes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from toys import write_images

from faults import Figure, Outcome
from klas_zoo.building import engine_stages, engines
from klas_zoo.building.job import build
from klas_zoo.building.settings import BuildSettings
from klas_zoo.chains import Chain
from klas_zoo.data.loading import load_data
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.latency import measure_engine
from klas_zoo.profiles.timing import Method
from klas_zoo.progress.listeners import Listener, NullListener
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.store import check_file
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.settings import PRESETS

KILLS = 200
IMAGE, CLASSES, SEED = (3, 8, 8), 3, 0
_START = "before the first stage"
_LOOK_S = 0.0005  # between two looks at what a build has come to
State = list[tuple[Any, ...]]


class _Stem(nn.Module):
    """(B, 3, 8, 8) → (B, 4, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).flatten(2).transpose(1, 2)


class _Head(nn.Module):
    """(B, 4, width) → (B, classes)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens.mean(1))


def run(scale: float) -> Outcome:
    torch.set_num_threads(1)
    # the same measurement, only shorter
    shorten_measurements()
    kills, draw = max(1, round(KILLS * scale)), random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as place:
        folder = Path(place)
        prepare(folder)
        whole = [_undisturbed(folder, number) for number in range(3)]
        lasting = {stage: statistics.median(one[stage] for one in whole) for stage in whole[0]}
        expected = state(Registry(folder / "whole-0"))
        assert expected and expected == state(Registry(folder / "whole-1")), "an undisturbed build is not repeatable"
        wrong: list[str] = []
        died_in, late = Counter(dict.fromkeys(lasting, 0)), 0
        for number in range(kills):
            while (stage := _kill(folder / "killed", folder, lasting, draw)) is None:
                late += 1
            died_in[stage] += 1
            found = _look_and_resume(folder / "killed", folder, expected)
            wrong += [f"kill {number}: {one}" for one in found]
            if number % 20 == 19:
                print(f"{number + 1} of {kills} kills, {len(wrong)} wrong", file=sys.stderr, flush=True)
    return Outcome(
        figures=(
            Figure(
                name=f"{kills} builds killed at random moments and resumed",
                wanted="the same registry each time; no orphan that check does not find; no bad engine",
                measured=wrong[0] if wrong else f"{kills} of {kills} the same, {len(expected)} engines each",
                kept=not wrong,
            ),
        ),
        numbers={
            "kills": kills,
            "seed": SEED,
            "undisturbed_seconds_of_stages": lasting,
            "killed_in": dict(died_in),
            "came_too_late_and_drawn_again": late,
            "wrong": wrong,
        },
    )


def shorten_measurements() -> None:
    method = Method(warmup_ms=1, min_runs=5, min_ms=5)
    for module in (engines, engine_stages):
        module.measure_engine = partial(measure_engine, method=method)  # type: ignore[assignment]


def prepare(folder: Path) -> None:
    """Images to build with, and all imports."""
    write_images(folder / "images" / "train", ("ant", "bee", "cat"), 16, size=(8, 8), seed=1)
    write_images(folder / "images" / "val", ("ant", "bee", "cat"), 5, size=(8, 8), seed=2)
    _warm_up()


def _kill(root: Path, folder: Path, lasting: dict[str, float], draw: random.Random) -> str | None:
    """Starts a build and kills it at a drawn moment; the stage it died in, None where it had ended."""
    shutil.rmtree(root, ignore_errors=True)
    stage = draw.choice(list(lasting))
    after_s = draw.uniform(0, lasting[stage])
    child = fork(folder, root)
    _await(root, stage, child)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)  # one that has ended is not waited for yet, so the number is still its own
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0, "a build that nobody killed failed"
        return None
    done = {path.parent.parent.name for path in (root / "cache").glob("*/*/stage.json")}
    begun = [one for one in lasting if one == _START or (root / "cache" / one).is_dir()]
    return next((one for one in begun[1:] if one not in done), begun[-1])


def _look_and_resume(root: Path, folder: Path, expected: State) -> list[str]:
    """What is wrong with what a killed build left, and with what the same build then makes of it."""
    wrong = []
    if (root / "registry.sqlite").is_file():
        left = state(Registry(root))
        if left not in ([], expected):
            wrong.append(f"after the kill the registry held {len(left)} engines, not none or all")
        wrong += [f"after the kill: {one}" for one in _findings(Registry(root))]
    if finish(folder, root):
        return [*wrong, "the second run failed"]
    registry = Registry(root)
    if state(registry) != expected:
        wrong.append("the registry after the second run is not that of an undisturbed build")
    if len(list((root / "cache").glob("*/.*"))) or list((root / "cache").glob("*/*.unfinished")):
        wrong.append("the second run left something unfinished")
    return wrong + _findings(registry)


def state(registry: Registry) -> State:
    """All that a registry has of its engines, but times; and how many builds there were."""
    with registry.reading() as connection:
        builds = connection.execute("SELECT COUNT(*) FROM builds").fetchone()[0]
    return [
        (builds, str(one.route), one.sha256, one.size_bytes, one.macs, one.top1, one.verification, len(one.latencies))
        for one in registry.engines()
    ]


def _findings(registry: Registry) -> list[str]:
    """What is wrong with a registry, and packages in it that no build refers to and `check` does not see."""
    found = check(registry)
    wrong = [one.what for one in found if not one.harmless]
    listed = {one.path.parent for one in registry.engines()}
    seen = {one.path for one in found}
    packages = (registry.root / "packages").glob("*")
    wrong += [f"check does not find the orphan {path.name}" for path in packages if path not in listed | seen]
    for engine in registry.engines():
        check_file(engine, content=True)
        if engine.verification is None or not engine.verification.passed:
            wrong.append(f"{engine.route} is listed and did not pass")
    return wrong


def _undisturbed(folder: Path, number: int) -> dict[str, float]:
    """Seconds of each stage by the name of its folder in the cache, and of what comes before the first one."""
    root = folder / f"whole-{number}"
    child, begun = fork(folder, root), {_START: time.perf_counter()}
    while not _ended(child):
        for path in (root / "cache").glob("*"):
            if path.is_dir():  # beside the stages' folders lies a lock
                begun.setdefault(path.name, time.perf_counter())
        time.sleep(_LOOK_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ends = [*list(begun.values())[1:], time.perf_counter()]
    return {stage: end - start for (stage, start), end in zip(begun.items(), ends, strict=True)}


def _await(root: Path, stage: str, child: int) -> None:
    """Until a stage has begun, which makes its folder in the cache."""
    while stage != _START and not (root / "cache" / stage).is_dir() and not _ended(child):
        time.sleep(_LOOK_S)


def _ended(child: int) -> bool:
    """Whether a child has ended; it can still be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(folder: Path, root: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(fork(folder, root), 0)[1])


def fork(folder: Path, root: Path, listener: Listener | None = None) -> int:
    child = os.fork()
    if child:
        return child
    try:
        # makes torch's pool of threads anew while there is one thread: two that do so at once in a fork abort
        torch.set_num_threads(1)
        _build(folder, root, listener)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _build(folder: Path, root: Path, listener: Listener | None = None) -> None:
    family = _family()
    data = load_data(folder / "images", sample=None, num_classes=CLASSES, data_config=family.data_config)
    tuning = {"steps": 60, "batch": 8, "init_images": 16, "precision": "fp32"}
    settings = BuildSettings(
        probes=ProbeSettings(epochs=2, batch=8),
        selection=SelectionSettings(buckets=2, tolerance=0.0),
        tuning=PRESETS["quick"].__class__(**{**vars(PRESETS["quick"]), **tuning}),
        batch=16, latency_batches=(1,), threads=1, workers=0, seed=SEED, checkpoint_s=0.0,
    )  # fmt: skip
    registry = Registry.open(root, create=True)
    device = resolve_device("cpu")
    build(family, data, settings, device=device, registry=registry, listener=listener or NullListener())


def _family() -> Family:
    chains = {}
    for name, width in (("small", 6), ("large", 12)):
        torch.manual_seed(width)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)]
        chains[name] = Chain(_Stem(width), blocks, _Head(width), input_shape=IMAGE).eval()
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    return Family.of("kills", chains, config)


def _warm_up() -> None:
    """Imports what an export imports. Nothing here goes backward: torch cannot do that before and after a fork."""
    chains = _family().chains
    RouteExporter(Supernet(chains, [Route.anchor(name, chain.depth) for name, chain in chains.items()]), IMAGE)

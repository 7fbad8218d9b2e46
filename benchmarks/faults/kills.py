"""Builds that are killed with SIGKILL at random moments and then run again.

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
from klas_zoo.building import engines
from klas_zoo.building.job import build
from klas_zoo.building.settings import BuildSettings
from klas_zoo.chains import Chain
from klas_zoo.data.loading import load_data
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.progress.listeners import Nobody
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
    engines.measure = partial(engines.measure, warmup_ms=1, min_runs=5, min_ms=5)  # type: ignore[assignment]
    kills, draw = max(1, round(KILLS * scale)), random.Random(SEED)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as place:
        folder = Path(place)
        write_images(folder / "images" / "train", ("ant", "bee", "cat"), 16, size=(8, 8), seed=1)
        write_images(folder / "images" / "val", ("ant", "bee", "cat"), 5, size=(8, 8), seed=2)
        _warm_up()
        seconds = min(_undisturbed(folder, number) for number in range(3))
        expected = _state(Registry(folder / "whole-0"))
        assert expected and expected == _state(Registry(folder / "whole-1")), "an undisturbed build is not repeatable"
        wrong: list[str] = []
        died_in: Counter[str] = Counter()
        for number in range(kills):
            found = _kill_and_resume(folder, draw.uniform(0, seconds), expected, died_in)
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
            "undisturbed_seconds": seconds,
            "stages_done_when_killed": dict(sorted(died_in.items())),
            "wrong": wrong,
        },
    )


def _kill_and_resume(folder: Path, after_s: float, expected: State, died_in: Counter[str]) -> list[str]:
    root = folder / "killed"
    shutil.rmtree(root, ignore_errors=True)
    child = _fork(folder, root)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    died_in[f"{len(list((root / 'cache').glob('*/*/stage.json'))):2} stages"] += 1
    wrong = []
    if (root / "registry.sqlite").is_file():
        left = _state(Registry(root))
        if left not in ([], expected):
            wrong.append(f"after the kill the registry held {len(left)} engines, not none or all")
        wrong += [f"after the kill: {one}" for one in _findings(Registry(root))]
    if _finish(folder, root):
        return [*wrong, "the second run failed"]
    registry = Registry(root)
    if _state(registry) != expected:
        wrong.append("the registry after the second run is not that of an undisturbed build")
    if len(list((root / "cache").glob("*/.*"))) or list((root / "cache").glob("*/*.unfinished")):
        wrong.append("the second run left something unfinished")
    return wrong + _findings(registry)


def _state(registry: Registry) -> State:
    """All that a registry tells of its engines, but times; and how many builds there were."""
    with registry.reading() as connection:
        builds = connection.execute("SELECT COUNT(*) FROM builds").fetchone()[0]
    return [
        (builds, str(one.route), one.sha256, one.size_bytes, one.macs, one.top1, one.verification, len(one.latencies))
        for one in registry.engines()
    ]


def _findings(registry: Registry) -> list[str]:
    """What is wrong with a registry, and files in it that nobody knows and `check` does not see."""
    found = check(registry)
    wrong = [one.what for one in found if not one.harmless]
    listed = {one.path for one in registry.engines()}
    seen = {one.path for one in found}
    files = [path for path in (registry.root / "engines").rglob("*") if path.is_file()]
    wrong += [f"check does not find the orphan {path.name}" for path in files if path not in listed | seen]
    for engine in registry.engines():
        check_file(engine, content=True)
        if not engine.verification.passed:
            wrong.append(f"{engine.route} is listed and did not pass")
    return wrong


def _undisturbed(folder: Path, number: int) -> float:
    started = time.perf_counter()
    assert _finish(folder, folder / f"whole-{number}") == 0
    return time.perf_counter() - started


def _finish(folder: Path, root: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(_fork(folder, root), 0)[1])


def _fork(folder: Path, root: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        _build(folder, root)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _build(folder: Path, root: Path) -> None:
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
    build(family, data, settings, device=resolve_device("cpu"), registry=registry, listener=Nobody())


def _family() -> Family:
    chains = {}
    for name, width in (("cheap", 6), ("dear", 12)):
        torch.manual_seed(width)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)]
        chains[name] = Chain(_Stem(width), blocks, _Head(width), input_shape=IMAGE).eval()
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    return Family.of("kills", chains, config)


def _warm_up() -> None:
    """Imports what an export imports. Nothing here goes backward: torch cannot do that before and after a fork."""
    chains = _family().chains
    RouteExporter(Supernet(chains, [Route.anchor(name, chain.depth) for name, chain in chains.items()]), IMAGE)

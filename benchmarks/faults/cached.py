"""Bits flipped in the build cache: the same build registers the engines of an undisturbed one, byte for byte.

Each time one random bit of a random file in the cache of a build that was not registered yet. The build is the small
one of kills.py, and a process that has imported everything forks for each run.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from faults import Figure, Outcome, kills
from faults.integrity import flip
from klas_zoo.progress.listeners import Advance, NullListener
from klas_zoo.registry import Registry

FLIPS, SEED = 500, 0


def run(scale: float) -> Outcome:
    torch.set_num_threads(1)
    kills.shorten_measurements()
    count, draw = max(1, round(FLIPS * scale)), random.Random(SEED)
    wrong, seen = [], Counter[str]()
    with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as place:
        folder = Path(place)
        kills.prepare(folder)
        assert kills.finish(folder, folder / "whole") == 0
        expected = kills.state(Registry(folder / "whole"))
        # in a process of its own, as torch cannot go backward before a fork and after it
        os.waitpid(kills.fork(folder, folder / "stopped", _UntilRegistered()), 0)
        assert not kills.state(Registry(folder / "stopped"))
        for number in range(count):
            root = Path(shutil.copytree(folder / "stopped", folder / "flipped"))
            files = [path for path in sorted((root / "cache").rglob("*")) if path.is_file() and path.stat().st_size]
            file = draw.choice(files)
            flip(file, draw)
            failed = kills.finish(folder, root)
            if failed or kills.state(Registry(root)) != expected:
                wrong.append(f"flip {number} in {file.relative_to(root)}: {'failed' if failed else 'other engines'}")
            seen[file.relative_to(root / "cache").parts[0]] += 1
            shutil.rmtree(root)
    told = ", ".join(f"{what} {times}" for what, times in sorted(seen.items()))
    return Outcome(
        figures=(
            Figure(
                name=f"{count} flips in the build cache, then the same build",
                wanted="0 wrong engines registered",
                measured=f"{len(wrong)} wrong ({told})",
                kept=not wrong,
            ),
        ),
        numbers={"seed": SEED, "flips": count, "wrong": wrong[:20], "stages": dict(sorted(seen.items()))},
    )


class _UntilRegistered(NullListener):
    """Ends the process when everything is in the cache and nothing in the registry."""

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        if name == "register":
            os._exit(0)
        return super().stage(name, total, unit)

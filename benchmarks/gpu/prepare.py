"""Exports every family's graphs and one package, a few at a time: `python prepare.py DIR [--jobs N] [--quick]`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu import graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    profiled = "deit-micro" if given.quick else graphs.PROFILED
    names = ["deit-micro", "resnet"] if given.quick else graphs.families()
    # what the first stages need comes first, the slowest to translate among it
    names.sort(key=lambda name: (name != profiled, name != "deit-micro", name))
    waiting = [
        _command(name, given, every=name == profiled)
        for name in names
        if not (given.folder / name / "done.json").is_file()
    ]
    if not (given.folder / "package.done").is_file():
        waiting.insert(2, _package(profiled, given.folder, stitches=2 if given.quick else 7))
    running: list[subprocess.Popen[bytes]] = []
    failed = 0
    while waiting or running:
        while waiting and len(running) < max(given.jobs - 2, 1):
            running.append(subprocess.Popen(waiting.pop(0), stdin=subprocess.DEVNULL))
        failed += sum(one.poll() not in (0, None) for one in running)
        running = [one for one in running if one.poll() is None]
        time.sleep(0.2)
    print(f"all done, {failed} failed", flush=True)


def _command(name: str, given: argparse.Namespace, *, every: bool) -> list[str]:
    module = str(Path(__file__).with_name("graphs.py"))
    jobs = "8" if every and not given.quick else "2"
    flags = [flag for flag, on in (("--all", every), ("--quick", given.quick)) if on]
    return [sys.executable, module, name, str(given.folder), "--jobs", jobs, *flags]


def _package(family: str, folder: Path, *, stitches: int) -> list[str]:
    """A family's anchors and some of SN-Net's stitches in one package, fp32, of random weights."""
    return [sys.executable, "-c", _PACKAGE, family, str(folder / "package"), str(stitches)]


_PACKAGE = """
import json, pathlib, subprocess, sys
family, out, count = sys.argv[1:]
zoo = [sys.executable, "-m", "klas_zoo"]
listed = json.loads(subprocess.run(
    [*zoo, "routes", "--family", family, "--selector", "snnet", "--json"], check=True, capture_output=True, text=True
).stdout)
anchors = [one["route"] for one in listed if one["target"] is None]
stitches = [one["route"] for one in listed if one["target"] is not None]
chosen = anchors + [stitches[n * len(stitches) // int(count)] for n in range(int(count))]
done = subprocess.run([*zoo, "export", "--family", family, "--random-weights", "--routes", ",".join(chosen),
                       "--images", "4", "--out", out])
if done.returncode:
    sys.exit(done.returncode)
pathlib.Path(out + ".done").touch()
"""


if __name__ == "__main__":
    main()

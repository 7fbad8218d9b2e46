"""Runs a command on the fake driver: `python tests/fake_cuda [--name N] [--cards N] -- COMMAND...`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fake_cuda import Card, build, environment

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--name", default=Card.name)
parser.add_argument("--memory-mib", type=int, default=Card.memory_mib)
parser.add_argument("--capability", default=Card.capability)
parser.add_argument("--processors", type=int, default=Card.processors)
parser.add_argument("--cards", type=int, default=1)
parser.add_argument("--folder", type=Path, help="Where the driver is compiled. Default: a temporary folder.")
parser.add_argument("command", nargs=argparse.REMAINDER)
options = vars(parser.parse_args())
command = [one for one in options.pop("command") if one != "--"]
folder = build(options.pop("folder") or Path(tempfile.gettempdir()) / f"fake-cuda-{os.getuid()}")
os.execvpe(command[0], command, environment(folder, Card(**options)))

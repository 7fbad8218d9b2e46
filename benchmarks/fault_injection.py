"""What is left of a registry, a build and a reader of files when things go wrong; anybody can run it.

    python benchmarks/fault_injection.py                         # everything, full size
    python benchmarks/fault_injection.py concurrency --scale 0.1

Parts: cached (bits flipped in the build cache), concurrency (many processes register and pick at once), disks
(full, read-only and forbidden ones, clocks that go backwards, two builds at once), fuzzing (a hundred thousand
inputs for everything that reads what others wrote), integrity (bits flipped in packages, picks and tags beside gc,
damaged databases), kills (builds killed at random moments, and resumed), servers (malformed requests to
inference servers).

Prints a table; full-size parts write results/fault_injection-<part>.json. Exit 1 if a figure was missed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import asdict
from pathlib import Path

from faults import Figure, Outcome
from record import write_record
from rich.console import Console
from rich.table import Table

PARTS = sorted(path.stem for path in (Path(__file__).parent / "faults").glob("[a-z]*.py"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="do this share of everything; default 1")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: known are {', '.join(PARTS)}")
    figures: list[Figure] = []
    for part in arguments.parts or PARTS:
        outcome: Outcome = importlib.import_module(f"faults.{part}").run(arguments.scale)
        figures += outcome.figures
        if arguments.scale >= 1:
            write_record(
                f"fault_injection-{part}",
                {"figures": [asdict(one) for one in outcome.figures], **outcome.numbers, "scale": arguments.scale},
            )
    show(figures)
    sys.exit(0 if all(one.kept for one in figures) else 1)


def show(figures: list[Figure]) -> None:
    table = Table("figure", "wanted", "measured", "kept", title="Fault injection")
    for one in figures:
        table.add_row(one.name, one.wanted, one.measured, "yes" if one.kept else "NO")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()

"""Parts of fault_injection.py. Each has `run(scale)`, gives an `Outcome`, and leaves nothing behind.

`scale` 1 is the full size; less does as much less of the same.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent.parent / "tests"
sys.path.insert(0, str(TESTS))  # engines that nobody made, and what is thrown at parsers, are the tests'


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table: what was wanted, what was found, and whether that is good enough."""

    name: str
    wanted: str
    measured: str
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a part found; `numbers` go into the result file."""

    figures: tuple[Figure, ...]
    numbers: dict[str, Any] = field(default_factory=dict)

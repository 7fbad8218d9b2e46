"""For which cards a library has machine code, read from its fat binaries without loading it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # the number, its version, and the size of the header
_PTX = 1


def machine_code(binary: bytes | bytearray | mmap.mmap) -> Iterator[tuple[int, int, int, bool]]:
    """Offset, length, compute capability (90 for 9.0) of every piece of code, and whether it is PTX."""
    start = 0
    while (start := binary.find(_MAGIC, start)) >= 0:
        (size,) = struct.unpack_from("<Q", binary, start + 8)
        at, end = start + 16, start + 16 + size
        if end > len(binary):
            start += 4
            continue
        while at < end:
            kind, _, header, length = struct.unpack_from("<HHIQ", binary, at)
            (capability,) = struct.unpack_from("<I", binary, at + 28)
            yield at + header, length, capability, kind == _PTX
            at += header + length
        start = end


def capabilities(library: Path) -> tuple[str, ...]:
    """Compute capabilities that a library has machine code for, `8.0`; `+` is PTX, which later cards run."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        found = {(capability, ptx) for _, _, capability, ptx in machine_code(binary)}
    return tuple(f"{capability // 10}.{capability % 10}{'+' if ptx else ''}" for capability, ptx in sorted(found))


def runs_on(capability: str, built_for: tuple[str, ...]) -> bool:
    """Whether a card runs code built for others: of its own major version and no newer one, or from PTX."""
    major, minor = map(int, capability.split("."))
    for one in built_for:
        its_major, its_minor = map(int, one.rstrip("+").split("."))
        older = (its_major, its_minor) <= (major, minor)
        if older and (its_major == major or one.endswith("+")):
            return True
    return False

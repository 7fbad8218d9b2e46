"""Software for a machine without a network, in pieces: wheels, and onnxruntime-gpu with the code for one card.

`pack` writes `piece-01` … and `pieces.json` with the length and hash of each; `unpack` checks and joins them. The CUDA
provider of onnxruntime is mostly machine code for cards of six generations. What is not for the wanted compute
capability is overwritten by zeros, which compress to nothing; the file keeps its length, and CUDA takes the code for
its card from where it always was.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

PROVIDER = "libonnxruntime_providers_cuda.so"
# of no use here: the library for C, and providers whose libraries are not on such a machine
_LEFT_OUT = (
    "libonnxruntime.so.", "libonnxruntime_providers_tensorrt.so", "onnxruntime/transformers/", "onnxruntime/tools/",
)  # fmt: skip


def for_capability(binary: bytes, capability: int) -> bytes:
    """A library whose machine code for other compute capabilities is zeros."""
    from klas_zoo.doctor.kernels import machine_code  # not at the top: what is unpacked may be klas-zoo

    found = bytearray(binary)
    pieces = list(machine_code(found))
    if not any(one[2] == capability for one in pieces):
        raise SystemExit(f"This onnxruntime has no kernels for compute capability {capability / 10}.")
    for offset, length, own, _ in pieces:
        if own != capability:
            found[offset : offset + length] = bytes(length)
    return bytes(found)


def pack(wheels: list[Path], folder: Path, *, piece_mb: float, capability: int) -> list[Path]:
    """Everything in wheels as one compressed archive, cut into pieces of at most `piece_mb` (10^6 bytes)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                for info in source.infolist():
                    if info.is_dir() or any(part in info.filename for part in _LEFT_OUT):
                        continue
                    data = source.read(info)
                    if info.filename.endswith(PROVIDER):
                        data = for_capability(data, capability)
                    entry = tarfile.TarInfo(info.filename)
                    entry.size, entry.mode = len(data), 0o755
                    archive.addfile(entry, io.BytesIO(data))
    packed = lzma.compress(raw.getvalue(), preset=4)
    step = int(piece_mb * 1e6)
    parts = [packed[start : start + step] for start in range(0, len(packed), step)]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, part in enumerate(parts, 1):
        written.append(folder / f"piece-{number:02}")
        written[-1].write_bytes(part)
    pieces = [
        {"name": path.name, "bytes": len(part), "sha256": _sha256(part)}
        for path, part in zip(written, parts, strict=True)
    ]
    table = {"wheels": [one.name for one in wheels], "pieces": pieces}
    (folder / "pieces.json").write_text(json.dumps(table, indent=1))
    return written


def unpack(folder: Path, into: Path) -> None:
    """Joins pieces and unpacks them; a piece that is missing or damaged is named."""
    table = json.loads((folder / "pieces.json").read_text())
    parts = []
    for one in table["pieces"]:
        path = folder / one["name"]
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != one["bytes"] or _sha256(data) != one["sha256"]:
            state = "damaged" if data else "missing"
            raise SystemExit(f"{path} is {state}: it has {one['bytes']} bytes, sha256 {one['sha256']}.")
        parts.append(data)
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(b"".join(parts)))) as archive:
        archive.extractall(into, filter="data")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

"""What is thrown at everything that reads what others wrote: nearly right files, and noise.

A target takes one input; it may raise one of our errors, and nothing else. The tests throw a few
inputs at each, benchmarks/fault_injection.py a hundred thousand.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made_up
import profiles_made_up
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from klas_zoo.errors import KlasZooError
from klas_zoo.exporters.manifest import read_manifest
from klas_zoo.exporters.package import Package
from klas_zoo.families.specs import read_family
from klas_zoo.files import sha256_of
from klas_zoo.profiles import files as profile_files
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import move_tag
from klas_zoo.sharing.index import index_of, read_index
from klas_zoo.units import parse_latency_ms, parse_size_bytes

LONGEST_S = 10
FAMILY = """
name = "mine"
input_shape = [3, 16, 16]
num_classes = 4
preset = "quick"
description = "two networks"

[[anchors]]
name = "tiny"
model = "deit_tiny_patch16_224"
arguments = { img_size = 16, patch_size = 8, embed_dim = 12, depth = 3, num_heads = 2 }

[[anchors]]
name = "small"
model = "deit_small_patch16_224"
checkpoint = "small.safetensors"
"""
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e-320, 1e308, float("inf"),
    float("nan"), "", " ", "x", "../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "é", "𝕏" * 50, "\ud800", "x" * 5_000,
    "0" * 64, "1e999", [], [[]], [None] * 3, {}, {"x": {}}, [0, 0, 0], [10**9] * 3, ["x", 1, 2], [["x", 2, 1]],
]  # fmt: skip


class Hang(BaseException):
    """An input took `LONGEST_S` of the processor's time; no parser's `except Exception` catches it."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that reads what others wrote.

    Attributes:
        inputs: what may come.
        read: takes one input.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]


def throw(target: Target, inputs: int, start: int = 0) -> int:
    """Throws at least so many inputs at a target; how many it were.

    Raises:
        Exception: what a target raised that is no error of ours; hypothesis shows the input.
        Hang: it did not end.
    """
    thrown = 0
    while thrown < inputs:
        before = thrown

        @seed(start)
        @settings(
            max_examples=inputs - thrown,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def one(value: Any) -> None:
            nonlocal thrown
            thrown += 1
            with _at_most(LONGEST_S), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _ours(lambda: target.read(value))

        one()
        start += 1
        if thrown == before:
            raise RuntimeError(f"{target.name} has no inputs")
    return thrown


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang(f"an input took more than {seconds} s of the processor")

    # of the processor's time: a busy machine makes everything take long
    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


# inputs


def altered(value: Any) -> st.SearchStrategy[Any]:
    """JSON that was right, with up to three places of it replaced, taken out, or doubled."""
    count = sum(1 for _ in _places(value))

    @st.composite
    def strategy(draw: st.DrawFn) -> Any:
        found = copy.deepcopy(value)
        for _ in range(draw(st.integers(0, 3))):
            places = list(_places(found))
            holder, key = places[draw(st.integers(0, count)) % len(places)] if places else (None, None)
            if holder is None:
                return draw(st.sampled_from(ODD))
            how = draw(st.sampled_from(["replace", "replace", "drop", "double"]))
            if how == "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            elif how == "drop":
                del holder[key]
            elif isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            else:
                holder[f"{key}x"] = copy.deepcopy(holder[key])
        return found

    return strategy()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that were right: some of them flipped, cut out, put in or doubled; or noise."""
    if not content:
        return st.binary(max_size=200)
    places = st.integers(0, len(content) - 1)

    @st.composite
    def strategy(draw: st.DrawFn) -> bytes:
        found = bytearray(content)
        for _ in range(draw(st.integers(0, 4))):
            at = draw(places) % max(1, len(found))
            how = draw(st.sampled_from(["flip", "set", "cut", "end", "insert", "double"]))
            if how == "flip" and found:
                found[at] ^= 1 << draw(st.integers(0, 7))
            elif how == "set" and found:
                found[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5B, 0x7B]))
            elif how == "cut":
                del found[at : at + draw(st.integers(1, 64))]
            elif how == "end":
                del found[at:]
            elif how == "insert":
                found[at:at] = draw(st.binary(max_size=16))
            else:
                found[at:at] = found[at : at + 64]
        return bytes(found)

    return st.one_of(strategy(), strategy(), strategy(), st.binary(max_size=300))


_NUMBERS = st.text("0123456789.,eE+-_ \tinfaNxµμunmskKMGiBb٣²", max_size=20)
_TEXTS = st.one_of(_NUMBERS, st.text(max_size=80), st.sampled_from([x for x in ODD if isinstance(x, str)]))


# targets


def build(name: str, folder: Path, package: Path) -> Target:
    """A target; what it needs is written into `folder`, and `package` is a whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    _, factory = TARGETS[name]
    inputs, read = factory(folder, package)
    return Target(name=name, inputs=inputs, read=read)


def counts(inputs: int) -> Mapping[str, int]:
    """How many inputs each target gets, so that together there are at least so many."""
    whole = sum(share for share, _ in TARGETS.values())
    return {name: max(1, math.ceil(inputs * share / whole)) for name, (share, _) in TARGETS.items()}


Made = tuple[st.SearchStrategy[Any], Callable[[Any], object]]


def _through(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Reads what is first written to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return write_and_read


def _budgets(folder: Path, package: Path) -> Made:
    path = folder / "engine"
    path.write_bytes(b"engine")
    engines = [made_up.engine(path, name, 70.0 + i, 1.0 + i) for i, name in enumerate(("tiny", "small", "base"))]
    registry = made_up.FixedRegistry(folder, held=tuple(engines))

    def read(texts: tuple[str, str, str]) -> None:
        latency, size, name = texts
        for attempt in (
            lambda: parse_latency_ms(latency),
            lambda: parse_size_bytes(size),
            lambda: pick(latency, max_size=size, registry=registry),
            lambda: pick("5ms", family=name, device=size, percentile=latency, registry=registry),
        ):
            _ours(attempt)

    return st.tuples(_TEXTS, _TEXTS, _TEXTS), read


def _tags(folder: Path, package: Path) -> Made:
    registry = made_up.filled_registry(folder / "tags")

    def read(name: str) -> None:
        _ours(lambda: move_tag(registry, name))
        registry.engines(name)

    return _TEXTS, read


def _families(folder: Path, package: Path) -> Made:
    lines = FAMILY.strip().splitlines()
    values = [json.dumps(x) for x in ODD if x is not None] + ["2026-01-01", "0x10", "'", '"""', "{"]

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        found = list(lines)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(lines) - 1)) % len(found)
            how = draw(st.sampled_from(["value", "value", "double", "drop", "table"]))
            value = f"{found[at].partition('=')[0]}= {draw(st.sampled_from(values))}"
            changed = {"value": value, "double": f"{found[at]}\n{found[at]}", "drop": "", "table": "[[anchors]]"}
            found[at] = changed[how]
        return "\n".join(found).encode("utf-8", "surrogatepass")

    inputs = st.one_of(edited(), edited(), damaged(FAMILY.encode()), st.text(max_size=200).map(str.encode))
    return inputs, _through(folder / "family.toml", read_family)


def _profiles(folder: Path, package: Path) -> Made:
    valid = profile_files.to_json(profiles_made_up.profile())
    texts = st.one_of(
        altered(valid).map(json.dumps),
        altered({"schema_version": 1, "profiles": [valid, valid]}).map(json.dumps),
        damaged(json.dumps(valid).encode()).map(lambda content: content.decode(errors="replace")),
    )
    return texts, lambda text: profile_files.from_text(text, "there")


def _manifests(folder: Path, package: Path) -> Made:
    valid = json.loads((package / "manifest.json").read_text())
    return altered(valid), lambda table: read_manifest(table, "there")


def _packages(folder: Path, package: Path) -> Made:
    """Packages with one file damaged; half of them with a manifest that was made to agree."""
    kept = {path.name: path.read_bytes() for path in package.iterdir()}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    files = st.sampled_from(sorted(kept)).flatmap(lambda name: st.tuples(st.just(name), damaged(kept[name])))

    def read(value: tuple[tuple[str, bytes], bool]) -> None:
        (name, content), agrees = value
        try:
            (folder / name).write_bytes(content)
            if agrees and name != "manifest.json":
                manifest = json.loads(kept["manifest.json"])
                manifest["files"][name] = {"size_bytes": len(content), "sha256": sha256_of(folder / name)}
                (folder / "manifest.json").write_text(json.dumps(manifest))
            Package.open(folder).references()
        finally:
            for restored in {name, "manifest.json"}:
                (folder / restored).write_bytes(kept[restored])

    return st.tuples(files, st.booleans()), read


def _safetensors(folder: Path, package: Path) -> Made:
    import torch
    from safetensors.torch import save_file

    from klas_zoo.families.anchors import read_state_dict

    path = folder / "weights.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int64)}, path, metadata={"x": "y"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    def whole(table: Any) -> bytes:
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text + body

    lengths = st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**40, 2**63, 2**64 - 1])
    inputs = st.one_of(
        altered(header).map(whole),
        altered(header).map(whole),
        damaged(content),
        lengths.map(lambda wrong: wrong.to_bytes(8, "little") + content[8:]),
    )
    return inputs, _through(path, read_state_dict)


def _checkpoints(folder: Path, package: Path) -> Made:
    import torch

    from klas_zoo.families.anchors import read_state_dict

    path = folder / "weights.pth"
    torch.save({"model": {"a": torch.zeros(2, 3)}}, path)
    return damaged(path.read_bytes()), _through(path, read_state_dict)


def _indexes(folder: Path, package: Path) -> Made:
    valid = json.loads(index_of(package, [path.name for path in package.iterdir()]).to_bytes())
    inputs = st.one_of(
        altered(valid).map(lambda table: json.dumps(table).encode()), damaged(json.dumps(valid).encode())
    )
    return inputs, lambda content: read_index(content, "there")


def _registries(folder: Path, package: Path) -> Made:
    registry = made_up.filled_registry(folder / "registry")
    move_tag(registry, "deit-micro@prod")
    file = registry.root / "registry.sqlite"

    def read(content: bytes) -> None:
        for beside in registry.root.glob("registry.sqlite-*"):
            beside.unlink()
        file.write_bytes(content)
        opened = Registry.open(registry.root, create=False)
        for attempt in (
            lambda: opened.engines("deit-micro@prod"),
            lambda: pick("5ms", registry=opened),
            lambda: check(opened),
        ):
            _ours(attempt)

    return damaged(file.read_bytes()), read


def _ours(attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except KlasZooError as error:
        assert str(error), "an error without a word"


TARGETS: dict[str, tuple[float, Callable[[Path, Path], Made]]] = {
    "budgets": (0.20, _budgets),
    "families": (0.15, _families),
    "profiles": (0.15, _profiles),
    "manifests": (0.13, _manifests),
    "safetensors": (0.15, _safetensors),
    "checkpoints": (0.02, _checkpoints),
    "packages": (0.05, _packages),
    "indexes": (0.10, _indexes),
    "registries": (0.03, _registries),
    "tags": (0.02, _tags),
}
"""Everything that reads what others wrote, by its name: its share of all inputs, and how it is made."""

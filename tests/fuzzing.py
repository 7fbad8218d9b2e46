"""What is thrown at everything that reads what others wrote: nearly right files, and noise.

A target takes one input; it may raise one of our errors, and nothing else. The tests throw a few
inputs at each, benchmarks/fault_injection.py a hundred thousand.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import made_up
import numpy as np
import packages
import profiles_made_up
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from klas_zoo.errors import KlasZooError
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import CASCADES, parse_cascades
from klas_zoo.families.specs import read_family
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
        right: an input that is not altered, and is read.
        inputs: what may come.
        read: takes one input.
    """

    name: str
    right: Any
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
    """A target; what it needs is written into `folder`, a copy of the whole `package` among it."""
    own = Path(shutil.copytree(package, folder / "package"))
    _, factory = TARGETS[name]
    right, inputs, read = factory(folder, own)
    return Target(name=name, right=right, inputs=inputs, read=read)


def counts(inputs: int) -> Mapping[str, int]:
    """How many inputs each target gets, so that together there are at least so many."""
    whole = sum(share for share, _ in TARGETS.values())
    return {name: max(1, math.ceil(inputs * share / whole)) for name, (share, _) in TARGETS.items()}


Made = tuple[Any, st.SearchStrategy[Any], Callable[[Any], object]]


def _through(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Reads what is first written to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return write_and_read


def _budgets(folder: Path, package: Path) -> Made:
    registry = made_up.filled_registry(folder)

    def read(texts: tuple[str, str, str]) -> None:
        latency, size, name = texts
        _each(
            lambda: parse_latency_ms(latency),
            lambda: parse_size_bytes(size),
            lambda: pick(latency, max_size=size, registry=registry),
            lambda: pick("5ms", family=name, device=size, percentile=latency, registry=registry),
            lambda: pick("5ms", hardware=name, registry=registry),
            lambda: pick("5ms", device=name, registry=registry),
        )

    return ("5ms", "1GB", "cpu"), st.tuples(_TEXTS, _TEXTS, _TEXTS), read


def _tags(folder: Path, package: Path) -> Made:
    registry = made_up.filled_registry(folder / "tags")

    def read(name: str) -> None:
        _each(lambda: move_tag(registry, name), lambda: registry.engines(name))

    return "deit-micro@prod", _TEXTS, read


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
    return FAMILY.encode(), inputs, _through(folder / "family.toml", read_family)


def _profiles(folder: Path, package: Path) -> Made:
    valid = profile_files.to_json(profiles_made_up.profile())
    texts = st.one_of(
        altered(valid).map(json.dumps),
        altered({"schema_version": 1, "profiles": [valid, valid]}).map(json.dumps),
        damaged(json.dumps(valid).encode()).map(lambda content: content.decode(errors="replace")),
    )
    return json.dumps(valid), texts, lambda text: profile_files.from_text(text, "there")


def _manifests(folder: Path, package: Path) -> Made:
    valid = json.loads((package / "manifest.json").read_text())
    return valid, altered(valid), lambda table: read_manifest(table, "there")


def _cascades(folder: Path, package: Path) -> Made:
    packages.carry_cascade(Package.open(package))
    written = (package / CASCADES).read_bytes()
    inputs = st.one_of(altered(json.loads(written)).map(lambda table: json.dumps(table).encode()), damaged(written))
    return written, inputs, lambda content: parse_cascades(content, "there")


def _packages(folder: Path, package: Path) -> Made:
    """Packages with one file damaged; half of them with a manifest that was made to agree."""
    kept = {path.name: path.read_bytes() for path in package.iterdir()}
    files = st.sampled_from(sorted(kept)).flatmap(lambda name: st.tuples(st.just(name), damaged(kept[name])))

    def read(value: tuple[tuple[str, bytes], bool]) -> None:
        (name, content), agrees = value
        with _restored(package, kept, name):
            (package / name).write_bytes(content)
            if agrees and name != "manifest.json":
                packages.rehash(package, name)
            Package.open(package).references()

    return (("weights.bin", kept["weights.bin"]), True), st.tuples(files, st.booleans()), read


def _engines(folder: Path, package: Path) -> Made:
    """Packages whose hashes were all made to agree, verified and run."""
    from klas_zoo.exporters.checking import verify_package
    from klas_zoo.runtime import ElasticSession

    kept = {path.name: path.read_bytes() for path in package.iterdir()}
    manifest = json.loads(kept["manifest.json"])
    # weights are numbers, of which all are right
    names = sorted(name for name in kept if name.endswith((".onnx", ".safetensors")))
    files = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(kept[name])))

    def read(value: tuple[str, Any]) -> None:
        name, content = value
        with _restored(package, kept, name):
            if name == "manifest.json":
                packages.edit(package, lambda table: (table.clear(), table.update(content)))
            else:
                (package / name).write_bytes(content)
                packages.rehash(package, name)
            _each(lambda: verify_package(package, threads=1), answer)

    def answer() -> None:
        session = ElasticSession(package, threads=1)
        images = np.zeros((1, *session.package.manifest.family.input_shape), np.float32)
        runs = [lambda name=one.name: session.run(images, route=name) for one in session.routes]
        _each(*runs, lambda: session.run(images, latency_ms=5), lambda: session.controller(5))

    right = ("manifest.json", manifest)
    return right, st.one_of(st.tuples(st.just("manifest.json"), altered_table(manifest)), files), read


@contextmanager
def _restored(package: Path, kept: dict[str, bytes], name: str) -> Iterator[None]:
    """Undoes what was done to a file of a package, and to its manifest."""
    try:
        yield
    finally:
        for one in {name, "manifest.json"}:
            (package / one).write_bytes(kept[one])


def altered_table(value: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return altered(value).filter(lambda found: isinstance(found, dict) and all(isinstance(key, str) for key in found))


def _profile_imports(folder: Path, package: Path) -> Made:
    from klas_zoo.costs import exchange
    from klas_zoo.families.specs import builtin_families

    counted = exchange._counted(builtin_families()["deit-micro"])
    valid = profile_files.to_json(
        profiles_made_up.profile(family="deit-micro", family_sha256=counted.sha256, device="loom", hardware="a loom")
    )
    written = json.dumps(valid).encode()
    inputs = st.one_of(altered(valid).map(lambda table: json.dumps(table).encode()), damaged(written))

    def read(content: bytes) -> None:
        (folder / "profile.json").write_bytes(content)
        with mock.patch.object(exchange, "_counted", lambda spec: counted):  # takes seconds, and reads nothing of it
            exchange.import_file(folder / "registry", folder / "profile.json")

    return written, inputs, read


def _images(folder: Path, package: Path) -> Made:
    """CIFAR-10's pickles, of which none but the original ones is read, and arrays."""
    import pickle

    from klas_zoo.data import cifar10
    from klas_zoo.data.arrays import open_arrays

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), np.arange(4)
    for name in ("train", "test"):
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    batch = pickle.dumps({"data": images.reshape(4, -1), "labels": labels.tolist()}, protocol=2)
    arrays = (folder / "train.npz").read_bytes()

    def read(value: tuple[str, bytes]) -> None:
        name, content = value
        (folder / name).write_bytes(content)
        if name == "train.npz":
            open_arrays(folder)
        else:
            cifar10.read(folder, train=True)

    files = {"train.npz": arrays, "data_batch_1": batch}
    inputs = st.one_of(*(st.tuples(st.just(name), damaged(content)) for name, content in files.items()))
    return ("train.npz", arrays), inputs, read


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
    return content, inputs, _through(path, read_state_dict)


def _checkpoints(folder: Path, package: Path) -> Made:
    import torch

    from klas_zoo.families.anchors import read_state_dict

    path = folder / "weights.pth"
    torch.save({"model": {"a": torch.zeros(2, 3)}}, path)
    content = path.read_bytes()
    return content, damaged(content), _through(path, read_state_dict)


def _indexes(folder: Path, package: Path) -> Made:
    valid = json.loads(index_of(package, [path.name for path in package.iterdir()]).to_bytes())
    written = json.dumps(valid).encode()
    inputs = st.one_of(altered(valid).map(lambda table: json.dumps(table).encode()), damaged(written))
    return written, inputs, lambda content: read_index(content, "there")


def _registries(folder: Path, package: Path) -> Made:
    registry = made_up.filled_registry(folder / "registry")
    move_tag(registry, "deit-micro@prod")
    file = registry.root / "registry.sqlite"

    def read(content: bytes) -> None:
        for beside in registry.root.glob("registry.sqlite-*"):
            beside.unlink()
        file.write_bytes(content)
        opened = Registry.open(registry.root, create=False)
        _each(lambda: opened.engines("deit-micro@prod"), lambda: pick("5ms", registry=opened), lambda: check(opened))

    content = file.read_bytes()
    return content, damaged(content), read


def _ours(attempt: Callable[[], object]) -> KlasZooError | None:
    """Our error that an attempt ended with, if it did."""
    try:
        attempt()
    except KlasZooError as error:
        assert str(error), "an error without a word"
        return error
    return None


def _each(*attempts: Callable[[], object]) -> None:
    """Makes all attempts, and raises our error of the last one where none succeeded."""
    errors = [_ours(attempt) for attempt in attempts]
    if errors and all(errors):
        raise errors[-1]  # type: ignore[misc]


TARGETS: dict[str, tuple[float, Callable[[Path, Path], Made]]] = {
    "budgets": (0.15, _budgets),
    "families": (0.15, _families),
    "profiles": (0.15, _profiles),
    "manifests": (0.13, _manifests),
    "cascades": (0.05, _cascades),
    "safetensors": (0.15, _safetensors),
    "checkpoints": (0.02, _checkpoints),
    "packages": (0.05, _packages),
    "indexes": (0.10, _indexes),
    "registries": (0.03, _registries),
    "tags": (0.02, _tags),
    "verified packages": (0.01, _engines),
    "profile imports": (0.01, _profile_imports),
    "images": (0.03, _images),
}
"""Everything that reads what others wrote, by its name: its share of all inputs, and how it is made."""

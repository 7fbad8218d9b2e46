"""What a build caches is what it uses: damaged results are made again, and what is registered follows results."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_job import SETTINGS, Enough
from toy_family import write_family
from toys import write_images

from klas_zoo.building import packaging, registry_stages
from klas_zoo.building.cache import NOTE
from klas_zoo.building.job import build, plan
from klas_zoo.data.loading import Data, load_data
from klas_zoo.errors import ExportError, RegistryError
from klas_zoo.exporters.contract import Verdict
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import read_family
from klas_zoo.files import sealed, unsealed
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.progress.listeners import Advance, NullListener
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.upkeep import collect

Registered = dict[tuple[str, str], tuple[str, float]]


class Listener(NullListener):
    """Remembers what was said, and ends a build before the stage `last`."""

    def __init__(self, last: str = "") -> None:
        self.last, self.said = last, list[str]()

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        if name == self.last:
            raise Enough
        return super().stage(name, total, unit)

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def run(family: Family, data: Data, root: Path, listener: Listener | None = None, **options: Any) -> Listener:
    listener = listener or Listener()
    registry = Registry.open(root, create=True)
    build(family, data, SETTINGS, device=resolve_device("cpu"), registry=registry, listener=listener, **options)
    return listener


def statuses(family: Family, data: Data, root: Path) -> dict[str, str]:
    registry = Registry.open(root, create=True)
    found = plan(family, data, SETTINGS, device=resolve_device("cpu"), registry=registry, listener=NullListener())
    return {one.name: one.status for one in found}


def registered(root: Path) -> Registered:
    engines = Registry.open(root, create=False).engines()
    return {(str(one.route), one.precision): (one.sha256, one.top1) for one in engines}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The smallest that has a stitch: what is exported is what takes time."""
    file = write_family(tmp_path_factory.mktemp("family"), depth=2)
    return load_family(read_family(file), random_weights=True, seed=5)


@pytest.fixture(scope="module")
def data(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("images")
    for part, count in (("train", 16), ("val", 4)):
        write_images(folder / part, ("ant", "bee", "cat"), count)
    return load_data(folder, sample=None, num_classes=family.num_classes, data_config=family.data_config)


@pytest.fixture(scope="module")
def stopped(family: Family, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose build ended just before it was registered; tests copy it."""
    root = tmp_path_factory.mktemp("builds") / "stopped"
    with pytest.raises(Enough):
        run(family, data, root, Listener("register"))
    return root


@pytest.fixture
def built(stopped: Path, family: Family, data: Data, tmp_path: Path) -> Path:
    """The same build, registered here: what it registers and what it caches are links to the same files."""
    root = Path(shutil.copytree(stopped, tmp_path / "built"))
    run(family, data, root)
    return root


@pytest.mark.slow
def test_no_damaged_file_of_the_cache_gets_into_the_registry(
    stopped: Path, built: Path, family: Family, data: Data, tmp_path: Path
) -> None:
    """One bit of a file of each kind; benchmarks/fault_injection.py flips bits all over."""
    root, wanted = stopped, registered(built)
    assert len(wanted) >= 2
    found = [path for path in sorted((root / "cache").glob("*/*/**/*")) if path.is_file() and path.suffix != ".lock"]
    files = list({(path.parts[-3], path.suffix): path for path in found if path.name != NOTE}.values())
    files += [path for path in found if path.name == NOTE and path.parts[-3] == "export-and-verify"]
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".onnx", ".bin"} <= kinds
    exported = False
    for number, file in enumerate(files):
        damaged = Path(shutil.copytree(root, tmp_path / str(number)))
        inside = file.relative_to(root)
        flip(damaged / inside)
        if exported and inside.parts[1] == "export-and-verify":  # what comes of making it again is known
            stopped_there = Listener("export and verify")
            with pytest.raises(Enough):
                run(family, data, damaged, stopped_there)
            said = stopped_there.said
            assert not registered(damaged), inside
        else:
            exported |= inside.parts[1] == "export-and-verify"
            said = run(family, data, damaged).said
            assert registered(damaged) == wanted, inside
        if file.name != NOTE:
            stage, name = inside.parts[1].replace("-", " "), "/".join(inside.parts[3:])
            assert f"The cached result of '{stage}' is damaged ({name}): it is made again." in said
        shutil.rmtree(damaged)


def test_a_package_that_changes_between_its_verification_and_its_registration_is_refused(
    stopped: Path, family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(stopped, tmp_path / "r"))
    linked = registry_stages._link

    def damaging(source: Path, target: Path) -> None:
        if source.suffix == ".onnx":
            flip(source)
        linked(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(registry_stages, "_link", damaging)
        with pytest.raises(RegistryError, match=r"\.onnx changed after its package was written"):
            run(family, data, root)
    assert not registered(root)
    for manifest in root.glob("cache/export-and-verify/*/*/manifest.json"):
        table = unsealed(manifest.read_bytes())
        assert table is not None
        table["routes"][0]["verification"]["tolerance"] *= 2
        manifest.write_text(sealed(table))  # as whoever wrote another manifest would, not as a disk that fails
    with monkeypatch.context() as patch:
        patch.setattr("klas_zoo.building.cache.Cache.damage", lambda *_: None)  # it changes later than that
        with pytest.raises(ExportError, match=r"^The package .* was changed after it was verified: run the build"):
            run(family, data, root)
    assert not registered(root)


def test_what_is_measured_anew_is_registered_anew(built: Path, family: Family, data: Data) -> None:
    def times() -> list[str]:
        engines = Registry.open(built, create=False).engines()
        return [latency.measured_at for one in engines for latency in one.latencies]

    def shown() -> list[str]:
        (file,) = (built / "cache" / "latency").glob("*/routes.json")
        routes = json.loads(file.read_text())["routes"]
        return [latency["measured_at"] for one in routes for e in one["engines"] for latency in e["latencies"]]

    before, engines = times(), registered(built)
    run(family, data, built)
    assert times() == before
    while datetime.now(UTC).isoformat(timespec="seconds") <= max(before):
        time.sleep(0.05)  # times are written to the second
    run(family, data, built, redo="latency")
    assert sorted(times()) == sorted(shown()) != sorted(before)
    assert registered(built) == engines
    # the cache depends on nothing of the build before
    registry = Registry.open(built, create=False)
    assert collect(registry, old_builds=True)
    assert set(statuses(family, data, built).values()) == {"cached"}
    assert not check(registry)


def test_an_engine_that_is_refused_when_it_is_exported_again_is_registered_no_longer(
    built: Path, family: Family, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = registered(built)
    verdicts = packaging._verdicts

    def refusing(*arguments: Any) -> list[Verdict]:
        first, *others = verdicts(*arguments)
        return [replace(first, status="refused", verification=None, reason="some logits are not finite"), *others]

    monkeypatch.setattr(packaging, "_verdicts", refusing)
    run(family, data, built, redo="export and verify")
    assert 0 < len(registered(built)) < len(before)


def test_damage_of_what_is_registered_is_mended_by_the_same_command(built: Path, family: Family, data: Data) -> None:
    wanted = registered(built)
    files = [next((built / "packages").glob(f"*/*{suffix}")) for suffix in (".onnx", ".bin")]
    for file in files:
        flip(file)
        assert check(Registry.open(built, create=False)), file
        assert "cached" not in statuses(family, data, built)["export and verify"], file
        flip(file)
    for file in files:
        flip(file)
    run(family, data, built)
    registry = Registry.open(built, create=False)
    assert registered(built) == wanted
    assert not [one for one in check(registry) if not one.harmless]
    assert set(statuses(family, data, built).values()) == {"cached"}

"""What a build caches is what it uses: damaged results are made again, and what is registered follows results."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_job import SETTINGS, Enough
from toys import write_images

from klas_zoo.building import packaging, registry_stages
from klas_zoo.building.cache import NOTE
from klas_zoo.building.job import build, plan
from klas_zoo.data.loading import Data, load_data
from klas_zoo.errors import ExportError, RegistryError
from klas_zoo.exporters.contract import Verdict
from klas_zoo.families.anchors import Family
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


@pytest.fixture
def data(tiny_family: Family, tmp_path: Path) -> Data:
    for part, count in (("train", 16), ("val", 4)):
        write_images(tmp_path / "images" / part, ("ant", "bee", "cat", "dog"), count)
    return load_data(
        tmp_path / "images", sample=None, num_classes=tiny_family.num_classes, data_config=tiny_family.data_config
    )


@pytest.fixture
def unregistered(tiny_family: Family, data: Data, tmp_path: Path) -> tuple[Path, Registered]:
    """A registry whose build ended just before it was registered, and what it would have registered."""
    with pytest.raises(Enough):
        run(tiny_family, data, tmp_path / "stopped", Listener("register"))
    shutil.copytree(tmp_path / "stopped", tmp_path / "whole")
    run(tiny_family, data, tmp_path / "whole")
    return tmp_path / "stopped", registered(tmp_path / "whole")


@pytest.mark.slow
def test_no_damaged_file_of_the_cache_gets_into_the_registry(
    unregistered: tuple[Path, Registered], tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    """One bit of a file of each kind; benchmarks/fault_injection.py flips bits all over."""
    root, wanted = unregistered
    found = [path for path in sorted((root / "cache").glob("*/*/**/*")) if path.is_file() and path.suffix != ".lock"]
    files = list({(path.parts[-3], path.suffix): path for path in found if path.name != NOTE}.values())
    files += [path for path in found if path.name == NOTE and path.parts[-3] == "export-and-verify"]
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".onnx", ".bin"} <= kinds
    for number, file in enumerate(files):
        damaged = Path(shutil.copytree(root, tmp_path / str(number)))
        inside = file.relative_to(root)
        flip(damaged / inside)
        said = run(tiny_family, data, damaged).said
        assert registered(damaged) == wanted, inside
        if file.name != NOTE:
            stage, name = inside.parts[1].replace("-", " "), "/".join(inside.parts[3:])
            assert f"The cached result of '{stage}' is damaged ({name}): it is made again." in said
        shutil.rmtree(damaged)


def test_a_package_that_changes_between_its_verification_and_its_registration_is_refused(
    tiny_family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = registry_stages._link

    def damaging(source: Path, target: Path) -> None:
        if source.suffix == ".onnx":
            flip(source)
        linked(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(registry_stages, "_link", damaging)
        with pytest.raises(RegistryError, match=r"\.onnx changed after its package was written"):
            run(tiny_family, data, tmp_path / "r")
    assert not registered(tmp_path / "r")
    for manifest in (tmp_path / "r").glob("cache/export-and-verify/*/*/manifest.json"):
        table = unsealed(manifest.read_bytes())
        assert table is not None
        table["routes"][0]["verification"]["tolerance"] *= 2
        manifest.write_text(sealed(table))  # as whoever wrote another manifest would, not as a disk that fails
    with monkeypatch.context() as patch:
        patch.setattr("klas_zoo.building.cache.Cache.damage", lambda *_: None)  # it changes later than that
        with pytest.raises(ExportError, match=r"^The package .* was changed after it was verified: run the build"):
            run(tiny_family, data, tmp_path / "r")
    assert not registered(tmp_path / "r")


def test_what_is_measured_anew_is_registered_anew(tiny_family: Family, data: Data, tmp_path: Path) -> None:
    def times() -> list[str]:
        engines = Registry.open(tmp_path, create=False).engines()
        return [latency.measured_at for one in engines for latency in one.latencies]

    def shown() -> list[str]:
        (file,) = (tmp_path / "cache" / "latency").glob("*/routes.json")
        routes = json.loads(file.read_text())["routes"]
        return [latency["measured_at"] for one in routes for e in one["engines"] for latency in e["latencies"]]

    run(tiny_family, data, tmp_path)
    before, engines = times(), registered(tmp_path)
    run(tiny_family, data, tmp_path)
    assert times() == before
    run(tiny_family, data, tmp_path, redo="latency")
    assert sorted(times()) == sorted(shown()) != sorted(before)
    assert registered(tmp_path) == engines
    # the cache depends on nothing of the build before
    registry = Registry.open(tmp_path, create=False)
    assert collect(registry, old_builds=True)
    assert set(statuses(tiny_family, data, tmp_path).values()) == {"cached"}
    assert not check(registry)


def test_an_engine_that_is_refused_when_it_is_exported_again_is_registered_no_longer(
    tiny_family: Family, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_family, data, tmp_path)
    before = registered(tmp_path)
    verdicts = packaging._verdicts

    def refusing(*arguments: Any) -> list[Verdict]:
        first, *others = verdicts(*arguments)
        return [replace(first, status="refused", verification=None, reason="some logits are not finite"), *others]

    monkeypatch.setattr(packaging, "_verdicts", refusing)
    run(tiny_family, data, tmp_path, redo="export and verify")
    assert 0 < len(registered(tmp_path)) < len(before)


def test_damage_of_what_is_registered_is_mended_by_the_same_command(
    tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    run(tiny_family, data, tmp_path)
    wanted = registered(tmp_path)
    for suffix in (".onnx", ".bin"):
        flip(next((tmp_path / "packages").glob(f"*/*{suffix}")))
        assert check(Registry.open(tmp_path, create=False))
        run(tiny_family, data, tmp_path)
        registry = Registry.open(tmp_path, create=False)
        assert registered(tmp_path) == wanted
        assert not [one for one in check(registry) if not one.harmless]
        assert set(statuses(tiny_family, data, tmp_path).values()) == {"cached"}

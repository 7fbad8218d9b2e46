"""Removing builds, and deleting what nobody refers to and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import made_up
import pytest

from klas_zoo.errors import RegistryError, UnknownName, UsageError
from klas_zoo.registry import Registry, upkeep
from klas_zoo.registry.store import check_file, supernet_path
from klas_zoo.registry.tags import move_tag


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


def build(registry: Registry, *names: str, device: str = "cpu") -> int:
    work = registry.root.parent
    engines = [made_up.new_engine(work / name, name, device=device) for name in names]
    return registry.register(made_up.build(device=device), engines)


def stored(registry: Registry) -> list[str]:
    return sorted(path.read_text() for path in (registry.root / "engines").rglob("*") if path.is_file())


def test_builds_are_listed_with_their_tags_and_sizes_the_newest_first(registry: Registry) -> None:
    build(registry, "a", "bb")
    move_tag(registry, "deit-micro@prod")
    move_tag(registry, "deit-micro@best")
    build(registry, "ccc")
    new, old = upkeep.builds(registry)
    assert (old.number, old.current, old.tags) == (1, False, ("deit-micro@best", "deit-micro@prod"))
    assert (old.engines, old.size_bytes) == (2, 3)
    assert (new.number, new.current, new.tags, new.engines, new.size_bytes) == (2, True, (), 1, 3)


def test_a_removed_build_is_gone_from_picks_and_its_files_go_with_gc(registry: Registry) -> None:
    build(registry, "a", "shared")
    build(registry, "b", "shared")
    (removed,) = upkeep.remove(registry, "1")
    assert (removed.number, removed.engines) == (1, 2)
    assert stored(registry) == ["a", "b", "shared"]
    _, garbage = upkeep.collect(registry)
    assert [one.size_bytes for one in garbage] == [1]
    assert stored(registry) == ["b", "shared"]
    for engine in registry.engines():
        check_file(engine, content=True)
    assert registry.build(1) == made_up.build()
    assert [one.removed_at is None for one in upkeep.builds(registry)] == [True, False]


def test_removing_a_family_removes_all_of_its_builds_or_those_of_one_device(registry: Registry) -> None:
    for device in ("cpu", "a100", "cpu"):
        build(registry, "x", device=device)
    assert [one.number for one in upkeep.remove(registry, "deit-micro", device="cpu")] == [3, 1]
    assert {engine.device for engine in registry.engines()} == {"a100"}
    assert [one.number for one in upkeep.remove(registry, "deit-micro")] == [2]
    assert registry.engines() == []


def test_a_build_that_a_tag_points_to_is_not_removed(registry: Registry) -> None:
    build(registry, "a")
    move_tag(registry, "deit-micro@prod")
    build(registry, "b")
    with pytest.raises(UsageError, match=r"Build 1 is deit-micro@prod on cpu: move that tag or delete it"):
        upkeep.remove(registry, "deit-micro")
    assert len(upkeep.builds(registry)) == 2
    assert all(one.removed_at is None for one in upkeep.builds(registry))
    move_tag(registry, "deit-micro@prod")
    assert [one.number for one in upkeep.remove(registry, "1")] == [1]


@pytest.mark.parametrize(
    ("target", "device", "says"),
    [
        ("7", None, "There is no build 7: klas-zoo registry builds shows those there are"),
        ("9" * 40, None, "There is no build 9{18}:"),
        ("deit-mikro", None, "did you mean deit-micro"),
        ("", None, "Unknown family ''"),
        ("1", "a100", "Unknown device 'a100': known: cpu"),
    ],
)
def test_what_cannot_be_removed_is_said(registry: Registry, target: str, device: str | None, says: str) -> None:
    build(registry, "a")
    with pytest.raises((UsageError, UnknownName), match=says):
        upkeep.remove(registry, target, device=device)
    assert len(registry.engines()) == 1


def test_gc_deletes_orphans_and_cut_copies_and_leaves_all_else(registry: Registry) -> None:
    build(registry, "a")
    orphan = made_up.store(registry, b"orphan")
    cut = orphan.with_name(".abc.onnx.0123abcd.part")
    cut.write_bytes(b"or")
    begun = registry.root / ".registry.sqlite.0123abcd.part"
    begun.write_bytes(b"")
    kept = [registry.root / "reports" / "0001" / "report.json", registry.root / "notes.txt", registry.root / ".hidden"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    _, would = upkeep.collect(registry, dry_run=True)
    assert {one.path for one in would} == {orphan, cut, begun}
    assert orphan.exists()
    _, garbage = upkeep.collect(registry)
    assert garbage == would
    assert not orphan.parent.exists()
    assert stored(registry) == ["a"]
    assert all(path.read_text() == "mine" for path in kept)
    assert upkeep.collect(registry) == ([], [])


def test_gc_keeps_the_supernet_of_a_family_as_long_as_it_has_builds(registry: Registry) -> None:
    build(registry, "a")
    kept = supernet_path(registry.root, "deit-micro", "cpu")
    kept.parent.mkdir()
    kept.write_text("tuned")
    cut = kept.with_name(f".{kept.name}.0123abcd.part")
    cut.touch()
    _, garbage = upkeep.collect(registry)
    assert [one.path for one in garbage] == [cut]
    upkeep.remove(registry, "deit-micro")
    assert kept in {one.path for one in upkeep.collect(registry)[1]}
    assert not kept.exists()


def test_gc_unlinks_a_link_but_not_what_it_points_to(registry: Registry, tmp_path: Path) -> None:
    build(registry, "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (registry.root / "engines" / "zz").symlink_to(outside)
    link = registry.root / "engines" / "link"
    link.symlink_to(outside / "precious")
    upkeep.collect(registry)
    assert (outside / "precious").read_text() == "precious"
    assert not link.is_symlink()


def test_gc_of_old_builds_keeps_what_is_current_or_tagged(registry: Registry) -> None:
    for name in ("tagged", "old", "new"):
        build(registry, name)
        if name == "tagged":
            move_tag(registry, "deit-micro@prod")
    would, _ = upkeep.collect(registry, old_builds=True, dry_run=True)
    assert [one.number for one in would] == [2]
    assert stored(registry) == ["new", "old", "tagged"]
    removed, _ = upkeep.collect(registry, old_builds=True)
    assert removed == would
    assert stored(registry) == ["new", "tagged"]
    assert [str(e.route) for e in registry.engines("deit-micro@prod")] == ["tagged"]


def test_gc_of_a_registry_without_engines_is_fine(registry: Registry) -> None:
    assert upkeep.collect(registry) == ([], [])


def test_gc_never_deletes_the_files_of_a_build_that_is_being_registered(registry: Registry) -> None:
    build(registry, "first")
    stop, failures = threading.Event(), []

    def tidy() -> None:
        while not stop.is_set():
            upkeep.collect(registry, old_builds=True)

    def register(name: str) -> None:
        try:
            for number in range(8):
                build(registry, f"{name}{number}")
        except RegistryError as error:
            failures.append(error)

    tidier = threading.Thread(target=tidy)
    others = [threading.Thread(target=register, args=(name,)) for name in ("a", "b")]
    for thread in (tidier, *others):
        thread.start()
    for thread in others:
        thread.join()
    stop.set()
    tidier.join()
    assert failures == []
    (engine,) = registry.engines()
    check_file(engine, content=True)
    assert len(upkeep.builds(registry)) == 17

"""Removing builds, and deleting what nobody refers to and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import made_up
import pytest

from klas_zoo.errors import DamagedRegistry, RegistryError, UnknownName, UsageError
from klas_zoo.registry import Registry, database, upkeep
from klas_zoo.registry.checking import check
from klas_zoo.registry.store import check_file
from klas_zoo.registry.tags import move_tag


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


def build(registry: Registry, *names: str, device: str = "cpu") -> int:
    work = registry.root.parent
    engines = [made_up.new_engine(work / name, name, device=device) for name in names]
    return made_up.register(registry, made_up.build(device=device), engines)


def stored(registry: Registry) -> list[str]:
    """Content of the engines in the store."""
    files = (registry.root / "packages").rglob("*")
    return sorted(path.read_text() for path in files if path.is_file() and path.name != "manifest.json")


def size(registry: Registry, *names: str) -> int:
    """Bytes of the packages that hold engines of these names."""
    folders = {path.parent for name in names for path in (registry.root / "packages").rglob(name)}
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def test_builds_are_listed_with_their_tags_and_sizes_the_newest_first(registry: Registry) -> None:
    build(registry, "a", "bb")
    move_tag(registry, "deit-micro@prod")
    move_tag(registry, "deit-micro@best")
    build(registry, "ccc")
    new, old = upkeep.builds(registry)
    assert (old.number, old.current, old.tags) == (1, False, ("deit-micro@best", "deit-micro@prod"))
    assert (old.engines, old.size_bytes) == (2, size(registry, "a", "bb"))
    assert (new.number, new.current, new.tags, new.engines) == (2, True, (), 1)
    assert new.size_bytes == size(registry, "ccc") > 3


def test_a_removed_build_is_gone_from_picks_and_its_files_go_with_gc(registry: Registry) -> None:
    build(registry, "a", "shared")
    build(registry, "b", "shared")
    build(registry, "b", "shared")
    (removed,) = upkeep.remove(registry, "1")
    assert (removed.number, removed.engines) == (1, 2)
    upkeep.remove(registry, "2")  # its package is that of the third
    assert stored(registry) == ["a", "b", "shared", "shared"]
    expected = size(registry, "a")
    _, garbage = upkeep.collect(registry)
    assert [one.size_bytes for one in garbage] == [expected]
    assert stored(registry) == ["b", "shared"]
    for engine in registry.engines():
        check_file(engine, content=True)
    assert registry.build(1) == made_up.build()
    assert [one.removed_at is None for one in upkeep.builds(registry)] == [True, False, False]


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
        ("7", None, "There is no build 7: klas-zoo registry builds lists them"),
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
    orphan = made_up.store(registry, b"orphan").parent
    cut = orphan.with_name(f".{'a' * 64}.0123abcd.part")
    cut.mkdir()
    (cut / "engine.onnx").write_bytes(b"or")
    begun = registry.root / ".registry.sqlite.0123abcd.part"
    begun.write_bytes(b"")
    legacy = registry.root / "engines" / "ab" / "abcd.onnx"  # of a registry before packages
    kept = [registry.root / "reports" / "0001" / "report.json", registry.root / "notes.txt", registry.root / ".hidden"]
    for path in (*kept, legacy):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    _, would = upkeep.collect(registry, dry_run=True)
    assert {one.path for one in would} == {orphan, cut, begun, legacy}
    assert {one.path for one in would if one.left_over} == {cut, begun}
    assert orphan.exists()
    _, garbage = upkeep.collect(registry)
    assert garbage == would
    assert not any(one.path.exists() for one in would)
    assert list((registry.root / "engines").iterdir()) == []
    assert stored(registry) == ["a"]
    assert all(path.read_text() == "mine" for path in kept)
    assert upkeep.collect(registry) == ([], [])


def test_gc_keeps_the_old_supernet_of_a_family_as_long_as_it_has_builds(registry: Registry) -> None:
    build(registry, "a")
    kept = upkeep.legacy_supernet(registry.root, "deit-micro", "cpu")
    kept.parent.mkdir()
    kept.write_text("tuned")
    unknown = kept.with_name("another-cpu.safetensors")  # no build of such a family ever was
    unknown.write_text("tuned")
    cut = kept.with_name(f".{kept.name}.0123abcd.part")
    cut.touch()
    _, garbage = upkeep.collect(registry)
    assert [one.path for one in garbage] == [cut]
    upkeep.remove(registry, "deit-micro")
    assert kept in {one.path for one in upkeep.collect(registry)[1]}
    assert not kept.exists()
    assert unknown.exists()


DAMAGE = {
    "another digest": "UPDATE packages SET digest = replace(digest, substr(digest, 1, 1), 'x')",
    "another package of an engine": "UPDATE engines SET package = 'x' || substr(package, 2)",
    "another file of an engine": "UPDATE engines SET file = replace(file, 'packages/', 'packages/x')",
    "another size of an engine": "UPDATE engines SET file_bytes = 77",
    "an engine of no build": "UPDATE engines SET build_id = 77",
    "a damaged index": "UPDATE sqlite_master SET sql = replace(sql, 'WHERE current', 'WHERE NOT current')"
    " WHERE name = 'one_current_build'",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("old_builds", [True, False])
def test_gc_of_a_damaged_registry_deletes_nothing(registry: Registry, damage: str, old_builds: bool) -> None:
    build(registry, "a")
    build(registry, "b")
    with closing(database.connect(registry.database_path)) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(DAMAGE[damage])
    with pytest.raises(DamagedRegistry, match="so nothing in it was deleted: klas-zoo registry check lists the damage"):
        upkeep.collect(registry, old_builds=old_builds)
    assert stored(registry) == ["a", "b"]
    with closing(database.connect(registry.database_path)) as connection:
        assert connection.execute("SELECT count(*) FROM engines").fetchone()[0] == 2


def test_gc_beside_a_missing_package_deletes_nothing(registry: Registry) -> None:
    build(registry, "a")
    made_up.store(registry, b"orphan")
    shutil.rmtree(registry.engines()[0].path.parent)
    with pytest.raises(DamagedRegistry, match="nothing in it was deleted"):
        upkeep.collect(registry)
    assert stored(registry) == ["orphan"]
    upkeep.remove(registry, "1")
    upkeep.collect(registry)
    assert stored(registry) == []


RACE = """
import sys
from pathlib import Path
from klas_zoo.errors import KlasZooError
from klas_zoo.registry import Registry
from klas_zoo.registry.tags import move_tag
registry = Registry(Path(sys.argv[1]))
for line in sys.stdin:  # a build's number
    try:
        move_tag(registry, "deit-micro@prod", build_id=int(line))
        print("moved", flush=True)
    except KlasZooError as error:
        print(f"refused: {error}", flush=True)
"""


def test_a_tag_that_is_set_during_gc_pins_its_build_or_is_refused(registry: Registry) -> None:
    tagger = subprocess.Popen(
        [sys.executable, "-c", RACE, str(registry.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert tagger.stdin and tagger.stdout
    outcomes = Counter[str]()
    for trial in range(200):
        old = build(registry, "same")
        build(registry, "new")
        tagger.stdin.write(f"{old}\n")
        tagger.stdin.flush()
        time.sleep(0.001 * (trial % 8))  # no assertion depends on it
        upkeep.collect(registry, old_builds=True)
        said = tagger.stdout.readline().partition(":")[0].strip()
        outcomes[said] += 1
        if said == "moved":
            (engine,) = registry.engines("deit-micro@prod")
            check_file(engine, content=True)
        assert [one.what for one in check(registry) if not one.harmless] == []
    tagger.communicate(timeout=60)
    assert tagger.returncode == 0
    assert sum(outcomes.values()) == 200 and set(outcomes) <= {"moved", "refused"}


def test_a_pick_beside_builds_and_gc_never_calls_the_registry_damaged(registry: Registry) -> None:
    build(registry, "first")
    script = (
        "import sys; from pathlib import Path; from klas_zoo.registry.picking import pick\n"
        "for _ in range(300):\n    pick('5ms', registry=Path(sys.argv[1]))\n"
    )
    picker = subprocess.Popen([sys.executable, "-c", script, str(registry.root)], stderr=subprocess.PIPE, text=True)
    number = 0
    while picker.poll() is None:
        number += 1
        build(registry, f"n{number}")
        upkeep.collect(registry, old_builds=True)
    assert picker.communicate()[1] == ""
    assert picker.returncode == 0 and number


def test_gc_unlinks_a_link_but_not_what_it_points_to(registry: Registry, tmp_path: Path) -> None:
    build(registry, "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (registry.root / "engines").mkdir()
    (outside / "precious").write_text("precious")
    (registry.root / "engines" / "zz").symlink_to(outside)
    link = registry.root / "engines" / "link"
    link.symlink_to(outside / "precious")
    (registry.root / "engines" / "empty").symlink_to(tmp_path / "no-such-folder")
    (registry.root / "packages" / ("e" * 64)).symlink_to(outside)
    upkeep.collect(registry)
    assert (outside / "precious").read_text() == "precious"
    assert not link.is_symlink()
    assert not (registry.root / "packages" / ("e" * 64)).is_symlink()


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

"""Every kind of damage is found, and named; a sound registry has none."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import made_up
import pytest

from klas_zoo.registry import Registry, database
from klas_zoo.registry.checking import Finding, check
from klas_zoo.registry.tags import move_tag


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = made_up.filled_registry(tmp_path / "registry")
    made_up.filled_registry(registry.root)
    move_tag(registry, "deit-micro@prod", build_id=1)
    return registry


def damage(registry: Registry, *statements: str) -> None:
    with closing(database.connect(registry.root / "registry.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            connection.execute(statement)


def kinds(findings: list[Finding]) -> set[str]:
    return {one.kind for one in findings}


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_sound_registry_has_nothing_wrong_and_is_not_changed(registry: Registry) -> None:
    before, checked = files(registry.root), []
    assert check(registry, on_engine=checked.append) == []
    assert len(checked) == 6
    assert files(registry.root) == before


def test_a_flipped_bit_is_found_by_content_and_a_cut_file_by_its_size(registry: Registry) -> None:
    path = registry.engines()[0].path
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert check(registry, content=False) == []
    findings = check(registry)
    assert [(one.kind, one.path) for one in findings] == [("damaged", path.parent)]
    assert f"The file {path} is not the file that was registered" in findings[0].what
    path.write_bytes(b"")
    assert kinds(check(registry, content=False)) == {"damaged"}


def test_a_missing_file_is_found(registry: Registry) -> None:
    registry.engines()[0].path.unlink()
    for content in (True, False):
        assert "cannot be read (No such file or directory)" in check(registry, content=content)[0].what


def test_an_engine_whose_row_is_not_that_of_its_file_is_found(registry: Registry) -> None:
    damage(registry, "UPDATE engines SET sha256 = 'f' || substr(sha256, 2) WHERE id = 2")
    assert [one.what for one in check(registry)] == [
        "engine small of build 1 is not the file of that name in its package"
    ]


def test_a_damaged_file_beside_the_engines_is_found(registry: Registry) -> None:
    manifest = registry.engines()[0].path.parent / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    assert [(one.kind, one.path) for one in check(registry, content=False)] == [("damaged", manifest.parent)]


def test_orphans_and_cut_copies_are_found_and_called_harmless(registry: Registry) -> None:
    orphan = made_up.store(registry, b"orphan").parent
    cut = orphan.with_name(f".{orphan.name}.0123abcd.part")
    cut.touch()
    findings = check(registry)
    assert {(one.kind, one.path, one.size_bytes) for one in findings} == {("orphan", orphan, 6), ("left over", cut, 0)}
    assert all(one.harmless for one in findings)


@pytest.mark.parametrize(
    ("statement", "kind", "what"),
    [
        ("DELETE FROM builds WHERE id = 1", "dangling", "refers to builds that are not there"),
        ("DELETE FROM engines WHERE id = 1", "dangling", "refers to engines that are not there"),
        ("UPDATE engines SET build_id = 1", "dangling", "build 2 is current, but has no engines"),
        ("UPDATE builds SET removed_at = 'x' WHERE id = 2", "dangling", "build 2 was removed, but is current"),
        ("UPDATE builds SET removed_at = 'x' WHERE id = 1", "dangling", "build 1 is what a tag points to"),
        ("UPDATE engines SET route = '[]' WHERE id = 2", "unreadable", "engine 2 of build 1 cannot be understood"),
        ("UPDATE engines SET route = 'x' WHERE id = 2", "unreadable", "engine 2 of build 1 cannot be understood"),
        ("UPDATE latencies SET p50_ms = -1 WHERE engine_id = 5", "unreadable", "engine 5 of build 2"),
        ("UPDATE builds SET settings = '{' WHERE id = 1", "unreadable", "build 1 cannot be understood"),
        (
            "UPDATE engines SET verification = replace(verification, '1e-05', '5.0') WHERE id = 3",
            "unverified",
            "engine base of build 1 did not pass its verification",
        ),
    ],
)
def test_rows_that_are_not_as_they_should_be_are_found(
    registry: Registry, statement: str, kind: str, what: str
) -> None:
    damage(registry, statement)
    findings = [one for one in check(registry) if one.kind == kind]
    assert any(what in one.what for one in findings), findings
    assert not any(one.harmless for one in findings)


def test_a_damaged_index_of_the_database_is_found(registry: Registry) -> None:
    damage(
        registry,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = replace(sql, 'WHERE current', 'WHERE NOT current')"
        " WHERE name = 'one_current_build'",
    )
    assert "damaged" in kinds(check(registry))


def test_the_file_of_a_build_that_is_being_registered_is_no_orphan(registry: Registry, tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import made_up
from klas_zoo.registry import Registry
root = Path(sys.argv[1])
for number in range(15):
    made_up.register(Registry(root), made_up.build(), [made_up.planned(1, f"n{{number}}")])
"""
    process = subprocess.Popen([sys.executable, "-c", script, registry.root], stderr=subprocess.PIPE, text=True)
    looks = 0
    while process.poll() is None:
        assert check(registry) == []
        looks += 1
    assert process.returncode == 0, process.communicate()[1]
    assert looks
    process.communicate()
    assert check(registry) == []


@pytest.mark.skipif(not hasattr(os, "fork") or os.getuid() != 0, reason="changes its user: needs root")
def test_a_registry_that_cannot_be_written_can_be_checked_and_asked_what_gc_would_delete(registry: Registry) -> None:
    made_up.store(registry, b"orphan")
    for path in registry.root.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (registry.root, *registry.root.parents):
        if "pytest" in str(path):
            path.chmod(0o755 if path != registry.root else 0o555)
    script = (
        "import fcntl, hashlib, sys, os; from pathlib import Path; from klas_zoo.registry.checking import check\n"
        "from klas_zoo.registry import Registry\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "assert not os.access(sys.argv[1], os.W_OK)\n"
        "print([one.kind for one in check(Registry(Path(sys.argv[1])))])\n"
        "from klas_zoo.registry.upkeep import collect\n"
        "print(len(collect(Registry(Path(sys.argv[1])), dry_run=True)[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script, registry.root], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['orphan']\n1\n", "")

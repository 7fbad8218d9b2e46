"""`klas-zoo registry …`: what it says to people and machines, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import click
import made_up
import pytest
from click.testing import CliRunner

from klas_zoo.cli import main
from klas_zoo.cli.registry import registry as group
from klas_zoo.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return made_up.filled_registry(tmp_path)


def run(registry: Registry, *arguments: object) -> tuple[int, str, str]:
    words = [*map(str, arguments), "--registry", str(registry.root)]
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def answer(registry: Registry, *arguments: object) -> object:
    code, out, err = run(registry, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize("name", sorted(group.commands))
def test_every_command_and_option_is_documented(name: str) -> None:
    command = group.commands[name]
    assert command.help
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"


def test_a_tag_is_set_listed_picked_moved_back_and_deleted(registry: Registry) -> None:
    assert run(registry, "registry", "tag", "deit-micro@prod")[1].rstrip().endswith(
        "deit-micro@prod on cpu: build 1, done 2026-01-02T03:14:05+00:00"
    )
    made_up.filled_registry(registry.root)
    builds = answer(registry, "registry", "builds")
    assert [(one["number"], one["current"], one["tags"]) for one in builds] == [  # type: ignore[attr-defined]
        (2, True, []), (1, False, ["deit-micro@prod"])
    ]  # fmt: skip
    picked = answer(registry, "pick", "--latency", "5ms", "--family", "deit-micro@prod")
    assert picked["engine"]["build_id"] == 1  # type: ignore[index]
    listed = answer(registry, "list", "--family", "deit-micro@prod")
    assert {one["build_id"] for one in listed} == {1}  # type: ignore[attr-defined]
    run(registry, "registry", "tag", "deit-micro@prod")
    run(registry, "registry", "tag", "deit-micro@prod", "--build", 1)
    run(registry, "registry", "tag", "deit-micro@prod", "--delete")
    _, out, _ = run(registry, "registry", "history", "deit-micro@prod")
    assert [line.partition(" on cpu: ")[2][:10] for line in out.splitlines()] == [
        "deleted", "build 1, d", "build 2, d", "build 1, d"
    ]  # fmt: skip


def test_history_without_tags_says_how_to_set_one(registry: Registry) -> None:
    assert "klas-zoo registry tag FAMILY@NAME sets one" in run(registry, "registry", "history")[1]
    assert answer(registry, "registry", "history") == []


def test_check_ends_with_1_on_damage_and_with_0_on_orphans(registry: Registry) -> None:
    assert run(registry, "registry", "check")[:2] == (
        0, "3 engines checked: 0 damaged, dangling, unreadable or unverified; 0 not needed.\n"
    )  # fmt: skip
    orphan = made_up.store(registry, b"orphan")
    code, out, _ = run(registry, "registry", "check")
    assert code == 0
    assert out.splitlines()[0] == f"orphan     no build refers to this: {orphan.parent} (6 B)"
    assert out.endswith("; 1 not needed. klas-zoo registry gc deletes those.\n")
    path = registry.engines()[0].path
    path.write_bytes(b"TINY")
    assert run(registry, "registry", "check", "--sizes-only")[0] == 0
    code, out, _ = run(registry, "registry", "check", "--json")
    assert code == 1
    assert sorted(one["kind"] for one in json.loads(out)["findings"]) == ["damaged", "orphan"]
    assert "klas-zoo registry gc" not in run(registry, "registry", "check")[1]  # which would refuse


def test_remove_and_gc_say_what_they_did(registry: Registry) -> None:
    made_up.filled_registry(registry.root)
    assert run(registry, "registry", "remove", 1)[1] == "Removed build 1 of deit-micro for cpu: 3 engines.\n"
    orphan = made_up.store(registry, b"orphan").parent
    would = f"{orphan} would be deleted\n1 files and packages, 6 B, would be deleted.\n"
    assert run(registry, "registry", "gc", "--dry-run")[1] == would
    assert orphan.exists()
    assert run(registry, "registry", "gc")[1].endswith("1 files and packages, 6 B, deleted.\n")
    assert not orphan.exists()
    nothing = {"builds": [], "dry_run": False, "files": [], "results": [], "size_bytes": 0}
    assert answer(registry, "registry", "gc") == nothing


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tag", "prod"], "is not a tag: write FAMILY@NAME"),
        (["tag", "deit-mikro@prod"], "did you mean deit-micro?"),
        (["tag", "deit-micro@prod", "--delete", "--build", "1"], "contradict"),
        (["tag", "deit-micro@prod", "--delete"], "Unknown tag"),
        (["tag", "deit-micro@prod", "--build", "9"], "There is no build 9"),
        (["remove", "9"], "There is no build 9"),
        (["history", "deit-micro@prod"], "Unknown tag"),
    ],
)
def test_bad_input_gets_one_sentence(registry: Registry, arguments: list[str], says: str) -> None:
    code, out, err = run(registry, "registry", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_without_a_registry_nothing_is_made(tmp_path: Path) -> None:
    for arguments in (["check"], ["gc"], ["builds"], ["history"], ["remove", "1"], ["tag", "a@b"]):
        code, out, err = run(Registry(tmp_path / "none"), "registry", *arguments)
        assert (code, out) == (1, "")
        assert "run klas-zoo build, add or install first" in err
    assert not (tmp_path / "none").exists()

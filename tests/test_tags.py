"""Tags: where they point, how they move, and what is left of where they pointed."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import made_up
import pytest

from klas_zoo.errors import UnknownName, UsageError
from klas_zoo.registry import Registry, tags, upkeep
from klas_zoo.registry.picking import pick
from klas_zoo.registry.tags import delete_tag, history, move_tag


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", create=True)


def build(registry: Registry, name: str, device: str = "cpu", **changes: Any) -> int:
    """Registers a build of one engine called `name`; its number."""
    shared = {key: value for key, value in changes.items() if key in made_up.OF_A_BUILD}
    new = made_up.new_engine(registry.root / f"{name}.made-up", name, device=device, **shared)
    return made_up.register(registry, made_up.build(device=device, **changes), [new])


def names(registry: Registry, family: str, device: str | None = None) -> list[str]:
    return sorted(f"{e.route} on {e.device}" for e in registry.engines(family, device))


def test_a_tag_keeps_pointing_at_its_build_whatever_is_built_later(registry: Registry) -> None:
    build(registry, "old")
    move_tag(registry, "deit-micro@prod")
    build(registry, "new")
    assert names(registry, "deit-micro@prod") == ["old on cpu"]
    assert names(registry, "deit-micro") == ["new on cpu"]


def test_pick_takes_a_tag_for_a_family(registry: Registry) -> None:
    build(registry, "old")
    move_tag(registry, "deit-micro@prod")
    build(registry, "new")
    assert str(pick("5ms", family="deit-micro@prod", registry=registry).engine.route) == "old"
    assert str(pick("5ms", family="deit-micro", registry=registry).engine.route) == "new"
    with pytest.raises(UnknownName, match=r"Unknown tag 'deit-micro@prd': did you mean deit-micro@prod?"):
        pick("5ms", family="deit-micro@prd", registry=registry)
    with pytest.raises(UnknownName, match=r"Unknown device 'cpuu': did you mean cpu?"):
        pick("5ms", family="deit-micro@prod", device="cpuu", registry=registry)


def test_a_device_that_others_have_but_the_tag_has_not_is_named(registry: Registry) -> None:
    build(registry, "a", "cpu")
    move_tag(registry, "deit-micro@prod")
    build(registry, "b", "a100")
    with pytest.raises(UnknownName, match="Unknown device 'a100': known: cpu"):
        pick("5ms", family="deit-micro@prod", device="a100", registry=registry)


def test_a_tag_moves_on_all_devices_of_its_family_or_on_one(registry: Registry) -> None:
    for device in ("cpu", "a100"):
        build(registry, "old", device)
    assert {move.device for move in move_tag(registry, "deit-micro@prod")} == {"cpu", "a100"}
    for device in ("cpu", "a100"):
        build(registry, "new", device)
    move_tag(registry, "deit-micro@prod", device="cpu")
    assert names(registry, "deit-micro@prod") == ["new on cpu", "old on a100"]
    assert names(registry, "deit-micro@prod", "a100") == ["old on a100"]
    move_tag(registry, "deit-micro@prod")
    assert names(registry, "deit-micro@prod") == ["new on a100", "new on cpu"]


def test_a_tag_can_go_back_to_a_build_before(registry: Registry) -> None:
    first = build(registry, "old")
    build(registry, "new")
    move_tag(registry, "deit-micro@prod")
    move_tag(registry, "deit-micro@prod", build_id=first)
    assert names(registry, "deit-micro@prod") == ["old on cpu"]
    assert [move.build_id for move in history(registry, "deit-micro@prod")] == [first, first + 1]


def test_a_deleted_tag_is_unknown_but_its_history_stays(registry: Registry) -> None:
    first = build(registry, "old")
    move_tag(registry, "deit-micro@prod")
    delete_tag(registry, "deit-micro@prod")
    with pytest.raises(UnknownName, match="none is known yet"):
        registry.engines("deit-micro@prod")
    assert [move.build_id for move in history(registry)] == [None, first]
    move_tag(registry, "deit-micro@prod")
    assert names(registry, "deit-micro@prod") == ["old on cpu"]


def test_a_tag_can_be_deleted_on_one_device(registry: Registry) -> None:
    for device in ("cpu", "a100"):
        build(registry, "old", device)
    move_tag(registry, "deit-micro@prod")
    delete_tag(registry, "deit-micro@prod", device="cpu")
    assert names(registry, "deit-micro@prod") == ["old on a100"]
    with pytest.raises(UnknownName, match=r"Unknown device of deit-micro@prod 'cpu': known: a100\."):
        delete_tag(registry, "deit-micro@prod", device="cpu")


def test_a_clock_that_goes_backwards_changes_neither_the_tag_nor_the_order_of_its_history(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(registry, "old", finished_at="2026-01-02T00:00:00+00:00")
    monkeypatch.setattr(tags, "now", lambda: "2026-06-01T00:00:00+00:00")
    move_tag(registry, "deit-micro@prod")
    second = build(registry, "new", finished_at="2020-01-01T00:00:00+00:00")
    monkeypatch.setattr(tags, "now", lambda: "2001-01-01T00:00:00+00:00")
    move_tag(registry, "deit-micro@prod")
    assert names(registry, "deit-micro") == names(registry, "deit-micro@prod") == ["new on cpu"]
    found = history(registry, "deit-micro@prod")
    assert [move.build_id for move in found] == [second, first]
    assert [move.moved_at[:4] for move in found] == ["2001", "2026"]


def test_tags_of_one_family_do_not_touch_each_other_or_other_families(registry: Registry) -> None:
    build(registry, "a")
    build(registry, "b", family="other")
    move_tag(registry, "deit-micro@prod")
    move_tag(registry, "other@prod")
    build(registry, "c")
    move_tag(registry, "deit-micro@next")
    assert names(registry, "deit-micro@prod") == ["a on cpu"]
    assert names(registry, "deit-micro@next") == ["c on cpu"]
    assert names(registry, "other@prod") == ["b on cpu"]
    assert len(history(registry)) == 3
    assert len(history(registry, "other@prod")) == 1


@pytest.mark.parametrize(
    "name", ["prod", "@prod", "deit-micro@", "a@b@c", "deit m@prod", "deit@pr od", "../x@y", "a@" + "b" * 65, "@"]
)
def test_a_name_that_is_not_a_tag_says_how_one_looks(registry: Registry, name: str) -> None:
    for attempt in (move_tag, delete_tag):
        with pytest.raises(UsageError, match="is not a tag: write FAMILY@NAME, such as deit@prod"):
            attempt(registry, name)


def test_what_a_tag_cannot_point_to_is_said(registry: Registry) -> None:
    number = build(registry, "a")
    build(registry, "b")
    for says, arguments in {
        "Unknown family 'deit': did you mean deit-micro": {"name": "deit@prod"},
        "Unknown device 'a100': known: cpu": {"name": "deit-micro@prod", "device": "a100"},
        "There is no build 7": {"name": "deit-micro@prod", "build_id": 7},
        f"Build {number} is of deit-micro for cpu": {"name": "other@prod", "build_id": number},
    }.items():
        with pytest.raises(UsageError, match=says):
            move_tag(registry, **arguments)  # type: ignore[arg-type]
    upkeep.remove(registry, str(number))
    with pytest.raises(UsageError, match=f"The engines of build {number} were removed"):
        move_tag(registry, "deit-micro@prod", build_id=number)
    assert history(registry) == []
    with pytest.raises(UnknownName, match="Unknown tag 'deit-micro@prod': none is known yet"):
        history(registry, "deit-micro@prod")


def test_readers_see_a_tag_move_on_all_devices_in_one_step(registry: Registry) -> None:
    numbers = {}
    for name in ("old", "new"):
        for device in ("cpu", "a100"):
            numbers[name, device] = build(registry, name, device)
    move_tag(registry, "deit-micro@prod")
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(tuple(names(registry, "deit-micro@prod")))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20):
        for device in ("cpu", "a100"):
            build(registry, "old", device)
        move_tag(registry, "deit-micro@prod")
        for device in ("cpu", "a100"):
            build(registry, "new", device)
        move_tag(registry, "deit-micro@prod")
    stop.set()
    for reader in readers:
        reader.join()
    allowed = {tuple(f"{name} on {device}" for device in ("a100", "cpu")) for name in ("old", "new")}
    assert seen <= allowed
    assert len(seen) == 2


def test_processes_that_move_a_tag_at_once_leave_every_move_in_its_history(registry: Registry) -> None:
    numbers = [build(registry, name) for name in ("a", "b", "c")]
    script = (
        "import sys; from pathlib import Path\n"
        "from klas_zoo.registry import Registry; from klas_zoo.registry.tags import move_tag\n"
        "sys.stdin.readline()\n"
        "for _ in range(5):\n"
        "    move_tag(Registry(Path(sys.argv[1])), 'deit-micro@prod', build_id=int(sys.argv[2]))\n"
    )
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(registry.root), str(number)], stdin=pipe, stderr=pipe, text=True
        )
        for number in numbers
    ]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    found = history(registry, "deit-micro@prod")
    assert sorted(move.build_id or 0 for move in found) == sorted(itertools.chain(*([n] * 5 for n in numbers)))
    (engine,) = registry.engines("deit-micro@prod")
    assert engine.build_id == found[0].build_id

"""Results on disk: there as a whole or not at all, found by what made them, made by one process at a time."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klas_zoo.building import cache as cache_module
from klas_zoo.building.cache import SCHEMA_VERSION, Cache, content_key, moved_to_registry, registered_packages
from klas_zoo.errors import RegistryError

KEY = "0" * 32
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def store(cache: Cache, content: str, key: str = KEY) -> Path:
    with cache.storing("tune", key, lambda: {"seconds": 1.5}) as folder:
        (folder / "result.txt").write_text(content)
    return cache.folder("tune", key)


@given(JSON, JSON)
def test_keys_are_equal_exactly_where_inputs_are(one: object, other: object) -> None:
    same = repr(one) == repr(other) or content_key({"it": one}) == content_key({"it": other})
    assert (content_key({"it": one}) == content_key({"it": other})) is same
    assert content_key({"a": one, "b": other}) == content_key({"b": other, "a": one})


def test_a_changed_number_changes_the_key() -> None:
    assert content_key({"rate": 0.1}) != content_key({"rate": 0.1 + 1e-17 * 2})
    assert content_key({"steps": 1}) != content_key({"steps": None})


def test_a_result_is_there_with_what_was_noted_of_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.facts("tune", KEY) is None
    folder = store(cache, "weights")
    assert (folder / "result.txt").read_text() == "weights"
    found = cache.facts("tune", KEY)
    assert found is not None
    assert found | {"result": "", "files": {}} == {
        "schema_version": SCHEMA_VERSION, "stage": "tune", "key": KEY, "seconds": 1.5, "result": "", "files": {},
    }  # fmt: skip
    assert found["files"] == {"result.txt": {"size_bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}
    assert [path.name for path in folder.parent.iterdir()] == [KEY]


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(ZeroDivisionError), cache.storing("tune", KEY, dict) as folder:
        (folder / "half").write_text("a result")
        _ = 1 / 0
    assert list((tmp_path / "tune").iterdir()) == []


def test_a_new_result_replaces_the_old_and_what_was_unfinished_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    store(cache, "old")
    cache.unfinished("tune", KEY).mkdir()
    folder = store(cache, "new")
    assert (folder / "result.txt").read_text() == "new"
    assert not cache.unfinished("tune", KEY).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_note_that_cannot_be_read_is_as_good_as_none(text: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (store(cache, "it") / "stage.json").write_text(text)
    assert cache.facts("tune", KEY) is None
    assert (store(cache, "again") / "result.txt").read_text() == "again"


def test_every_flipped_bit_of_a_result_and_of_its_note_is_found(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    folder = store(cache, "weights")
    assert cache.damage("tune", KEY) is None
    for name in ("result.txt", "stage.json"):
        content = (folder / name).read_bytes()
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            noted = cache.facts("tune", KEY)
            assert noted is None or cache.damage("tune", KEY) == name == "result.txt", bit
        (folder / name).write_bytes(content)


def test_files_that_are_in_a_package_of_the_registry_go_and_its_digest_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.storing("tune", KEY, dict) as folder:
        (folder / "fp32").mkdir()
        for name in ("fp32/engine", "routes"):
            (folder / name).write_text(name)
    folder = cache.folder("tune", KEY)
    before = cache.facts("tune", KEY)
    (folder / "left by a process that died").touch()
    moved_to_registry(folder, {"fp32": "c0ffee"}, lambda name: name.startswith("fp32/"))
    assert {path.name for path in folder.iterdir()} == {"routes", "stage.json"}
    assert registered_packages(folder) == {"fp32": "c0ffee"}
    after = cache.facts("tune", KEY)
    assert before and after and cache.damage("tune", KEY) is None
    assert (list(after["files"]), after["result"]) == (["routes"], before["result"])


def _die_while_storing(root: Path) -> None:
    with Cache(root).storing("tune", KEY, dict) as folder:
        (folder / "half").write_text("a result")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_swept_away_by_the_next(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_die_while_storing, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "tune").iterdir()] == [f".{KEY}.part"]
    folder = store(Cache(tmp_path), "whole")
    assert [path.name for path in folder.parent.iterdir()] == [KEY]


def _work(root: Path) -> None:
    with Cache(root).working("tune", KEY, lambda: None):
        (root / "begun").touch()
        while not (root / "enough").exists():
            time.sleep(0.01)
        (root / "ended").touch()


def test_two_processes_do_not_do_the_same_work_at_once(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_work, args=(tmp_path,))
    child.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    waits = []

    def on_wait() -> None:
        waits.append((tmp_path / "ended").exists())
        (tmp_path / "enough").touch()

    with Cache(tmp_path).working("tune", KEY, on_wait):
        assert (tmp_path / "ended").exists()
    child.join()
    assert waits == [False]


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_work, args=(tmp_path,))
    child.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    child.kill()
    child.join()
    with Cache(tmp_path).working("tune", KEY, lambda: pytest.fail("nobody is there")):
        pass


# what nobody needs

DAY = 86_400.0
OTHER = "1" * 32


def age(cache: Cache, key: str, days: float) -> None:
    """Makes everything there is of a key as old as that."""
    then = time.time() - days * DAY
    for path in (cache.root / "tune").glob(f"*{key}*"):
        os.utime(path, (then, then))


def test_a_result_that_no_build_needs_goes_when_nobody_used_it_for_long_enough(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key, days in (("a" * 32, 9), ("b" * 32, 9), ("c" * 32, 5), ("d" * 32, 9)):
        with cache.working("tune", key, lambda: None):
            store(cache, "weights", key)
        age(cache, key, days)
    cache.used("tune", "d" * 32)
    would = cache.collect(lambda: {"b" * 32}, unused_s=7 * DAY, dry_run=True)
    assert [(one.stage, one.key, one.size_bytes > 7) for one in would] == [("tune", "a" * 32, True)]
    assert cache.facts("tune", "a" * 32)
    assert cache.collect(lambda: {"b" * 32}, unused_s=7 * DAY) == would
    assert sorted(path.name[0] for path in (tmp_path / "tune").iterdir()) == [*"bbccdd"]  # each with its lock
    assert cache.collect(lambda: {"b" * 32}, unused_s=7 * DAY) == []


def test_checkpoints_and_what_killed_processes_left_go_too_and_other_files_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.collect(set, unused_s=0) == []
    for name in (f"{KEY}.unfinished", f".{OTHER}.part", f".{'2' * 32}.old", "notes"):
        (tmp_path / "tune" / name).mkdir(parents=True)
        (tmp_path / "tune" / name / "checkpoint.pt").write_text("half")
    (tmp_path / "tune" / f"{'3' * 32}.lock").touch()
    found = cache.collect(set, unused_s=0)
    assert [one.key for one in found] == [KEY, OTHER, "2" * 32, "3" * 32]
    assert [one.size_bytes for one in found] == [4, 4, 4, 0]
    assert [path.name for path in (tmp_path / "tune").iterdir()] == ["notes"]


def test_a_result_is_no_result_any_more_before_the_first_of_its_files_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path)
    store(cache, "weights")

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_module.shutil, "rmtree", die)
        cache.collect(set, unused_s=0)
    assert cache.facts("tune", KEY) is None
    cache.collect(set, unused_s=0)
    assert list((tmp_path / "tune").iterdir()) == []


def _build(root: Path, go_on: Connection) -> None:
    with Cache(root).in_use():
        go_on.send("begun")
        go_on.recv()


def test_nothing_goes_while_a_build_runs_in_another_process(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    store(cache, "weights")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_build, args=(tmp_path, theirs))
    child.start()
    assert ours.recv() == "begun"
    with cache.in_use(lambda: pytest.fail("builds do not wait for one another")):
        pass
    with pytest.raises(RegistryError, match=r"^A build is running: .* can be deleted when it has ended\. None was\.$"):
        cache.collect(lambda: pytest.fail("too early to ask"), unused_s=0)
    assert [one.key for one in cache.collect(set, unused_s=0, dry_run=True)] == [KEY]
    assert cache.facts("tune", KEY)
    child.kill()  # the system frees what it held
    child.join()
    assert [one.key for one in cache.collect(set, unused_s=0)] == [KEY]


def test_a_build_waits_until_deleting_is_over(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    store(cache, "weights")
    ended: list[str] = []
    waiting = threading.Event()

    def build() -> None:
        with cache.in_use(waiting.set):
            ended.append("build")

    builder = threading.Thread(target=build)

    def needed() -> set[str]:
        builder.start()
        assert waiting.wait(60)
        ended.append("gc")
        return set()

    cache.collect(needed, unused_s=0)
    builder.join()
    assert ended == ["gc", "build"]

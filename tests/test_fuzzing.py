"""Whatever is thrown at it, what reads others' files answers with one of our errors, or reads them."""

from __future__ import annotations

from pathlib import Path

import fuzzing
import pytest
from hypothesis import strategies as st


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_nearly_right_input_gets_one_of_our_errors_or_is_read(name: str, whole: Path, tmp_path: Path) -> None:
    assert fuzzing.throw(fuzzing.build(name, tmp_path / "fuzzing", whole), 60) >= 60


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_what_was_not_altered_is_read(name: str, whole: Path, tmp_path: Path) -> None:
    """Before inputs that were altered, which otherwise would all be refused at the door, and after them."""
    target = fuzzing.build(name, tmp_path / "fuzzing", whole)
    target.read(target.right)
    fuzzing.throw(target, 20)
    target.read(target.right)


def test_targets_do_not_alter_the_package_they_share(whole: Path, tmp_path: Path) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in whole.iterdir()}

    before = content()
    for name in ("packages", "verified packages", "indexes"):
        fuzzing.throw(fuzzing.build(name, tmp_path / name, whole), 5)
    assert content() == before


def test_shares_make_up_all_inputs() -> None:
    assert 1_000 <= sum(fuzzing.counts(1_000).values()) < 1_020


def test_a_target_that_crashes_or_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(value: int) -> None:
        if value > 100:
            raise KeyError(value)

    with pytest.raises(KeyError):
        fuzzing.throw(fuzzing.Target(name="x", right=0, inputs=st.integers(), read=crash), 500)

    def hang(value: int) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzzing, "LONGEST_S", 1)
    with pytest.raises(fuzzing.Hang):
        fuzzing.throw(fuzzing.Target(name="x", right=0, inputs=st.just(0), read=hang), 1)


def test_altered_json_and_damaged_bytes_differ_from_what_was_right(tmp_path: Path) -> None:
    seen = set()
    right = {"a": [1, 2], "b": {"c": "d"}}
    fuzzing.throw(
        fuzzing.Target(name="x", right=right, inputs=fuzzing.altered(right), read=lambda value: seen.add(repr(value))),
        100,
    )
    assert len(seen) > 50
    seen.clear()
    fuzzing.throw(fuzzing.Target(name="x", right=0, inputs=fuzzing.damaged(b"abcdefgh" * 10), read=seen.add), 100)
    assert len(seen) > 50

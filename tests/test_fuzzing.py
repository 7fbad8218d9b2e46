"""Whatever is thrown at it, what reads others' files answers with one of our errors, or reads them."""

from __future__ import annotations

from pathlib import Path

import fuzzing
import packages
import pytest
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzing") / "package"
    packages.write_package(folder)
    return folder


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_nearly_right_input_gets_one_of_our_errors_or_is_read(name: str, package: Path, tmp_path: Path) -> None:
    assert fuzzing.throw(fuzzing.build(name, tmp_path / "fuzzing", package), 60) >= 60


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_what_was_not_altered_is_read(name: str, package: Path, tmp_path: Path) -> None:
    """Otherwise every input would be refused at the door."""
    target = fuzzing.build(name, tmp_path / "fuzzing", package)
    accepted = 0

    def count(value: object) -> None:
        nonlocal accepted
        target.read(value)
        accepted += 1

    fuzzing.throw(fuzzing.Target(name=name, inputs=target.inputs, read=count), 150)
    assert accepted, "none of 150 inputs, some of them altered only a little, was read"


def test_shares_make_up_all_inputs() -> None:
    assert 1_000 <= sum(fuzzing.counts(1_000).values()) < 1_020


def test_a_target_that_crashes_or_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(value: int) -> None:
        if value > 100:
            raise KeyError(value)

    with pytest.raises(KeyError):
        fuzzing.throw(fuzzing.Target(name="x", inputs=st.integers(), read=crash), 500)

    def hang(value: int) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzzing, "LONGEST_S", 1)
    with pytest.raises(fuzzing.Hang):
        fuzzing.throw(fuzzing.Target(name="x", inputs=st.just(0), read=hang), 1)


def test_altered_json_and_damaged_bytes_differ_from_what_was_right(tmp_path: Path) -> None:
    seen = set()
    right = {"a": [1, 2], "b": {"c": "d"}}
    fuzzing.throw(
        fuzzing.Target(
            name="x", inputs=fuzzing.altered(right), read=lambda value: seen.add(repr(value))
        ),
        100,
    )
    assert len(seen) > 50
    seen.clear()
    fuzzing.throw(fuzzing.Target(name="x", inputs=fuzzing.damaged(b"abcdefgh" * 10), read=seen.add), 100)
    assert len(seen) > 50

"""Whatever is thrown at it, what reads others' files answers with one of our errors, or reads them."""

from __future__ import annotations

from pathlib import Path

import fuzzing
import pytest
from hypothesis import strategies as st

NAMES = (
    "budgets", "families", "profiles", "manifests", "safetensors",
    "checkpoints", "packages", "indexes", "registries", "tags",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzzing.Target]:
    return {target.name: target for target in fuzzing.targets(tmp_path_factory.mktemp("fuzzing"))}


@pytest.mark.parametrize("name", NAMES)
def test_nearly_right_input_gets_one_of_our_errors_or_is_read(name: str, targets: dict[str, fuzzing.Target]) -> None:
    assert fuzzing.throw(targets[name], 60) >= 60


def test_every_target_is_tested(targets: dict[str, fuzzing.Target]) -> None:
    assert set(targets) == set(NAMES)
    assert sum(fuzzing.shares(list(targets.values()), 1_000).values()) >= 1_000


def test_a_target_that_crashes_or_hangs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(value: int) -> None:
        if value > 100:
            raise KeyError(value)

    with pytest.raises(KeyError):
        fuzzing.throw(fuzzing.Target(name="x", share=1, inputs=st.integers(), read=crash), 500)

    def hang(value: int) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzzing, "LONGEST_S", 1)
    with pytest.raises(fuzzing.Hang):
        fuzzing.throw(fuzzing.Target(name="x", share=1, inputs=st.just(0), read=hang), 1)


def test_altered_json_and_damaged_bytes_differ_from_what_was_right(tmp_path: Path) -> None:
    seen = set()
    right = {"a": [1, 2], "b": {"c": "d"}}
    fuzzing.throw(
        fuzzing.Target(
            name="x", share=1, inputs=fuzzing.altered(right), read=lambda value: seen.add(repr(value))
        ),
        100,
    )
    assert len(seen) > 50
    seen.clear()
    fuzzing.throw(
        fuzzing.Target(name="x", share=1, inputs=fuzzing.damaged(b"abcdefgh" * 10), read=seen.add), 100
    )
    assert len(seen) > 50

"""The tree of errors and what an unknown name is answered with."""

from __future__ import annotations

import inspect
import re

import pytest

from klas_zoo import errors
from klas_zoo.errors import KlasZooError, UnknownName, UsageError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]


def test_the_tree_at_the_top_of_the_module_is_the_tree_of_classes() -> None:
    drawn: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└── ]*)([A-Z]\w+)\b", line)
        if match:
            depth = len(match.group(1)) // 4
            above[depth:] = [match.group(2)]
            drawn[match.group(2)] = above[depth - 1] if depth else None
    found = {c.__name__: None if c is KlasZooError else c.__bases__[0].__name__ for c in CLASSES}
    assert drawn == found


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_what_makes_no_sense_exits_with_2_and_what_cannot_be_done_with_1(error: type[KlasZooError]) -> None:
    assert error.exit_code == (2 if issubclass(error, UsageError) else 1)
    assert error.__doc__


@pytest.mark.parametrize(
    ("name", "known", "hint", "message"),
    [
        ("cqu", ["cpu", "gpu-0"], "", "Unknown device 'cqu': did you mean cpu?"),
        ("tpu", ["x", "a"], "", "Unknown device 'tpu': known: a, x."),
        ("tpu", [], "", "Unknown device 'tpu': none is known yet."),
        ("tpu", ["x"], "Measure it first.", "Unknown device 'tpu': known: x. Measure it first."),
        (
            "?",
            [f"d{n:02}" for n in range(14)],
            "",
            "Unknown device '?': known: d00, d01, d02, d03, d04, d05, d06, d07, d08, d09, d10, d11, ….",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_what_would_have_been_right(
    name: str, known: list[str], hint: str, message: str
) -> None:
    assert str(UnknownName("device", name, iter(known), hint)) == message


def test_an_unknown_name_tells_the_nearest_to_programs_too() -> None:
    error = UnknownName("family", "deit-mikro", ["deit-micro", "swin"])
    assert (error.kind, error.name, error.nearest) == ("family", "deit-mikro", ["deit-micro"])

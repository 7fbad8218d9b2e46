"""The one table of limits, how many images it asks for, and the page that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from klas_zoo.errors import UnknownName
from klas_zoo.exporters.limits import FEW, LEVEL, LIMITS, images_needed, limits_for
from klas_zoo.exporters.manifest import PRECISIONS

PAGE = Path(__file__).parent.parent / "docs" / "packages.md"


def test_every_precision_has_limits_and_lower_ones_are_wider() -> None:
    assert list(LIMITS) == list(PRECISIONS)
    relative = [one.relative for one in LIMITS.values()]
    assert relative == sorted(relative)


def test_untrained_networks_are_compared_by_their_logits() -> None:
    for precision, limits in LIMITS.items():
        random = limits_for(precision, "random")
        assert (random.relative, random.min_cosine) == (limits.relative, limits.min_cosine)
        assert (random.min_agreement, random.most_lost) == ((0.999, None) if precision == "fp32" else (0.0, None))
        assert limits_for(precision, "pretrained") == limits


def test_an_unknown_precision_is_one_sentence() -> None:
    with pytest.raises(UnknownName, match="Unknown precision 'fp12'"):
        limits_for("fp12", "pretrained")


def test_as_many_images_are_needed_as_the_limits_ask_for() -> None:
    assert {name: images_needed(one) for name, one in LIMITS.items()} == {
        "fp32": 299, "fp16": 3334, "bf16": 656, "int8": 656
    }  # fmt: skip
    assert all(images_needed(limits_for(name, "random")) == 299 for name in LIMITS)


def number(value: float | None, scale: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{round(scale * value, 10):.10g}{unit}"


def test_the_page_shows_this_table() -> None:
    rows = [
        f"| {name} | {round(one.relative, 10):.10f}".rstrip("0").rstrip(".")
        + f" | {number(one.min_cosine)} | {number(one.min_agreement, 100, ' %')}"
        + f" | {number(one.most_lost)} | {images_needed(one):,} |"
        for name, one in LIMITS.items()
    ]
    text = re.sub(r" +", " ", PAGE.read_text(encoding="utf-8"))
    assert "\n".join(re.sub(r" +", " ", row) for row in rows) in text
    assert f"{100 * LEVEL:g} %" in text and f"fewer than {FEW} images" in text

"""Quantities as people write and read them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from klas_zoo.errors import BadQuantity
from klas_zoo.units import format_latency, format_macs, format_size, parse_latency_ms, parse_size_bytes, printable


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("5ms", 5.0),
        ("200us", 0.2),
        ("200µs", 0.2),  # the micro sign
        ("200μs", 0.2),  # the Greek letter
        ("1.5s", 1500.0),
        ("800ns", 0.0008),
        (" 5 ms ", 5.0),
        (".5MS", 0.5),
        ("2.ms", 2.0),
    ],
)
def test_a_latency_is_read_as_milliseconds(text: str, expected_ms: float) -> None:
    assert parse_latency_ms(text) == pytest.approx(expected_ms)


@pytest.mark.parametrize(
    ("text", "expected_bytes"),
    [
        ("50MB", 50_000_000),
        ("48MiB", 48 * 1024 * 1024),
        ("900kB", 900_000),
        ("1GB", 10**9),
        ("1.5GiB", 1_610_612_736),
        ("7b", 7),
    ],
)
def test_a_size_is_read_as_bytes(text: str, expected_bytes: int) -> None:
    assert parse_size_bytes(text) == expected_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "ms",
        "-5ms",
        "+5ms",
        "0ms",
        "0.0s",
        "5 m s",
        "5min",
        "nan ms",
        "infs",
        "1,5ms",
        "\u0665ms",  # an Arabic five
        "5MB",
        "9" * 400 + "ms",
        "." + "0" * 400 + "1ms",
    ],
)
def test_what_is_no_latency_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(BadQuantity, match=r"is not a latency: write it as 5ms, 200us or 1\.5s") as raised:
        parse_latency_ms(text)
    assert len(str(raised.value)) < 200
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "5", "MB", "-5MB", "0MB", "5ms", "5TB"])
def test_what_is_no_size_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(BadQuantity, match="is not a size: write it as 50MB, 48MiB, 900kB or 1GB"):
        parse_size_bytes(text)


@given(st.text() | st.from_regex(r"\s?-?[0-9.]{0,70}\s?[a-zµμ]{0,3}", fullmatch=True))
@example("0." + "0" * 60 + "1ns")
@example("9" * 61 + " s")
@example("1\u212aB")  # the sign of kelvin, whose lower case is k
def test_any_text_is_a_quantity_above_zero_or_refused(text: str) -> None:
    for parse in (parse_latency_ms, parse_size_bytes):
        try:
            value = parse(text)
        except BadQuantity:
            continue
        assert 0 < value < math.inf


@given(st.floats(min_value=1e-4, max_value=1e6))
def test_a_latency_reads_back_within_three_digits(latency_ms: float) -> None:
    text = format_latency(latency_ms)
    assert parse_latency_ms(text) == pytest.approx(latency_ms, rel=0.0051)
    assert re.fullmatch(r"[0-9]+(\.[0-9]+)? m?s", text)


@given(st.integers(1, 10**13))
def test_a_size_reads_back_within_three_digits(size_bytes: int) -> None:
    assert parse_size_bytes(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.0051)


@pytest.mark.parametrize(
    ("latency_ms", "expected"),
    [
        (0.0, "0.000 ms"),
        (0.0001, "0.000100 ms"),
        (0.05, "0.0500 ms"),
        (0.412, "0.412 ms"),
        (5.0, "5.00 ms"),
        (12.34, "12.3 ms"),
        (999.4, "999 ms"),
        (1520.0, "1.52 s"),
    ],
)
def test_a_latency_is_shown_with_three_digits(latency_ms: float, expected: str) -> None:
    assert format_latency(latency_ms) == expected


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (812_345, "812 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (14_200_000, "14.2 MB"),
        (999_999_999, "1.00 GB"),
    ],
)
def test_a_size_is_shown_in_powers_of_ten(size_bytes: int, expected: str) -> None:
    assert format_size(size_bytes) == expected


@pytest.mark.parametrize(
    ("macs", "expected"),
    [(6_600_000, "6.6 M"), (999_900_000, "1 G"), (1_258_000_000, "1.26 G"), (1_020 * 10**9, "1.02 T")],
)
def test_multiply_adds_are_shown_without_exponents(macs: int, expected: str) -> None:
    assert format_macs(macs) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("deit.1-3 [/x] é 𝕏", "deit.1-3 [/x] é 𝕏"),
        ("two\nlines", "two\nlines"),
        ("\x1b[2J\a\r", "\\x1b[2J\\x07\\r"),
        ("\ud800", "\\ud800"),
        ("\u202eevil", "\\u202eevil"),  # it would turn the line around
    ],
)
def test_a_text_from_outside_commands_no_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()

"""What JSON from elsewhere is checked for."""

from __future__ import annotations

import pytest

from klas_zoo.errors import NewerPackage
from klas_zoo.stored import is_plain_name, is_sha256, refuse_newer, schema_of


@pytest.mark.parametrize("table", [None, [], "1", {}, *({"schema_version": one} for one in (0, -1, True, 1.0, "1"))])
def test_what_klas_zoo_cannot_have_written_has_no_schema(table: object) -> None:
    assert schema_of(table) is None


def test_a_schema_is_a_whole_number_from_one_on() -> None:
    assert schema_of({"schema_version": 3}) == 3


def test_only_a_newer_schema_is_refused_and_the_message_names_both() -> None:
    refuse_newer(2, 2, "there", NewerPackage)
    with pytest.raises(NewerPackage) as caught:
        refuse_newer(3, 2, "there", NewerPackage)
    assert str(caught.value) == (
        "there was written by a newer klas-zoo: its schema is 3, this one knows up to 2. Upgrade klas-zoo."
    )


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-o", "a/b", "a\\b", "a\n", "ä", "a" * 256, None, 1])
def test_a_name_that_could_lead_out_of_a_folder_is_no_plain_one(name: object) -> None:
    assert not is_plain_name(name)


def test_names_of_engines_are_plain() -> None:
    assert is_plain_name("tiny+3-5_small.v2.onnx")
    assert is_plain_name("a" * 255)


@pytest.mark.parametrize("value", ["0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", None, 0])
def test_only_64_small_hexadecimal_digits_are_a_sha256(value: object) -> None:
    assert not is_sha256(value)


def test_64_hexadecimal_digits_are_one() -> None:
    assert is_sha256("0123456789abcdef" * 4)

"""Reading JSON and TOML: what types say is checked, and every error names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from klas_zoo.errors import NewerPackage, PackageError
from klas_zoo.reading import (
    PlainName,
    Positive,
    Sha256,
    convert,
    is_plain_name,
    is_sha256,
    read,
    refuse_newer,
    schema_of,
)


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


@dataclass(frozen=True, kw_only=True)
class Part:
    sha256: Sha256
    kind: Literal["weights", "graph"] = "graph"

    def __post_init__(self) -> None:
        if self.kind == "weights" and self.sha256.startswith("0"):
            raise ValueError("weights do not begin with a zero")


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: PlainName
    parts: tuple[Part, ...]
    folder: Path | None = None
    named: Mapping[str, Positive] = field(default_factory=dict)


PART = {"sha256": "1" * 64}


def test_what_a_type_describes_is_read() -> None:
    content = json.dumps({"schema_version": 1, "name": "a", "parts": [PART], "folder": "x", "named": {"a": 1}})
    found = read(content, Whole, "it", PackageError, newest=1, hook=lambda kind, value: Path("/") / value)
    assert found == Whole(name="a", parts=(Part(sha256="1" * 64),), folder=Path("/x"), named={"a": 1})
    assert read('name = "a"\nparts = []', Whole, "it", PackageError, form="TOML") == Whole(name="a", parts=())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "../a"}, r"it: name is not valid: expected str matching regex .*, not '../a'\."),
        ({"name": None}, r"it: name is not valid: expected str, not None\."),
        ({"parts": [PART, {}]}, r"it: parts\[1\] is not valid: object missing required field sha256\."),
        ({"parts": [{**PART, "kind": "x"}]}, r"parts\[0\]\.kind is .* expected one of 'weights', 'graph', not 'x'\."),
        ({"parts": [{"sha256": "0" * 64, "kind": "weights"}]}, r"parts\[0\] is .*: weights do not begin with a zero\."),
        ({"parts": "many " * 20}, r"expected array, not 'many .*\.\.\.\."),
        ({"named": {"a": 0}}, r"it: named\[\.\.\.\] is not valid: expected int >= 1\."),
        ({"more": 1, "parts": [{**PART, "size": 2}]}, r"it: unknown fields more, parts\[0\]\.size\."),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_field(change: dict[str, Any], says: str) -> None:
    table = {"name": "a", "parts": [PART], **change}
    with pytest.raises(PackageError, match=f"{says}$"):
        convert(table, Whole, "it", PackageError)
    if "more" in change:
        assert convert(table, Whole, "it", PackageError, more=True).name == "a"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", r"^it is not JSON: it is no text\. Copy it again\.$"),
        (b"[" * 100_000, r"^it is not JSON: .*\. Copy it again\.$"),
        (b"[]", r"^it is not valid: its outermost value is no object\."),
        (b'{"a": NaN}', r"^it is not JSON: NaN is no number\."),
        (b"{}", r"^it was not written by klas-zoo: it has no schema_version\."),
        (b'{"schema_version": 3}', r"^it was written by a newer klas-zoo: its schema is 3"),
    ],
)
def test_what_is_no_such_file_at_all_is_one_sentence_too(content: bytes, says: str) -> None:
    with pytest.raises(PackageError, match=says):
        read(content, Whole, "it", PackageError, newest=2, advice="Copy it again.")

"""Image folders as people make them: numbered classes, hidden files, links, flat validation images."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageDataset
from timm.utils.misc import natural_key as timms_key
from toys import write_images

from klas_zoo.data.classes import natural_key, number_classes, read_classes
from klas_zoo.data.opened import Opened
from klas_zoo.data.scanning import scan
from klas_zoo.data.sources import open_images
from klas_zoo.errors import DataError

NUMBERED = ("1", "2", "10", "20", "3")


def write(folder: Path, names: tuple[str, ...] = ("ant", "bee"), held: str = "val") -> Path:
    write_images(folder / "train", names, 3)
    write_images(folder / held, names, 2)
    return folder


def class_of(opened: Opened, label: int) -> set[str]:
    """Folders of the images that have a label."""
    sources = (opened.train, opened.test)
    return {Path(s.name(i)).parent.name for s in sources for i, one in enumerate(s.labels) if one == label}


def test_numbered_folders_are_in_the_order_of_their_numbers_and_that_is_said(tmp_path: Path) -> None:
    opened = open_images(write(tmp_path, NUMBERED), None)
    assert opened.classes == ("1", "2", "3", "10", "20")
    assert [class_of(opened, label) for label in range(5)] == [{"1"}, {"2"}, {"3"}, {"10"}, {"20"}]
    assert opened.notes == (
        "Classes are numbered in natural order, as timm does: number 1 is '2'. In alphabetical order, as torchvision "
        "does, it would be '10'. Pass --classes FILE to state the order of the checkpoints.",
    )
    # in alphabetical order: 1, 10, 2, 20, 3
    assert opened.alternatives == {"alphabetical order": [0, 2, 4, 1, 3]}


@pytest.mark.parametrize("names", [NUMBERED, ("a", "B", "c"), ("n01440764", "n01443537"), ("x1y10", "x1y9", "X1y8")])
def test_the_order_is_timms_own(names: tuple[str, ...], tmp_path: Path) -> None:
    opened = open_images(write(tmp_path, names), None)
    theirs = ImageDataset(str(tmp_path / "train")).reader.class_to_idx
    assert {name: number for number, name in enumerate(opened.classes)} == theirs


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="/\0"), min_size=1), min_size=2, unique=True))
def test_natural_order_is_timms_for_any_ascii_name(names: list[str]) -> None:
    ours = sorted(names, key=natural_key)
    keys = [timms_key(name) for name in ours]
    assert keys == sorted(keys)


def test_nothing_is_said_where_both_orders_are_the_same(tmp_path: Path) -> None:
    opened = open_images(write(tmp_path, ("01", "02", "10")), None)
    assert (opened.notes, opened.alternatives) == ((), {})


LISTS = {
    "classes.txt": "cat\nant\n\nbee\n",
    "classes.json": '["cat", "ant", "bee"]',
    "map.json": '{"ant": 1, "bee": 2, "cat": 0}',
    "turned.json": '{"0": "cat", "1": "ant", "2": "bee"}',
    "index.json": '{"0": ["cat", "Felis"], "1": ["ant", "x"], "2": ["bee", "y"]}',
    "bom.txt": "\ufeffcat\r\nant\r\nbee\r\n",
}


@pytest.mark.parametrize("file", LISTS)
def test_a_list_of_classes_states_the_order(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(LISTS[file], encoding="utf-8")
    opened = open_images(write(tmp_path, ("ant", "bee", "cat")), None, 3, read_classes(tmp_path / file))
    assert opened.classes == ("cat", "ant", "bee")
    assert [class_of(opened, label) for label in range(3)] == [{"cat"}, {"ant"}, {"bee"}]


def test_a_folder_may_have_some_of_the_listed_classes(tmp_path: Path) -> None:
    opened = open_images(write(tmp_path), None, 4, ("cat", "bee", "dog", "ant"))
    assert set(opened.train.labels) == {1, 3}


def test_imagenets_synsets_are_a_list_that_comes_along(tmp_path: Path) -> None:
    assert read_classes("imagenet-1k")[948] == "n07742313"
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01443537 goldfish, Carassius auratus\nn01440764 tench\n")
    assert read_classes(tmp_path / "LOC_synset_mapping.txt") == ("n01443537", "n01440764")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no names"),
        ("a\nb\na\n", "has 'a' twice"),
        (b"\xff\xfe\x00", "is not a list of class names"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_list_of_classes_is_one_sentence(text: Any, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=sentence):
        read_classes(file)


@pytest.mark.parametrize("value", ["{", "3", '["a", 3]', '{"a": 1, "b": 2}', '{"a": "x"}', "{}", "[]"])
def test_json_that_is_no_list_of_classes_is_one_sentence(value: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(value)
    with pytest.raises(DataError, match=r"--classes .*x\.json (is not a list of class names: .*|has no names)\.$"):
        read_classes(tmp_path / "x.json")


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"--classes names 2 classes, the family has 3\."):
        number_classes(["a"], 3, "images", ("a", "b"))
    with pytest.raises(DataError, match=r"images has classes that --classes does not name: z\. It names a, b\."):
        number_classes(["a", "z"], 2, "images", ("a", "b"))


@pytest.mark.parametrize("held", ["validation", "valid", "test", "eval", "Val", "VALIDATION"])
def test_other_names_of_the_validation_folder_are_known(held: str, tmp_path: Path) -> None:
    assert len(open_images(write(tmp_path, held=held), None).test.labels) == 4
    (tmp_path / "train").rename(tmp_path / "Train")
    assert len(open_images(tmp_path, None).train.labels) == 6


def test_an_empty_val_does_not_hide_test(tmp_path: Path) -> None:
    write(tmp_path, held="test")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".DS_Store").touch()
    assert len(open_images(tmp_path, None).test.labels) == 4


def test_hidden_and_system_files_and_folders_are_skipped(tmp_path: Path) -> None:
    before = open_images(write(tmp_path), None)
    images = [before.train.name(k) for k in range(6)]
    for place in (tmp_path / "train", tmp_path / "train" / "ant", tmp_path / "val"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000", "lost+found"):
            (place / name).mkdir()
            shutil.copy(images[0], place / name / "x.png")
        for name in (".DS_Store", "Thumbs.db", "._0.png", ".hidden.jpg", "labels.txt"):
            (place / name).write_bytes(b"x")
    after = open_images(tmp_path, None)
    assert [after.train.name(k) for k in range(len(after.train.labels))] == images
    assert "hidden and system folders were skipped: .Trash-1000 (2), .ipynb_checkpoints (2)" in after.notes[0]


def test_suffixes_of_any_case_and_kind_are_taken_and_others_counted(tmp_path: Path) -> None:
    write(tmp_path)
    image = Image.open(tmp_path / "train" / "ant" / "0.png")
    for name in ("a.PNG", "b.JPEG", "c.Jpg", "d.gif", "e.jfif", "f.TIFF"):
        image.save(tmp_path / "train" / "ant" / name, format={"c.Jpg": "JPEG", "e.jfif": "JPEG"}.get(name))
    for name in ("x.heic", "y.HEIC", "z.svg"):
        (tmp_path / "train" / "ant" / name).touch()
    opened = open_images(tmp_path, None)
    assert list(opened.train.labels).count(0) == 9
    note = f"{tmp_path}/train: images of kinds that Pillow cannot read were left out: .heic (2), .svg (1)."
    assert opened.notes == (note,)


def test_nested_folders_belong_to_their_class(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copytree(tmp_path / "train" / "bee", tmp_path / "train" / "ant" / "more" / "still")
    assert list(open_images(tmp_path, None).train.labels).count(0) == 6


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "train" / "ant" / "loop").symlink_to("..")
    (tmp_path / "real" / "train" / "ant" / "far").symlink_to("/")
    (tmp_path / "real" / "train" / "ant" / "other").symlink_to(tmp_path / "real" / "val" / "bee")
    opened = open_images(tmp_path / "data", None)
    assert list(opened.train.labels).count(0) == 3 + 2
    assert "links to a folder above were not followed: " in opened.notes[0] and "ant/far" in opened.notes[0]


def test_a_class_that_is_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "train" / "cow").symlink_to(tmp_path / "mount" / "cow")
    with pytest.raises(DataError, match=r"train/cow is a link to something that does not exist\."):
        open_images(tmp_path, None)


def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    write(tmp_path)
    odd = os.fsencode(str(tmp_path / "train" / "ant")) + b"/caf\xe9.png"
    shutil.copy(tmp_path / "train" / "ant" / "0.png", odd)
    opened = open_images(tmp_path, None)
    names = [opened.train.name(k) for k in range(4)]
    assert any(name.endswith("caf\\xe9.png") for name in names)
    assert b"".join(opened.train.identity()).count(b"caf\xe9.png") == 1
    for k in range(4):
        opened.train.image(k)


def test_empty_classes_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("10", "9", "x\ny"):
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(DataError, match=r"in 3 of its folders, which hold no image \(.*\): 9, 10, x\\ny\. Remove"):
        open_images(tmp_path, None)


def test_images_in_no_class_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    shutil.copy(tmp_path / "val" / "ant" / "0.png", tmp_path / "train" / "0.png")
    with pytest.raises(DataError, match=r"has no usable classes \(images in no class: 1\)\. .*\(a labels\.csv"):
        open_images(tmp_path, None)


def test_a_name_is_the_same_however_its_accents_are_written(tmp_path: Path) -> None:
    """As a copy from macOS has them, beside one from Linux and a list from an editor."""
    names = {form: [unicodedata.normalize(form, name) for name in ("café", "bar")] for form in ("NFC", "NFD")}
    assert names["NFC"] != names["NFD"]
    write_images(tmp_path / "train", names["NFC"], 2)
    write_images(tmp_path / "val", names["NFD"], 2)
    (tmp_path / "classes.txt").write_text("\n".join(names["NFD"]), encoding="utf-8")
    assert open_images(tmp_path, None, 2).classes == ("bar", "café")
    listed = open_images(tmp_path, None, 2, read_classes(tmp_path / "classes.txt"))
    assert (listed.classes, list(listed.test.labels)) == (("café", "bar"), [1, 1, 0, 0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place))
        os.chmod(place, 0o755)
        (folder / "train" / "bee").chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"train/bee cannot be read: Permission denied\."):
                scan(folder / "train")
        finally:
            os.seteuid(0)


FLAT = {
    "LOC_val_solution.csv": "ImageId,PredictionString\n{0},{1} 85 1 499 272 \n{2},{3} 1 2 3 4 {3} 5 6 7 8\n",
    "val.csv": "filename,label\n{0}.png,{1}\n{2}.png,{3}\n",
    "labels.csv": "{0}.png;{1}\n{2}.png;{3}\n",
    "annotations.csv": "id,class,x\nfolder/{0}.png,{1},1\nfolder/{2}.png,{3},2\n",
    "val_annotations.txt": "{0}.png\t{1}\t0\t32\t44\t62\n{2}.png\t{3}\t1\t1\t2\t2\n",
}
XML = "<annotation><filename>x</filename><object><name>{}</name></object><object><name>no</name></object></annotation>"


def flat(folder: Path, inside: str = "val") -> Path:
    """Two validation images in one folder: the first a bee, the second an ant."""
    write_images(folder / "train", ("ant", "bee"), 3)
    (folder / inside).mkdir(parents=True)
    for number, name in enumerate(("v1", "v2")):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / inside / f"{name}.png")
    return folder


@pytest.mark.parametrize("place", ["val", "."])
@pytest.mark.parametrize("file", FLAT)
def test_flat_validation_images_have_classes_from_a_table(file: str, place: str, tmp_path: Path) -> None:
    inside = "val/images" if (file, place) == ("val_annotations.txt", "val") else "val"
    flat(tmp_path, inside)
    (tmp_path / place / file).write_text(FLAT[file].format("v1", "bee", "v2", "ant"))
    opened = open_images(tmp_path, None)
    assert [(Path(opened.test.name(k)).name, opened.test.labels[k]) for k in range(2)] == [("v2.png", 0), ("v1.png", 1)]
    assert any("are read from" in note and file in note for note in opened.notes)


@pytest.mark.parametrize("place", ["Data/CLS-LOC", "."])
def test_imagenets_own_layout_is_known(place: str, tmp_path: Path) -> None:
    folder = flat(tmp_path / place)
    annotations = tmp_path / "Annotations" / "CLS-LOC" / "val" if place != "." else folder / "val"
    annotations.mkdir(parents=True, exist_ok=True)
    for name, kind in (("v1", "bee"), ("v2", "ant")):
        (annotations / f"{name}.xml").write_text(XML.format(kind))
    opened = open_images(folder, None)
    assert [Path(opened.test.name(k)).name for k in range(2)] == ["v2.png", "v1.png"]
    (annotations / "v1.xml").unlink()
    with pytest.raises(DataError, match=r"v1\.xml does not exist: every image needs its annotation\."):
        open_images(folder, None)
    (annotations / "v1.xml").write_text("<x>")
    with pytest.raises(DataError, match=r"v1\.xml cannot be read: "):
        open_images(folder, None)
    (annotations / "v1.xml").write_text("<x/>")
    with pytest.raises(DataError, match=r"v1\.xml names no object\."):
        open_images(folder, None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v1.png,bee\n", r"v2\.png has no row in .*val\.csv\."),
        ("v1.png,bee\nv2.png,\n", r"Row 2 of .*val\.csv has no class\."),
        ("v1.png,bee\nv2.png,cow\n", r"train has a class 'ant' that .*val does not have"),
        ("", r"has no row in"),
    ],
)
def test_a_table_that_does_not_fit_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (flat(tmp_path) / "val.csv").write_text(text)
    with pytest.raises(DataError, match=sentence):
        open_images(tmp_path, None)


def test_paths_may_be_text(tmp_path: Path) -> None:
    assert open_images(str(write(tmp_path)), None).classes == ("ant", "bee")
    (tmp_path / "names.json").write_text(json.dumps(["ant", "bee"]))
    assert read_classes(str(tmp_path / "names.json")) == ("ant", "bee")

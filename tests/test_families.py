"""Family files: what they may say, and what each mistake is answered with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from klas_zoo.errors import FamilyError, UnknownName
from klas_zoo.families.specs import AnchorSpec, builtin_families, find_family, read_family

GOOD = """\
name = "mine"
input_shape = [3, 224, 224]
num_classes = 100

[[anchors]]
name = "tiny"
model = "deit_tiny_patch16_224"

[[anchors]]
name = "small"
model = "deit_small_patch16_224"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_family_file_without_extras_has_their_defaults(tmp_path: Path) -> None:
    spec = read_family(written(tmp_path, GOOD))
    assert (spec.name, spec.input_shape, spec.num_classes) == ("mine", (3, 224, 224), 100)
    assert (spec.description, spec.preset, spec.direction, spec.sample) == ("", "quick", "up", None)
    assert spec.anchors == (
        AnchorSpec(name="tiny", model="deit_tiny_patch16_224", checkpoint=None, arguments={}),
        AnchorSpec(name="small", model="deit_small_patch16_224", checkpoint=None, arguments={}),
    )


def test_files_a_family_names_lie_beside_it(tmp_path: Path) -> None:
    text = 'description = "three"\npreset = "paper"\nsample = "some/images"\n' + GOOD
    text += 'checkpoint = "weights/small.pth"\narguments = { drop_path_rate = 0.1, fc_norm = true }\n'
    spec = read_family(written(tmp_path, text))
    assert (spec.description, spec.preset, spec.sample) == ("three", "paper", tmp_path / "some/images")
    assert spec.anchors[1].checkpoint == tmp_path / "weights/small.pth"
    assert spec.anchors[1].arguments == {"drop_path_rate": 0.1, "fc_norm": True}


def test_a_checkpoint_may_lie_anywhere(tmp_path: Path) -> None:
    elsewhere = (tmp_path / "elsewhere.pth").absolute()
    spec = read_family(written(tmp_path, GOOD + f'checkpoint = "{elsewhere}"'))
    assert spec.anchors[1].checkpoint == elsewhere


def test_an_anchor_is_found_by_its_name(tmp_path: Path) -> None:
    spec = read_family(written(tmp_path, GOOD))
    assert spec.anchor("small").model == "deit_small_patch16_224"
    with pytest.raises(UnknownName, match="Unknown anchor 'smal': did you mean small"):
        spec.anchor("smal")


TOP = GOOD.partition("\n\n")[0] + "\n"
ONE = '[[anchors]]\nname = "tiny"\nmodel = "deit_tiny_patch16_224"\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name = ", "mine.toml is not TOML: "),
        (GOOD.replace('name = "mine"\n', ""), "mine.toml is not valid: object missing required field name."),
        (GOOD.replace("num_classes = 100\n", ""), "object missing required field num_classes."),
        (GOOD.replace("input_shape = [3, 224, 224]\n", ""), "object missing required field input_shape."),
        (TOP, "object missing required field anchors."),
        (
            GOOD.replace('model = "deit_tiny_patch16_224"\n', ""),
            "anchors[0] is not valid: object missing required field model.",
        ),
        (GOOD.replace('name = "tiny"\n', ""), "anchors[0] is not valid: object missing required field name."),
        (TOP + ONE, "a family needs two anchors or more, each of another name; found ['tiny']."),
        (TOP + ONE + ONE, "each of another name; found ['tiny', 'tiny']."),
        ("anchors = []\n" + TOP, "a family needs two anchors or more"),
        ('anchors = ["tiny", "small"]\n' + TOP, "anchors[0] is not valid: expected object, not 'tiny'."),
        ('anchors = "tiny"\n' + TOP, "anchors is not valid: expected array, not 'tiny'."),
        ("weigths = 3\n" + GOOD, "unknown fields weigths."),
        (GOOD + 'chekpoint = "x"\nargs = {}\n', "mine.toml: unknown fields anchors[1].args, anchors[1].chekpoint."),
        (GOOD.replace('"mine"', "3"), "name is not valid: expected str, not 3."),
        (GOOD.replace("100", "true"), "num_classes is not valid: expected int, not True."),
        (GOOD.replace("100", "0"), "num_classes is not valid: expected int >= 1, not 0."),
        (GOOD.replace("100", '"100"'), "num_classes is not valid: expected int, not '100'."),
        (GOOD.replace("100", "100.0"), "num_classes is not valid: expected int, not 100.0."),
        (
            GOOD.replace("[3, 224, 224]", "[224, 224]"),
            "input_shape is not valid: expected array of length 3, not [224, 224].",
        ),
        (GOOD.replace("[3, 224, 224]", "[true, 2, 2]"), "input_shape[0] is not valid: expected int, not True."),
        (GOOD.replace("[3, 224, 224]", "[3, 0, 224]"), "input_shape[1] is not valid: expected int >= 1, not 0."),
        (GOOD.replace("[3, 224, 224]", "[3, 2.0, 2]"), "input_shape[1] is not valid: expected int, not 2.0."),
        (GOOD.replace("[3, 224, 224]", "224"), "input_shape is not valid: expected array, not 224."),
        ('preset = "slow"\n' + GOOD, "preset is not valid: expected one of 'quick', 'paper', not 'slow'."),
        ('direction = "left"\n' + GOOD, "direction is not valid: expected one of 'up', 'down', 'both', not 'left'."),
        ("description = 3\n" + GOOD, "description is not valid: expected str, not 3."),
        (GOOD + "checkpoint = 3\n", "anchors[1].checkpoint is not valid: expected the path of a file, not 3."),
        (GOOD + 'arguments = "drop"\n', "anchors[1].arguments is not valid: expected object, not 'drop'."),
    ],
)
def test_a_mistake_in_a_family_file_is_named_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(FamilyError) as caught:
        read_family(file)
    message = str(caught.value)
    assert sentence in message
    assert str(file) in message
    assert message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a.b", "a b", "-x", "_x", "a+b", "Ünder", "x" * 65, "a\\nb"])
@pytest.mark.parametrize("place", ['"mine"', '"tiny"'], ids=["family", "anchor"])
def test_a_name_that_would_not_do_in_a_file_name_is_refused(tmp_path: Path, place: str, name: str) -> None:
    file = written(tmp_path, GOOD.replace(place, f'"{name}"'))
    with pytest.raises(FamilyError, match="a name is made of letters, digits, - and _, not"):
        read_family(file)


@pytest.mark.parametrize("name", ["x" * 64, "3", "A-b_c", "train"])
def test_other_names_are_taken(tmp_path: Path, name: str) -> None:
    assert read_family(written(tmp_path, GOOD.replace('"mine"', f'"{name}"'))).name == name


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=r"Family file .*none\.toml cannot be read: No such file or directory\.$"):
        find_family(str(tmp_path / "none.toml"))


def test_a_folder_is_no_family(tmp_path: Path) -> None:
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(FamilyError, match="cannot be read: Is a directory"):
        find_family(str(tmp_path / "x.toml"))


def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FamilyError, match="is not TOML"):
        find_family(str(tmp_path / "x.toml"))


def test_an_unknown_family_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        find_family("deit-mikro")
    assert str(caught.value).startswith("Unknown family 'deit-mikro': did you mean deit-micro")
    assert str(caught.value).endswith("A family of your own is named by its .toml file.")


def test_the_built_in_families_hold_their_anchors_from_small_to_large() -> None:
    families = builtin_families()
    assert {name: [anchor.name for anchor in spec.anchors] for name, spec in families.items()} == {
        "caformer": ["s18", "s36", "m36", "b36"],
        "convnext": ["tiny", "small", "base"],
        "deit-micro": ["tiny", "small", "base"],
        "deit": ["tiny", "small", "base"],
        "deit3": ["small", "medium", "base"],
        "edgenext": ["xx-small", "x-small", "small", "base"],
        "efficientnet": ["mobile", "b0", "b1", "b2"],
        "efficientvit": ["b0", "b1", "b2", "b3"],
        "hgnetv2": ["b0", "b1", "b2", "b3", "b4", "b5"],
        "levit": ["levit128s", "levit128", "levit192", "levit256", "levit384"],
        "mobilenetv4": ["small", "medium", "hybrid-medium", "large"],
        "repvit": ["m0-9", "m1-0", "m1-1", "m1-5", "m2-3"],
        "resnet-swin": ["resnet18", "swin-tiny"],
        "resnet": ["resnet18", "resnet50"],
        "sbb-vit": ["little", "medium", "betwixt", "mediumd"],
        "swin": ["tiny", "small", "base"],
        "swinv2": ["tiny", "small", "base"],
        "tiny-vit": ["5m", "11m", "21m"],
    }
    for spec in families.values():
        assert find_family(spec.name) == spec
        assert spec.description
    micro = families["deit-micro"]
    assert micro.sample is not None and micro.sample.is_dir()
    assert all(anchor.checkpoint is not None for anchor in micro.anchors)
    others = (spec for spec in families.values() if spec.sample is None)
    assert all(anchor.checkpoint is None for spec in others for anchor in spec.anchors)


def test_listing_families_does_not_import_torch() -> None:
    code = "import sys, klas_zoo.families.specs as f; f.builtin_families(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

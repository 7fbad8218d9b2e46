"""Pretrained anchors that do not know the images stop a build before it starts, with the likely reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from klas_zoo.building.label_check import check_labels
from klas_zoo.chains import Chain
from klas_zoo.data.loading import Data, load_data
from klas_zoo.errors import DataError
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import builtin_families

CLASSES = 12
CONFIG: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


class Brightness(nn.Module):
    """Knows classes by the brightness of their images, k / 12 of white, and numbers them by `order`."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.order = order

    def forward(self, features: Tensor) -> Tensor:
        brightness = features.mean((1, 2, 3))[:, None] * self.scale
        levels = torch.tensor([(k + 0.5) / CLASSES for k in range(CLASSES)])
        return -((brightness - levels[torch.tensor(self.order)]) ** 2)


def family(order: list[int] | None = None, **changes: Any) -> Family:
    chain = Chain(nn.Identity(), [nn.Identity()], Brightness(order or [*range(CLASSES)]), input_shape=(3, 8, 8))
    return Family.of("bright", {"only": chain}, CONFIG | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes named 1 … 12; natural order is that of brightness."""
    place = tmp_path_factory.mktemp("bright")
    for split, count in (("train", 8), ("val", 10)):
        for k in range(CLASSES):
            (place / split / str(k + 1)).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((8, 8, 3), round(255 * (k + 0.5) / CLASSES), np.uint8)
                Image.fromarray(pixels).save(place / split / str(k + 1) / f"{number}.png")
    return place


def images(folder: Path, classes: list[str] | None = None) -> Data:
    return load_data(
        folder, sample=None, num_classes=CLASSES, data_config={**CONFIG, "input_size": (3, 8, 8)}, classes=classes
    )


def test_anchors_that_know_their_classes_pass(folder: Path) -> None:
    verdict = check_labels(family(), images(folder))[0]
    assert (verdict.right, verdict.images, verdict.is_chance) == (1.0, 120, False)
    assert verdict.chance == pytest.approx(1 / CLASSES)


def in_text_order() -> list[int]:
    """The class that an anchor trained by torchvision has in each place: 1, 10, 11, 12, 2 …"""
    return [int(name) - 1 for name in sorted(map(str, range(1, CLASSES + 1)))]


def test_an_alphabetical_order_is_recognised_and_the_way_out_works(folder: Path) -> None:
    anchors = family(in_text_order())
    with pytest.raises(DataError) as caught:
        check_labels(anchors, images(folder))
    assert str(caught.value) == (
        "Anchor only is right on 8.3% of 120 test images; guessing gives 8.3%. In alphabetical order of the class "
        "folders it would be right on 100.0%: pass --classes FILE with the names in that order (LC_ALL=C ls DIR/train "
        "> FILE). Pass --force to build anyway."
    )
    names = sorted(map(str, range(1, CLASSES + 1)))
    assert check_labels(anchors, images(folder, names))[0].right == 1.0


def test_any_other_order_is_recognised_by_agreement_within_classes(folder: Path) -> None:
    turned = [*range(1, CLASSES), 0]
    with pytest.raises(DataError, match=r"right on 0\.0% of 120 .* Its answers agree within each class \(100\.0%\)"):
        check_labels(family(turned), images(folder))


def test_an_anchor_that_knows_nothing_is_told_from_one_of_another_order(folder: Path) -> None:
    class Guess(Brightness):
        def forward(self, features: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(len(features))
            return torch.rand(len(features), CLASSES, generator=generator) * self.scale

    chain = Chain(nn.Identity(), [nn.Identity()], Guess([]), input_shape=(3, 8, 8))
    with pytest.raises(DataError, match=r"Its checkpoint may be for other classes .* prepared otherwise than here \("):
        check_labels(Family.of("guess", {"g": chain}, CONFIG), images(folder))


def test_other_preprocessing_is_noticed(folder: Path) -> None:
    dark = images(folder)
    dark = replace(dark, test=load_data(
        folder, sample=None, num_classes=CLASSES,
        data_config={**CONFIG, "input_size": (3, 8, 8), "mean": (2.0,) * 3},
    ).test)  # fmt: skip
    with pytest.raises(DataError, match=r"guessing gives 8\.3%"):
        check_labels(family(), dark)


def test_force_only_reports(folder: Path) -> None:
    said: list[str] = []
    check_labels(family(in_text_order()), images(folder), force=True, say=said.append)
    assert len(said) == 1 and said[0].endswith("Building anyway (--force).")


def test_anchors_drawn_at_random_are_not_tried(folder: Path) -> None:
    assert check_labels(replace(family(in_text_order()), weights="random"), images(folder)) == []


def test_a_check_that_passed_is_not_repeated_and_one_that_failed_is(folder: Path, tmp_path: Path) -> None:
    assert check_labels(family(), images(folder), cache=tmp_path / "c")
    assert check_labels(family(), images(folder), cache=tmp_path / "c") == []
    for _ in range(2):
        with pytest.raises(DataError):
            check_labels(family(in_text_order()), images(folder), cache=tmp_path / "other")


def test_two_classes_turned_around_are_noticed(tmp_path: Path) -> None:
    for split, count in (("train", 8), ("val", 20)):
        for k, name in enumerate(("no", "yes")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((8, 8, 3), 10 + 230 * k, np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")

    class Two(Brightness):
        def forward(self, features: Tensor) -> Tensor:
            dark = features.mean((1, 2, 3)) * self.scale
            return torch.stack([dark, 1 - dark], 1)  # yes first

    chain = Chain(nn.Identity(), [nn.Identity()], Two([]), input_shape=(3, 8, 8))
    data = load_data(tmp_path, sample=None, num_classes=2, data_config={**CONFIG, "input_size": (3, 8, 8)})
    with pytest.raises(DataError, match=r"right on 0\.0% of 40 .*guessing gives 50\.0%\. Its answers agree"):
        check_labels(Family.of("two", {"t": chain}, CONFIG), data)


def test_the_embedded_family_knows_its_sample() -> None:
    spec = builtin_families()["deit-micro"]
    micro = load_family(spec)
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=micro.data_config)
    found = check_labels(micro, data)
    assert [one.images for one in found] == [200] * 3
    assert all(one.right > 0.5 for one in found)

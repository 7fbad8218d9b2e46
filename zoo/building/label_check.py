"""Whether pretrained anchors and labels belong together, found out on a few images before hours are spent.

A wrong order of classes, a checkpoint for other classes, or other preprocessing leaves anchors at chance; probes
and tuning would not notice, and would learn the wrong labels. So every anchor is tried on test images first.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Data, Split, batches
from klas_zoo.errors import DataError
from klas_zoo.families.anchors import Family
from klas_zoo.files import make_directory

IMAGES = 200
_BATCH = 50
_ABOVE_CHANCE = 0.1  # of the way from chance to always right: no trained anchor is below
_PER_CLASS = 5  # images of a class from which on agreement within classes means something


@dataclass(frozen=True, kw_only=True)
class LabelVerdict:
    """What an anchor answers on a few test images.

    Attributes:
        right: share of answers that are the labels, 0..1.
        chance: the share that always naming the most frequent class would give.
        alternatives: the share that is right in another order of the classes, by its name.
        agreement: the share of answers that are the most frequent one of their class; None: too few images of each.
    """

    anchor: str
    images: int
    right: float
    chance: float
    alternatives: Mapping[str, float]
    agreement: float | None

    @property
    def is_chance(self) -> bool:
        return self.right <= self.least

    @property
    def least(self) -> float:
        """The share of right answers up to which an anchor counts as guessing."""
        return self.chance + _ABOVE_CHANCE * (1 - self.chance)

    def reason(self, data_config: Mapping[str, object]) -> str:
        """What is most likely wrong, a sentence."""
        better = {name: share for name, share in self.alternatives.items() if share > max(self.least, 2 * self.right)}
        if better:
            name = max(better, key=lambda one: better[one])
            return (
                f"In {name} of the class folders it would be right on {better[name]:.1%}: pass --classes FILE with the "
                "names in that order (LC_ALL=C ls DIR/train > FILE)."
            )
        if self.agreement is not None and self.agreement > (1 + self.least) / 2:
            return (
                f"Its answers agree within each class ({self.agreement:.1%}), so it knows these images and numbers "
                "their classes in another order: pass --classes FILE with the names in the order of its checkpoint."
            )
        prepared = ", ".join(f"{name} {data_config.get(name)}" for name in ("mean", "std", "crop_pct", "interpolation"))
        return (
            "Its checkpoint may be for other classes or another order of them (--classes FILE), or its images were "
            f"prepared otherwise than here ({prepared})."
        )


def check_labels(
    family: Family,
    data: Data,
    *,
    device: str = "cpu",
    force: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[LabelVerdict]:
    """Tries every pretrained anchor on `IMAGES` test images; those drawn at random are not tried.

    Args:
        force: only report.
        cache: a folder in which it is noted that a check passed, so that a build that is resumed does not repeat it.

    Raises:
        DataError: an anchor is no better than chance; says the likely reason.
    """
    if family.weights != "pretrained":
        return []
    noted = cache / f"labels-{_key(family, data)}.json" if cache else None
    if noted is not None and noted.exists():
        return []
    split = _some(data.test)
    found = [_verdict(name, chain, split, data, device) for name, chain in family.chains.items()]
    bad = [one for one in found if one.is_chance]
    for one in bad:
        sentence = (
            f"Anchor {one.anchor} is right on {one.right:.1%} of {one.images} test images; guessing gives "
            f"{one.chance:.1%}. {one.reason(family.data_config)}"
        )
        if not force:
            raise DataError(f"{sentence} Pass --force to build anyway.")
        say(f"{sentence} Building anyway (--force).")
    if noted is not None and not bad:
        make_directory(noted.parent)
        noted.write_text(json.dumps({one.anchor: one.right for one in found}), encoding="utf-8")
    return found


def _some(split: Split) -> Split:
    """The same few images every time, of all classes alike as far as chance goes."""
    chosen = np.random.default_rng(0).permutation(len(split.indices))[:IMAGES]
    return Split(split.source, [split.indices[position] for position in sorted(chosen)], split.transform)


def _verdict(name: str, chain: Chain, split: Split, data: Data, device: str) -> LabelVerdict:
    if device != "cpu" and next(chain.parameters()).device.type != device:
        chain = copy.deepcopy(chain).to(device)  # the caller's stays where it is
    answers, labels = [], []
    with torch.inference_mode(), evaluating(chain):
        for images, truth in batches(split, _BATCH, device=device):
            answers.append(chain(images).argmax(1).cpu().numpy())
            labels.append(truth.cpu().numpy())
    given, wanted = np.concatenate(answers), np.concatenate(labels)
    alternatives = {
        order: float((given == np.asarray(numbers)[wanted]).mean()) for order, numbers in data.alternatives.items()
    }
    return LabelVerdict(
        anchor=name,
        images=len(wanted),
        right=float((given == wanted).mean()),
        chance=max(1 / chain.classes, float(np.bincount(wanted).max() / len(wanted))),
        alternatives=alternatives,
        agreement=_agreement(given, wanted),
    )


def _agreement(given: np.ndarray, wanted: np.ndarray) -> float | None:
    classes: Sequence[int] = np.unique(wanted).tolist()
    if len(wanted) < _PER_CLASS * len(classes):
        return None
    return float(sum(np.bincount(given[wanted == label]).max() for label in classes) / len(wanted))


def _key(family: Family, data: Data) -> str:
    config = sorted((name, str(value)) for name, value in family.data_config.items())
    text = json.dumps([family.fingerprint, family.architecture, data.test_fingerprint, config])
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""What a build starts from, loaded and checked before any of its stages: anchors with their heads, and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klas_zoo.building.label_check import check_labels
from klas_zoo.building.new_heads import with_new_heads
from klas_zoo.building.settings import BuildSettings
from klas_zoo.data.classes import read_classes
from klas_zoo.data.damage import DamageCheck
from klas_zoo.data.loading import Data, load_data
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.progress.listeners import Listener


@dataclass(frozen=True, kw_only=True)
class InputOptions:
    """Where anchors and images come from, and what is tolerated.

    Attributes:
        data: as `load_data` takes it.
        weights: a folder with a checkpoint for every anchor.
        classes: a list of class names in the order of the checkpoints, or where it is, see `read_classes`.
        skip_damaged: how many images that cannot be decoded are left out.
        fit_heads: anchors for other classes get new heads.
        force: go on although an anchor is no better than chance.
    """

    data: str | Path | None = None
    weights: str | Path | None = None
    random_weights: bool = False
    classes: str | Path | Sequence[str] | None = None
    skip_damaged: int = 0
    fit_heads: bool = False
    force: bool = False


def load_inputs(
    spec: FamilySpec,
    settings: BuildSettings,
    options: InputOptions,
    *,
    cache: Path,
    device: str,
    listener: Listener,
    team: Team = ALONE,
    family: Family | None = None,
    dry_run: bool = False,
) -> tuple[Family, Data]:
    """Anchors and images, ready for `klas_zoo.building.job.build`.

    Args:
        cache: a folder of the registry in which it is remembered what was checked and fitted.
        device: torch's, on which heads are fitted and labels are checked.
        family: chains that are there already, instead of those that `spec` describes.
        dry_run: check nothing that takes time.

    Raises:
        KlasZooError: anchors or images cannot be used, or do not belong together.
    """
    if options.random_weights:
        listener.say("RANDOM WEIGHTS: these networks are not trained; accuracies mean nothing.")
    loaded = family or load_family(
        spec, weights_folder=options.weights, random_weights=options.random_weights, seed=settings.seed,
        new_heads=options.fit_heads,
    )  # fmt: skip
    listed = options.classes
    damage = DamageCheck(
        allowed=options.skip_damaged, cache=cache, processes=settings.workers or None, team=team,
        say=listener.say, watch=listener.stage,
    )  # fmt: skip
    images = load_data(
        options.data,
        sample=spec.sample,
        num_classes=loaded.num_classes,
        data_config=loaded.data_config,
        augmentation=settings.tuning.augmentation,
        seed=settings.seed,
        classes=read_classes(listed) if isinstance(listed, (str, Path)) else listed,
        # without the check, a dry run could not know which images are skipped
        damage=damage if options.skip_damaged or not dry_run else None,
    )
    for sentence in (*_accounts(loaded), *loaded.notes, *images.notes):
        listener.say(sentence)
    if not dry_run:
        loaded = with_new_heads(
            loaded, images, device=device, batch=settings.batch, workers=settings.workers, cache=cache,
            team=team, listener=listener,
        )  # fmt: skip
        check_labels(
            loaded, images, device=device, force=options.force, cache=cache, say=listener.say
        )
    return loaded, images


def _accounts(family: Family) -> list[str]:
    """What was done to checkpoints, one line; nothing where they were plain."""
    told = [f"{name} from {account}" for name, account in family.checkpoints.items() if ": " in account]
    return [f"Weights: {' | '.join(told)}."] if told else []

"""Tuning that never costs an anchor: each keeps the better of its tuned weights and those it came with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate


@dataclass(frozen=True, kw_only=True)
class AnchorChoice:
    """Top-1 in per cent of one anchor's weights before and after tuning, and which of them it keeps."""

    before: float
    after: float

    @property
    def keeps_tuned(self) -> bool:
        return self.after >= self.before


def keep_better_anchors(
    supernet: Supernet, originals: Mapping[str, Chain], batches: Iterable[Batch], *, team: Team = ALONE
) -> dict[str, AnchorChoice]:
    """Gives anchors that tuning made worse their old weights back; stitches keep the tuned ones.

    Args:
        originals: the anchors before tuning; copies of them are kept.
        batches: images that nothing was tuned on, and that do not report accuracy either.

    Raises:
        DataError: there are no images.
    """
    anchors = [route for route in supernet.routes if route.is_anchor]
    images = list(batches)
    before = evaluate(Supernet(dict(originals), anchors), anchors, images, team=team)
    after = evaluate(supernet, anchors, images, team=team)
    found = {}
    for route in anchors:
        name = route.segments[0].anchor
        found[name] = AnchorChoice(before=before[route], after=after[route])
        if not found[name].keeps_tuned:
            supernet.keep_original(name, copy.deepcopy(originals[name]))
    return found

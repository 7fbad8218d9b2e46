"""The stages of a build of a family that comes with a tuned supernet: they replace selection and tuning.

    shipped routes → shipped supernet → evaluate tuned
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

from klas_zoo.building.cache import Json
from klas_zoo.building.context import BuildContext
from klas_zoo.building.pipeline import Stage, Work
from klas_zoo.building.tuning_stages import Tune
from klas_zoo.chains import Chain
from klas_zoo.registry import Registry
from klas_zoo.routes import Route
from klas_zoo.selection import Selection
from klas_zoo.selection.candidates import to_candidates
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.shipped import ShippedSupernet


class ShippedRoutes(Stage[Selection]):
    """The stitches of the tuned supernet that comes with the family. Runs no network."""

    name = "shipped routes"
    instant = True

    def __init__(self, context: BuildContext) -> None:
        self.context = context

    def inputs(self) -> Json:
        return {"supernet": _shipped_digest(self.context)}

    def run(self, work: Work) -> Selection:
        context, shipped = self.context, _shipped(self.context)
        work.listener.say(
            f"{context.family.name} comes with a tuned supernet of {len(shipped.routes)} routes, which is used as it "
            "is: pass --preset quick to select and tune stitches anew."
        )
        settings = context.settings.selection
        seams = [route.seams[0] for route in shipped.routes if len(route.seams) == 1]
        found = to_candidates(context.family.chains, seams, context.macs, settings.buckets_each)
        names = list(context.family.chains)
        pairs = {tuple(sorted((one.source, one.target), key=names.index)) for one in seams}
        return Selection(
            settings=settings, pairs=tuple(sorted(pairs, key=lambda pair: names.index(pair[0]))),  # type: ignore[arg-type]
            candidates=tuple(replace(one, reason="shipped") for one in found),
        )  # fmt: skip


class Shipped(Tune):
    """The tuned supernet that comes with the family."""

    name = "shipped supernet"
    version = 1

    def __init__(self, context: BuildContext, registry: Registry) -> None:
        self.context, self.registry = context, registry

    def inputs(self) -> Json:
        return {"anchors": self.context.anchors(), "supernet": _shipped_digest(self.context)}

    def run(self, work: Work) -> Supernet:
        family = self.context.family
        found = _shipped(self.context).load(family.chains, family.anchor_fingerprints)
        return found.to(self.context.device.torch_device)

    def _parts(self) -> tuple[dict[str, Chain], tuple[Route, ...]]:
        return copy.deepcopy(self.context.family.chains), _shipped(self.context).routes


def _shipped(context: BuildContext) -> ShippedSupernet:
    assert context.family.supernet is not None
    return ShippedSupernet.read(context.family.supernet)


def _shipped_digest(context: BuildContext) -> str:
    assert context.family.supernet is not None
    return hashlib.sha256(context.family.supernet.read_bytes()).hexdigest()

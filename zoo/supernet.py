"""The supernet: all anchors and the stitching layers of the chosen stitches, weights shared.

A route is executed as a list of steps: a stem, blocks, stitching layers, a head. Two routes
that begin with the same steps share that work in `forward_all`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from klas_zoo.chains import Chain, Layout, mismatch
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Route, Seam


class StitchingLayer(nn.Module):
    """One linear map with bias, the same for every token or position.

    Features in the layout of the source → the same number of vectors in the layout of the target.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.linear = nn.Linear(source.width, target.width)

    def forward(self, features: Tensor) -> Tensor:
        return self.target.arrange(self.linear(self.source.channels_last(features)))


class Step(NamedTuple):
    """One module of a route; equal steps are the same module with the same weights."""

    kind: Literal["stem", "block", "seam", "head"]
    anchor: str = ""
    block: int = 0
    seam: Seam | None = None


def steps_of(route: Route) -> tuple[Step, ...]:
    """The steps that execute a route, in order."""
    seams = iter(route.seams)
    steps = [Step("stem", route.segments[0].anchor)]
    for index, segment in enumerate(route.segments):
        if index > 0:
            steps.append(Step("seam", seam=next(seams)))
        steps += [Step("block", segment.anchor, k) for k in range(segment.first, segment.last + 1)]
    return (*steps, Step("head", route.segments[-1].anchor))


class Supernet(nn.Module):
    """Anchors and stitching layers behind one interface: images and a route give logits.

    Args:
        chains: the anchors; the supernet shares their modules.
        routes: every route it must be able to execute.

    Raises:
        SelectionError: a route has a seam that no stitching layer can join; says why.
    """

    def __init__(self, chains: dict[str, Chain], routes: Iterable[Route]) -> None:
        super().__init__()
        # the prefix keeps names such as "half" apart from nn.Module's own methods
        self.chains = nn.ModuleDict({f"anchor_{name}": chain for name, chain in chains.items()})
        self.routes = tuple(dict.fromkeys(routes))
        seams = sorted({seam for route in self.routes for seam in route.seams})
        self._keys = {seam: f"{index:04d}" for index, seam in enumerate(seams)}
        self.stitches = nn.ModuleDict({self._keys[seam]: self._new_layer(seam) for seam in seams})

    def _new_layer(self, seam: Seam) -> StitchingLayer:
        source = self.chain(seam.source).layouts[seam.i]
        target = self.chain(seam.target).layouts[seam.j]
        if reason := mismatch(source, target):
            raise SelectionError(f"There is no seam {seam}: {reason}.")
        return StitchingLayer(source, target)

    def chain(self, name: str) -> Chain:
        return self.chains[f"anchor_{name}"]  # type: ignore[return-value]

    @property
    def seams(self) -> tuple[Seam, ...]:
        return tuple(self._keys)

    def stitch(self, seam: Seam) -> StitchingLayer:
        return self.stitches[self._keys[seam]]  # type: ignore[return-value]

    def module(self, step: Step) -> nn.Module:
        """The module that executes a step."""
        if step.seam is not None:
            return self.stitch(step.seam)
        chain = self.chain(step.anchor)
        return chain.blocks[step.block - 1] if step.kind == "block" else getattr(chain, step.kind)

    def forward(self, images: Tensor, route: Route) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes) of one route."""
        features = images
        for step in steps_of(route):
            features = self.module(step)(features)
        return features

    def forward_all(self, images: Tensor, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Logits of many routes for the same images; every shared prefix is computed once.

        Routes come in the order of the tree of their steps, not in the order given. At any
        moment at most one feature tensor per branching on the current path is alive.
        """
        yield from self._descend(images, [(steps_of(route), route) for route in routes])

    def _descend(
        self, features: Tensor, paths: list[tuple[tuple[Step, ...], Route]]
    ) -> Iterator[tuple[Route, Tensor]]:
        while True:
            branches: dict[Step, list[tuple[tuple[Step, ...], Route]]] = {}
            for steps, route in paths:
                if steps:
                    branches.setdefault(steps[0], []).append((steps[1:], route))
                else:
                    yield route, features
            if len(branches) != 1:
                break
            # no branching: a loop instead of a call lets go of the features before
            step, paths = branches.popitem()
            features = self.module(step)(features)
        for step, below in branches.items():
            yield from self._descend(self.module(step)(features), below)

    def narrowed(self, routes: Iterable[Route]) -> Supernet:
        """One of fewer routes, which shares the modules they need and knows no others."""
        wanted = tuple(routes)
        used = {segment.anchor for route in wanted for segment in route.segments}
        names = [name.removeprefix("anchor_") for name in self.chains]
        found = Supernet({name: self.chain(name) for name in names if name in used}, wanted)
        for seam in found.seams:
            found.stitches[found._keys[seam]] = self.stitch(seam)
        return found

    def network(self, route: Route) -> nn.Sequential:
        """One route as a plain module of its own that shares the supernet's weights."""
        return nn.Sequential(*(self.module(step) for step in steps_of(route)))

    def freeze_statistics(self) -> None:
        """Evaluation mode for every normalisation that keeps running statistics.

        Routes feed a block differently; running statistics would mix them and fit none.
        """
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):  # batch and instance norms
                module.eval()

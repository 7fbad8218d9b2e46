"""The supernet: all anchors and the stitching layers of the chosen stitches, weights shared.

A route is executed as a list of steps: a stem, blocks, stitching layers, a head. Two routes
that begin with the same steps share that work in `forward_all`. A stitch may have a few tensors for itself
behind its last seam, see `klas_zoo.route_tensors`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from klas_zoo.chains import Chain, Layout, mismatch
from klas_zoo.errors import SelectionError
from klas_zoo.route_tensors import OwnTensors, RouteTensors, tensors_by_route
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


class RouteStep(NamedTuple):
    """One module of a route; equal steps are the same module with the same weights.

    `owner` is the route whose own tensors the step uses; None: all its tensors are shared.
    """

    kind: Literal["stem", "block", "seam", "head"]
    anchor: str = ""
    block: int = 0
    seam: Seam | None = None
    owner: Route | None = None

    @property
    def part(self) -> str:
        """Its name among a route's own tensors."""
        return str(self.block) if self.kind == "block" else self.kind


def steps_of(route: Route) -> tuple[RouteStep, ...]:
    """The steps that execute a route, in order."""
    seams = iter(route.seams)
    steps = [RouteStep("stem", route.segments[0].anchor)]
    for index, segment in enumerate(route.segments):
        if index > 0:
            steps.append(RouteStep("seam", seam=next(seams)))
        steps += [RouteStep("block", segment.anchor, k) for k in range(segment.first, segment.last + 1)]
    return (*steps, RouteStep("head", route.segments[-1].anchor))


class Supernet(nn.Module):
    """Anchors and stitching layers behind one interface: images and a route give logits.

    Args:
        chains: the anchors; the supernet shares their modules.
        routes: every route it must be able to execute.
        own: which tensors every stitch has for itself.

    Raises:
        SelectionError: a route has a seam that no stitching layer can join; says why.
    """

    def __init__(self, chains: dict[str, Chain], routes: Iterable[Route], own: OwnTensors | None = None) -> None:
        super().__init__()
        # the prefix keeps names such as "half" apart from nn.Module's own methods
        self.chains = nn.ModuleDict({f"anchor_{name}": chain for name, chain in chains.items()})
        self.routes = tuple(dict.fromkeys(routes))
        seams = sorted({seam for route in self.routes for seam in route.seams})
        self._keys = {seam: f"{index:04d}" for index, seam in enumerate(seams)}
        self.stitches = nn.ModuleDict({self._keys[seam]: self._new_layer(seam) for seam in seams})
        self.own = nn.ModuleDict()
        self.originals = nn.ModuleDict()
        if own:
            self.give_own(own)

    @classmethod
    def of_state(cls, chains: dict[str, Chain], routes: Iterable[Route], state: Mapping[str, Tensor]) -> Supernet:
        """A supernet that can load a state: with the routes' own tensors and the original anchors of that state."""
        found = cls(chains, routes)
        by_key = tensors_by_route(state, "own.")
        kept = {name.split(".")[1] for name in state if name.startswith("originals.")}
        for key in sorted(kept):
            found.originals[key] = copy.deepcopy(found.chains[key])
        found.own.update({key: RouteTensors(tensors) for key, tensors in sorted(by_key.items())})
        return found

    def give_own(self, kinds: OwnTensors, *, seed: int = 0) -> None:
        """Gives every stitch tensors of its own, which change nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        for route in self.routes:
            if route.is_anchor:
                continue
            last = route.segments[-1]
            chain = self.chain(last.anchor)
            parts = {str(k): chain.blocks[k - 1] for k in range(last.first, last.last + 1)}
            self.own[_key(route)] = RouteTensors.copied({**parts, "head": chain.head}, kinds, generator)

    def keep_original(self, name: str, chain: Chain) -> None:
        """Lets an anchor run as `chain`, its weights before tuning; stitches use the tuned ones."""
        self.originals[f"anchor_{name}"] = chain

    def own_tensors(self, route: Route) -> RouteTensors | None:
        """What a route has for itself."""
        found = _key(route)
        return self.own[found] if found in self.own else None  # type: ignore[return-value]  # noqa: SIM401  no .get

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

    def module(self, step: RouteStep) -> nn.Module:
        """The module that executes a step."""
        if step.seam is not None:
            return self.stitch(step.seam)
        chain = self.chain(step.anchor)
        if step.owner is not None and step.owner.is_anchor:
            chain = self.originals[f"anchor_{step.anchor}"]  # type: ignore[assignment]
        found: nn.Module = chain.blocks[step.block - 1] if step.kind == "block" else getattr(chain, step.kind)
        own = self.own_tensors(step.owner) if step.owner is not None else None
        return own.view(step.part, found) if own is not None else found

    def steps(self, route: Route) -> tuple[RouteStep, ...]:
        """The steps that execute a route here.

        Those behind its last seam may use tensors of its own, those of an anchor its original weights.
        """
        steps = steps_of(route)
        if route.is_anchor and f"anchor_{route.segments[0].anchor}" in self.originals:
            return tuple(step._replace(owner=route) for step in steps)
        if self.own_tensors(route) is None:
            return steps
        behind = max(index for index, step in enumerate(steps) if step.kind == "seam") + 1
        return (*steps[:behind], *(step._replace(owner=route) for step in steps[behind:]))

    def forward(self, images: Tensor, route: Route) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes) of one route."""
        features = images
        for step in self.steps(route):
            features = self.module(step)(features)
        return features

    def forward_all(self, images: Tensor, routes: Sequence[Route]) -> Iterator[tuple[Route, Tensor]]:
        """Logits of many routes for the same images; every shared prefix is computed once.

        Routes come in the order of the tree of their steps, not in the order given. At any
        moment at most one feature tensor per branching on the current path is alive.
        """
        yield from self._descend(images, [(self.steps(route), route) for route in routes])

    def _descend(
        self, features: Tensor, paths: list[tuple[tuple[RouteStep, ...], Route]]
    ) -> Iterator[tuple[Route, Tensor]]:
        while True:
            branches: dict[RouteStep, list[tuple[tuple[RouteStep, ...], Route]]] = {}
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
        for route in wanted:
            if (own := self.own_tensors(route)) is not None:
                found.own[_key(route)] = own
            name = f"anchor_{route.segments[0].anchor}"
            if route.is_anchor and name in self.originals:
                found.originals[name] = self.originals[name]
        return found

    def network(self, route: Route) -> nn.Sequential:
        """One route as a plain module of its own that shares the supernet's weights."""
        return nn.Sequential(*(self.module(step) for step in self.steps(route)))

    def freeze_statistics(self) -> None:
        """Evaluation mode for every normalisation that keeps running statistics.

        Routes feed a block differently; running statistics would mix them and fit none.
        """
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):  # batch and instance norms
                module.eval()


def _key(route: Route) -> str:
    """A route's name as that of a module, which has no dots."""
    return str(route).replace(".", "/")

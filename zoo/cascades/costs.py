"""What cascades cost: the sum over the stages that are executed, each behind the features it continues from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from klas_zoo.cascades.definition import Cascade, CascadeCost, blocks_of
from klas_zoo.routes import Route


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What routes cost, in one unit: multiply-adds or milliseconds.

    Attributes:
        routes: of each, alone.
        suffix: of a route behind its first blocks, whose features are there; blocks 0: as in `routes`.
    """

    routes: Mapping[Route, float]
    suffix: Mapping[tuple[Route, int], float] = field(default_factory=dict)

    def behind(self, route: Route, blocks: int) -> float:
        """
        Raises:
            KeyError: it is not known.
        """
        return self.routes[route] if not blocks else self.suffix[route, blocks]

    def of(self, cascade: Cascade) -> CascadeCost:
        """The cost of every path."""
        total, paths = 0.0, []
        for stage in cascade.stages:
            total += self.behind(stage.route, stage.shared)
            paths.append(total)
        return CascadeCost(paths=tuple(paths))


def costs_of(
    routes: Iterable[Route], of_route: Callable[[Route], float], of_prefix: Callable[[Route, int], float]
) -> Costs:
    """Costs of routes and of all their suffixes.

    Args:
        of_prefix: what the stem and the first blocks of a route cost, with the stitching layers between them.
    """
    whole = {route: of_route(route) for route in routes}
    suffix = {
        (route, blocks): cost - of_prefix(route, blocks)
        for route, cost in whole.items()
        for blocks in range(1, blocks_of(route))
    }
    return Costs(routes=whole, suffix=suffix)

"""What the routes of a family cost, in multiply-adds and parameters."""

from __future__ import annotations

from collections.abc import Callable

from klas_zoo.families.anchors import Family
from klas_zoo.profiles.macs import ChainCost, Cost, chain_cost, route_cost, seam_cost
from klas_zoo.routes import Route, Seam


def part_costs(family: Family) -> dict[str, ChainCost]:
    """What the parts of every anchor cost."""
    return {name: chain_cost(chain, family.input_shape) for name, chain in family.chains.items()}


def route_costs(family: Family) -> Callable[[Route], Cost]:
    """A function that gives multiply-adds and parameters of any route of a family."""
    chains = family.chains
    costs = part_costs(family)

    def of_seam(seam: Seam) -> Cost:
        return seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])

    return lambda route: route_cost(route, costs, of_seam)

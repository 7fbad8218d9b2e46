"""The cost of a route in ms, predicted from the measured latencies of whole anchors."""

from __future__ import annotations

from collections.abc import Mapping

from klas_zoo.errors import SelectionError
from klas_zoo.profiles.macs import ChainCost
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import CostFunction


def latency_cost(chains: Mapping[str, ChainCost], anchors_ms: Mapping[str, float], macs: CostFunction) -> CostFunction:
    """Milliseconds of a route: each anchor's latency times the share of its multiply-adds that run.

    A stitching layer costs what as many multiply-adds of its target do. This is a prediction: it takes
    every multiply-add of an anchor to be equally fast, which stems and heads are not.

    Args:
        anchors_ms: of every whole anchor, on one device, at one batch size.
        macs: multiply-adds of a route.

    Raises:
        SelectionError: an anchor has no latency, or none above zero.
    """
    for name in chains:
        if not anchors_ms.get(name, 0.0) > 0:
            raise SelectionError(f"Anchor {name} has no measured latency above zero: {dict(anchors_ms)}.")
    rate = {name: anchors_ms[name] / chain.total.macs for name, chain in chains.items()}

    def cost(route: Route) -> float:
        milliseconds, counted = 0.0, 0
        for index, segment in enumerate(route.segments):
            chain = chains[segment.anchor]
            run = sum(chain.block_macs[segment.first - 1 : segment.last])
            run += chain.stem_macs if index == 0 else 0
            run += chain.head_macs if index == len(route.segments) - 1 else 0
            milliseconds += rate[segment.anchor] * run
            counted += run
        # what is left are the seams
        return milliseconds + rate[route.segments[-1].anchor] * (macs(route) - counted)

    return cost

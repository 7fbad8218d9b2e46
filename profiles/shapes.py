"""What latency models need to know of a family, counted on its chains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from klas_zoo.chains import Chain, Shape
from klas_zoo.profiles.interpolation import AnchorShape
from klas_zoo.profiles.macs import ChainCost, RouteCost, chain_cost, route_cost
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.traffic import ChainTraffic, PartTraffic, chain_traffic
from klas_zoo.routes import Route, Seam

# multiply-adds that a processor does while one byte comes from memory; only the shares of a guess count
CPU_MACS_PER_BYTE = 8.0
_FORMULAS = 0.05  # share of a network's multiply-adds that earlier versions may have counted otherwise


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Everything counted on the chains of one family; nothing of it depends on a device."""

    input_shape: Shape
    sha256: str
    costs: Mapping[str, ChainCost]
    traffic: Mapping[str, ChainTraffic]
    vectors: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, tuple[int, ...]]
    grids: Mapping[str, tuple[Shape, ...]]


def count(chains: Mapping[str, Chain], input_shape: Shape) -> Counted:
    """Counts multiply-adds, parameters, traffic and layouts of all chains.

    Raises:
        CountingError: an operator without a formula.
    """
    return Counted(
        input_shape=tuple(input_shape),
        sha256=architecture_sha256(chains, input_shape),
        costs={name: chain_cost(chain, input_shape) for name, chain in chains.items()},
        traffic={name: chain_traffic(chain, input_shape) for name, chain in chains.items()},
        vectors={name: tuple(one.vectors for one in chain.layouts) for name, chain in chains.items()},
        widths={name: tuple(one.width for one in chain.layouts) for name, chain in chains.items()},
        grids={name: tuple(one.grid for one in chain.layouts) for name, chain in chains.items()},
    )


def architecture_sha256(chains: Mapping[str, Chain], input_shape: Shape) -> str:
    """The content hash of a family as far as latency depends on it.

    That is the images' shape, the anchors' names and order, and of every part of every anchor the layout of its
    features and the shape and type of every tensor. Not the values of the weights, which tuning changes, nor the
    tensors' names, which are the code's.
    """
    content = {"input_shape": list(input_shape), "anchors": [[name, _parts(chain)] for name, chain in chains.items()]}
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _parts(chain: Chain) -> list[object]:
    def tensors(module: nn.Module) -> list[list[object]]:
        return sorted([list(one.shape), str(one.dtype)] for one in module.state_dict().values())

    layouts = [[list(one.grid), one.vectors, one.width] for one in chain.layouts]
    return [layouts, *(tensors(part) for part in (chain.stem, *chain.blocks, chain.head))]


def is_profile_of(profile: Profile, counted: Counted) -> bool:
    """Whether a profile is of a family's networks.

    Their hash says so, or, in profiles of earlier versions, whose hash depended on the names of tensors, everything
    that the profile itself says of them: the layouts after every block, parameters exactly, and multiply-adds but for
    operators that had no formula then.
    """
    if profile.family_sha256 == counted.sha256:
        return True
    model = profile.model
    if model is None or profile.input_shape != counted.input_shape or model.anchors.keys() != counted.costs.keys():
        return False
    for name, anchor in model.anchors.items():
        cost = counted.costs[name]
        if (anchor.vectors, anchor.widths) != (counted.vectors[name], counted.widths[name]):
            return False
        seen = profile.network(Route.anchor(name, len(anchor.block_ms)))
        if seen is None or seen.parameters != cost.total.parameters:
            return False
        if abs(seen.macs - cost.total.macs) > _FORMULAS * cost.total.macs:
            return False
    return True


def route_cost_of(counted: Counted, route: Route) -> RouteCost:
    """Multiply-adds and parameters of a route."""

    def of_seam(seam: Seam) -> RouteCost:
        before, after = counted.widths[seam.source][seam.i], counted.widths[seam.target][seam.j]
        vectors = counted.vectors[seam.target][seam.j]
        return RouteCost(macs=vectors * before * after, parameters=(before + 1) * after)

    return route_cost(route, counted.costs, of_seam)


def block_rows(counted: Counted) -> list[dict[str, object]]:
    """Every part of every anchor, for one image in fp32: `stem`, blocks by their number, `head`, and `whole`."""
    rows: list[dict[str, object]] = []
    for anchor, cost in counted.costs.items():
        parts = counted.traffic[anchor].parts
        names = ["stem", *map(str, range(1, len(cost.block_macs) + 1)), "head", "whole"]
        macs = [cost.stem_macs, *cost.block_macs, cost.head_macs, cost.total.macs]
        parameters = [cost.stem_parameters, *cost.block_parameters, cost.head_parameters, cost.total.parameters]
        moved = [part.bytes_moved() for part in parts]
        peaks = [part.peak_activation_bytes() for part in parts]
        columns = (names, macs, parameters, [*moved, sum(moved)], [*peaks, max(peaks)])
        fields = ("part", "macs", "parameters", "bytes_moved", "peak_activation_bytes")
        rows += [{"anchor": anchor, **dict(zip(fields, row, strict=True))} for row in zip(*columns, strict=True)]
    return rows


def shapes_of(counted: Counted, *, batch: int, bytes_each: int = 4) -> dict[str, AnchorShape]:
    """Anchors as `interpolation` takes them, with guesses for a batch."""
    return {name: _shape(counted, name, batch, bytes_each) for name in counted.costs}


def _shape(counted: Counted, name: str, batch: int, bytes_each: int) -> AnchorShape:
    cost, traffic, grids = counted.costs[name], counted.traffic[name], counted.grids[name]
    kinds = [(grids[k + 1], cost.block_parameters[k], cost.block_macs[k]) for k in range(len(cost.block_macs))]
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return AnchorShape(
        guesses=tuple(_guess(part, batch, bytes_each) for part in traffic.parts),
        groups=tuple(numbers[kind] for kind in kinds),
        macs=(cost.stem_macs, *cost.block_macs, cost.head_macs),
        vectors=counted.vectors[name],
        widths=counted.widths[name],
    )


def _guess(part: PartTraffic, batch: int, bytes_each: int) -> float:
    """Of a part's time, in multiply-adds: every operator takes what takes longer, its arithmetic or its bytes."""
    return sum(
        max(batch * one.macs, CPU_MACS_PER_BYTE * one.bytes_moved(batch, bytes_each)) for one in part.operations
    )

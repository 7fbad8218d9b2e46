"""Multiply-adds and parameters of modules, chains and routes.

One MAC is one multiply-add, 2 FLOPs; papers print MACs and often call them FLOPs. fvcore
counts, with its own conventions: matrix products and convolutions by their multiply-adds,
normalisations at a few per element (a layer norm with weights: 5). That is what gives the
published 1.26 / 4.61 / 17.58 G of DeiT-Ti/S/B, all of it for one image of 224×224.

fvcore knows no fused attention and would silently leave it out (DeiT-Ti: 1.08 G); here it has
a formula. An operator that has no formula and is not listed as free is an error, never zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klas_zoo.chains import Chain, Layout, Shape, evaluating, mismatch
from klas_zoo.errors import CountingError
from klas_zoo.routes import Route, Seam

if TYPE_CHECKING:
    from klas_zoo.families.anchors import Family

with warnings.catch_warnings():
    # importing fvcore compiles a loss function that is not used here, in a way torch deprecates
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape


@dataclass(frozen=True, kw_only=True)
class RouteCost:
    """`macs` for one image, and how many numbers the weights are."""

    macs: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class ChainCost:
    """What the parts of a chain cost, MACs for one image; blocks in order, the first one first."""

    stem_macs: int
    block_macs: tuple[int, ...]
    head_macs: int
    stem_parameters: int
    block_parameters: tuple[int, ...]
    head_parameters: int

    @property
    def total(self) -> RouteCost:
        """Of the whole anchor."""
        return RouteCost(
            macs=self.stem_macs + sum(self.block_macs) + self.head_macs,
            parameters=self.stem_parameters + sum(self.block_parameters) + self.head_parameters,
        )


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """MACs of one forward pass in evaluation mode; for the batch that is given, not per image.

    Raises:
        CountingError: an operator without a formula; names it and the module that uses it.
    """
    with evaluating(module), torch.no_grad():
        analysis = FlopCountAnalysis(module, inputs)
        analysis.set_op_handle(**COUNTED, **dict.fromkeys(FREE))
        # both are reported below, or mean nothing (an identity that leaves no trace)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        macs = int(analysis.total())
    _refuse_unknown(analysis, module)
    return macs


def count_parameters(module: nn.Module) -> int:
    """How many numbers a module's weights are; running statistics are not weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def chain_cost(chain: Chain, input_shape: Shape) -> ChainCost:
    """Counts every part of a chain for one image of `input_shape`, (C, H, W).

    Raises:
        CountingError: an operator without a formula.
    """
    device = next((p.device for p in chain.parameters()), torch.device("cpu"))
    features = torch.zeros(1, *input_shape, device=device)
    parts = [chain.stem, *chain.blocks, chain.head]
    macs = []
    with evaluating(chain), torch.no_grad():
        for part in parts:
            macs.append(count_macs(part, features))
            features = part(features)
    parameters = [count_parameters(part) for part in parts]
    return ChainCost(
        stem_macs=macs[0],
        block_macs=tuple(macs[1:-1]),
        head_macs=macs[-1],
        stem_parameters=parameters[0],
        block_parameters=tuple(parameters[1:-1]),
        head_parameters=parameters[-1],
    )


def seam_cost(source: Layout, target: Layout) -> RouteCost:
    """Of a stitching layer: one linear map with bias, for every token or position of one image."""
    if reason := mismatch(source, target):
        raise ValueError(f"no linear map joins the two: {reason}")
    return RouteCost(macs=source.vectors * source.width * target.width, parameters=(source.width + 1) * target.width)


def part_costs(family: Family) -> dict[str, ChainCost]:
    """What the parts of every anchor cost."""
    return {name: chain_cost(chain, family.input_shape) for name, chain in family.chains.items()}


def route_costs(family: Family) -> Callable[[Route], RouteCost]:
    """A function that gives multiply-adds and parameters of any route of a family."""
    costs, of_seam = part_costs(family), _seam_costs(family)
    return lambda route: route_cost(route, costs, of_seam)


def prefix_costs(family: Family) -> Callable[[Route, int], int]:
    """A function that gives `prefix_macs` of any route of a family."""
    costs, of_seam = part_costs(family), _seam_costs(family)
    return lambda route, blocks: prefix_macs(route, blocks, costs, of_seam)


def _seam_costs(family: Family) -> Callable[[Seam], RouteCost]:
    chains = family.chains
    return lambda seam: seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])


def route_cost(route: Route, chains: Mapping[str, ChainCost], of_seam: Callable[[Seam], RouteCost]) -> RouteCost:
    """The first segment brings its stem, the last its head, every seam its stitching layer.

    What a route runs twice, on its way there and back, costs twice and is held once.
    """
    first, last = chains[route.segments[0].anchor], chains[route.segments[-1].anchor]
    run = [(segment.anchor, k) for segment in route.segments for k in range(segment.first, segment.last + 1)]
    return RouteCost(
        macs=first.stem_macs
        + sum(chains[anchor].block_macs[k - 1] for anchor, k in run)
        + sum(of_seam(seam).macs for seam in route.seams)
        + last.head_macs,
        parameters=first.stem_parameters
        + sum(chains[anchor].block_parameters[k - 1] for anchor, k in set(run))
        + sum(of_seam(seam).parameters for seam in set(route.seams))
        + last.head_parameters,
    )


def prefix_macs(
    route: Route, blocks: int, chains: Mapping[str, ChainCost], of_seam: Callable[[Seam], RouteCost]
) -> int:
    """Multiply-adds of a route up to and including its block `blocks`: stem, blocks and the stitching layers between.

    Those of the stitching layer behind that block are no part of it, nor is the head.
    """
    run = [(number, s.anchor, k) for number, s in enumerate(route.segments) for k in range(s.first, s.last + 1)]
    seams = run[blocks - 1][0] if blocks else 0
    return (
        chains[route.segments[0].anchor].stem_macs
        + sum(chains[anchor].block_macs[k - 1] for _, anchor, k in run[:blocks])
        + sum(of_seam(seam).macs for seam in route.seams[:seams])
    )


def _refuse_unknown(analysis: FlopCountAnalysis, module: nn.Module) -> None:
    unknown = analysis.unsupported_ops()
    if not unknown:
        return
    operator = min(unknown)
    # an operator counts for its module and all that contain it: the longest name is the innermost
    name, owner = max(
        ((name, part) for name, part in module.named_modules() if operator in analysis.unsupported_ops(name)),
        key=lambda found: len(found[0]),
    )
    where = f"{name} ({type(owner).__name__})" if name else type(owner).__name__
    if operator.startswith("aten::_upsample"):
        raise CountingError(
            f"{where} resizes position embeddings for every image ({operator}), which is not counted: for images of "
            "one size state img_size among the arguments in the family file, and leave out dynamic_img_size."
        )
    raise CountingError(
        f"The operator {operator} in {where} cannot be counted: klas_zoo.profiles.macs.COUNTED needs a formula "
        "for its multiply-adds, or FREE the reason why it has none."
    )


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """q (…, N, E), k (…, M, E), v (…, M, F): N·M·E for the scores and N·M·F for their sums."""
    q, k, v = (get_shape(value) for value in inputs[:3])
    return int(math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))


def _vector_norm(inputs: list[Any], outputs: list[Any]) -> int:
    """Squares summed: one multiply-add for every element."""
    return math.prod(get_shape(inputs[0]))


def _linear_1d(inputs: list[Any], outputs: list[Any]) -> int:
    """Every element is a weighted sum of two neighbours."""
    return 2 * math.prod(get_shape(outputs[0]))


def _bicubic(inputs: list[Any], outputs: list[Any]) -> int:
    """Every element is a weighted sum of 4 × 4 neighbours."""
    return 16 * math.prod(get_shape(outputs[0]))


def _padded_convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """Weights (out, in / groups, …): every output element is a sum over all weights of its channel."""
    return math.prod(get_shape(outputs[0])) * math.prod(get_shape(inputs[1])[1:])


def _lstm(inputs: list[Any], outputs: list[Any]) -> int:
    """Tokens (…, D) times all weight matrices, of every layer and direction; gates are applied element by element."""
    weights = (get_shape(value) for value in inputs[2].node().inputs())
    return math.prod(get_shape(inputs[0])[:-1]) * sum(math.prod(one) for one in weights if len(one) == 2)


COUNTED: Mapping[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::_convolution_mode": _padded_convolution,
    "aten::linalg_vector_norm": _vector_norm,
    "aten::lstm": _lstm,
    "aten::rms_norm": _vector_norm,
    "aten::scaled_dot_product_attention": _attention,
    "aten::upsample_bicubic2d": _bicubic,
    "aten::upsample_linear1d": _linear_1d,
    "aten::var": _vector_norm,
}
"""Formulas for operators fvcore has none for: of the traced inputs and outputs, gives MACs."""

_REASONS = {
    "a few operations per element, no sum of products": (
        "add add_ sub sub_ rsub mul mul_ div div_ neg pow sqrt rsqrt exp sin cos softmax log_softmax sigmoid "
        "sigmoid_ tanh gelu silu silu_ hardswish hardswish_ hardsigmoid hardtanh hardtanh_ leaky_relu leaky_relu_ "
        "elu ceil floor "
        "clamp_min addcmul square relu6 softplus mish clamp reciprocal abs"
    ),
    "adds or compares elements, no products": "mean sum cumsum amax max max_pool2d avg_pool1d avg_pool2d ne eq gt lt",
    "moves, repeats or fills data, no arithmetic": (
        "unflatten reshape_as expand_as pad repeat clone alias repeat_interleave roll zeros ones meshgrid unfold "
        "index_select gather movedim tile full new_zeros pixel_unshuffle im2col col2im dropout_ flip one_hot"
    ),
}

FREE: Mapping[str, str] = {f"aten::{name}": reason for reason, names in _REASONS.items() for name in names.split()}
"""Operators without multiply-adds, besides those that fvcore itself ignores: name to reason."""

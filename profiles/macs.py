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
from typing import Any

import torch
from torch import nn

from klas_zoo.chains import Chain, Layout, Shape, mismatch
from klas_zoo.errors import CountingError
from klas_zoo.modes import evaluating
from klas_zoo.routes import Route, Seam

with warnings.catch_warnings():
    # importing fvcore compiles a loss function that nobody here uses, in a way torch deprecates
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape


@dataclass(frozen=True, kw_only=True)
class Cost:
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
    def total(self) -> Cost:
        """Of the whole anchor."""
        return Cost(
            macs=self.stem_macs + sum(self.block_macs) + self.head_macs,
            parameters=self.stem_parameters + sum(self.block_parameters) + self.head_parameters,
        )


def count_macs(module: nn.Module, *inputs: torch.Tensor) -> int:
    """MACs of one forward pass in evaluation mode; for the batch that is given, not per image.

    Raises:
        CountingError: an operator nobody can count; names it and the module that uses it.
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
        CountingError: an operator nobody can count.
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


def seam_cost(source: Layout, target: Layout) -> Cost:
    """Of a stitching layer: one linear map with bias, for every token or position of one image."""
    if reason := mismatch(source, target):
        raise ValueError(f"no linear map joins the two: {reason}")
    return Cost(macs=source.vectors * source.width * target.width, parameters=(source.width + 1) * target.width)


def route_cost(route: Route, chains: Mapping[str, ChainCost], of_seam: Callable[[Seam], Cost]) -> Cost:
    """The first segment brings its stem, the last its head, every seam its stitching layer.

    What a route runs twice, on its way there and back, costs twice and is held once.
    """
    first, last = chains[route.segments[0].anchor], chains[route.segments[-1].anchor]
    run = [(segment.anchor, k) for segment in route.segments for k in range(segment.first, segment.last + 1)]
    return Cost(
        macs=first.stem_macs
        + sum(chains[anchor].block_macs[k - 1] for anchor, k in run)
        + sum(of_seam(seam).macs for seam in route.seams)
        + last.head_macs,
        parameters=first.stem_parameters
        + sum(chains[anchor].block_parameters[k - 1] for anchor, k in set(run))
        + sum(of_seam(seam).parameters for seam in set(route.seams))
        + last.head_parameters,
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


COUNTED: Mapping[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::linalg_vector_norm": _vector_norm,
    "aten::scaled_dot_product_attention": _attention,
}
"""Formulas for operators fvcore has none for: of the traced inputs and outputs, gives MACs."""

_REASONS = {
    "a few operations per element, no sum of products": (
        "add add_ sub sub_ rsub mul mul_ div div_ neg pow sqrt rsqrt exp sin cos softmax log_softmax sigmoid "
        "sigmoid_ tanh gelu silu silu_ hardswish hardswish_ hardsigmoid hardtanh hardtanh_ leaky_relu elu "
        "clamp_min addcmul"
    ),
    "adds or compares elements, no products": "mean sum amax max_pool2d avg_pool2d",
    "moves, repeats or fills data, no arithmetic": "unflatten reshape_as expand_as pad repeat clone alias",
}

FREE: Mapping[str, str] = {f"aten::{name}": reason for reason, names in _REASONS.items() for name in names.split()}
"""Operators without multiply-adds, besides those that fvcore itself ignores: name to reason."""

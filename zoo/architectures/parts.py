"""Parts of models, for the modules that cut them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def part(model: Model, children: Iterable[str], *, parameters: bool = False) -> Model:
    """The same model with only some of its children, and its own parameters or none of them."""
    chosen = set(children)
    found = copy.copy(model)
    found._modules = {name: child for name, child in model._modules.items() if name in chosen}
    found._parameters = dict(model._parameters) if parameters else {}
    return found


def dropout(rate: float, *, like: nn.Module) -> nn.Dropout:
    """As a module what timm's classifiers do by a function, in the mode of another."""
    return nn.Dropout(rate).train(like.training)


def blocks_of(stages: Iterable[Any]) -> list[nn.Module]:
    """The blocks of all stages, one after another.

    What shrinks the grid at the start of a stage belongs to the first block of this stage, so that
    features after a block have the grid of the block's own stage.
    """
    blocks: list[nn.Module] = []
    for stage in stages:
        first, *others = stage.blocks
        if not isinstance(stage.downsample, nn.Identity):
            first = nn.Sequential(stage.downsample, first)
        blocks += [first, *others]
    return blocks

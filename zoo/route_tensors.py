"""Tensors that one route has for itself; everything else it shares with all routes.

Behind its last seam a route runs blocks that were made for another input. Two kinds of small tensors let it adapt
them without changing them for anybody else:

    norms       copies of the weights and biases of normalisations (as slimmable networks keep one set of
                normalisations a width: Yu et al. 2019, arXiv:1812.08928)
    low rank    updates B·A of linear maps (Hu et al. 2022, "LoRA", arXiv:2106.09685)

They are kilobytes a route. A block with them is a view: a module of its own that shares every other parameter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DOWN, _UP = "down", "up"


@dataclass(frozen=True, kw_only=True)
class OwnTensors:
    """Which tensors every stitch has for itself behind its last seam.

    Attributes:
        norms: copies of weights and biases of normalisations.
        rank: of updates of linear maps; 0 has none.
        blocks: how many blocks behind the seam have such updates.
    """

    norms: bool = False
    rank: int = 0
    blocks: int = 2

    def __bool__(self) -> bool:
        return self.norms or self.rank > 0


class LowRankLinear(nn.Module):
    """A linear map that is shared, and an update of it that is not: W x + b + B (A x), (…, in) → (…, out)."""

    def __init__(self, shared: nn.Linear, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.shared, self.down, self.up = shared, down, up

    def forward(self, values: Tensor) -> Tensor:
        return self.shared(values) + F.linear(F.linear(values, self.down), self.up)


class RouteTensors(nn.Module):
    """The tensors of one route, by part and name: `5/norm1/weight`, `5/attn/qkv/down`.

    Args:
        tensors: their values; parts are blocks by number, and `head`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in tensors.items()})
        # not modules of this one: they hold parameters of others
        self._views: dict[str, tuple[tuple[int, ...], nn.Module]] = {}

    @classmethod
    def copied(cls, parts: Mapping[str, nn.Module], kinds: OwnTensors, generator: torch.Generator) -> RouteTensors:
        """Copies and updates that change nothing yet, for parts in the order in which they run."""
        tensors: dict[str, Tensor] = {}
        for index, (part, module) in enumerate(parts.items()):
            for name, leaf in module.named_modules():
                prefix = "/".join((part, *filter(None, name.split("."))))
                if kinds.norms and _is_norm(leaf):
                    tensors |= {f"{prefix}/{key}": value.detach() for key, value in leaf.named_parameters()}
                elif kinds.rank and index < kinds.blocks and part != "head" and isinstance(leaf, nn.Linear):
                    down = torch.randn(kinds.rank, leaf.in_features, generator=generator) / math.sqrt(leaf.in_features)
                    tensors[f"{prefix}/{_DOWN}"] = down.to(leaf.weight)
                    tensors[f"{prefix}/{_UP}"] = leaf.weight.new_zeros(leaf.out_features, kinds.rank)
        return cls(tensors)

    def view(self, part: str, module: nn.Module) -> nn.Module:
        """A part of the target with this route's own tensors in the place of the shared ones."""
        own = {name: value for name, value in self.values.items() if name.startswith(f"{part}/")}
        if not own:
            return module
        tensors = chain(module.parameters(), module.buffers(), own.values())
        # tensors are replaced when a module moves to another device or loads a state
        signature = tuple(map(id, tensors))
        found = self._views.get(part)
        if found is None or found[0] != signature:
            found = (signature, _view(module, {name.removeprefix(f"{part}/"): value for name, value in own.items()}))
            self._views[part] = found
        for shared, one in _side_by_side(module, found[1]):
            one.training = shared.training
        return found[1]

    def views(self) -> Iterator[nn.Module]:
        """Those that were made so far."""
        return (view for _, view in self._views.values())

    @property
    def macs_per_vector(self) -> int:
        """Multiply-adds that updates add for every token or position of an image."""
        return sum(value.numel() for name, value in self.values.items() if name.endswith((f"/{_DOWN}", f"/{_UP}")))


def tensors_by_route(state: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """Of a supernet's state those of routes: key of the route → name → tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith(prefix):
            key, _, rest = name.removeprefix(prefix).partition(".values.")
            found.setdefault(key, {})[rest] = value
    return found


def graph_name(name: str) -> str:
    """The name in a chain of the tensor that a route's own replaces: `5/norm1/weight` → `blocks.4.norm1.weight`."""
    part, _, rest = name.replace("/", ".").partition(".")
    return f"{part}.{rest}" if part == "head" else f"blocks.{int(part) - 1}.{rest}"


def _is_norm(module: nn.Module) -> bool:
    """A leaf with weights for every channel, and a name that says so."""
    return (
        "norm" in type(module).__name__.lower()
        and not list(module.children())
        and all(parameter.ndim == 1 for parameter in module.parameters())
    )


def _view(module: nn.Module, own: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of a module's structure that shares its tensors, but for those given."""
    shared: Iterable[Tensor] = chain(module.parameters(), module.buffers())
    view = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    for name, value in own.items():
        path, _, leaf = name.replace("/", ".").rpartition(".")
        if leaf == _DOWN:
            owner, _, attribute = path.rpartition(".")
            linear = view.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            setattr(view.get_submodule(owner), attribute, LowRankLinear(linear, value, own[f"{name[:-4]}{_UP}"]))
        elif leaf != _UP:
            setattr(view.get_submodule(path), leaf, value)
    return view


def _side_by_side(module: nn.Module, view: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every part of a module and the one of its view."""
    yield module, view
    for name, child in module.named_children():
        other = getattr(view, name)
        if isinstance(other, LowRankLinear):
            yield child, other
            yield child, other.shared
        else:
            yield from _side_by_side(child, other)

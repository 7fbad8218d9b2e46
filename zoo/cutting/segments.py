"""Modules for the parts between seams: the network's own modules wherever it calls them whole."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from klas_zoo.cutting.recording import Call, Recording

_DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}


class NeedsMore(Exception):
    """A part reads something else than the features at its seam."""


def segment_modules(recording: Recording, cuts: Sequence[fx.Node]) -> list[nn.Module]:
    """Modules that compute one after another what the network computes: stem, blocks, head.

    A part that is one module of the network, or several in a row, is these modules themselves. Any
    other is an fx.GraphModule that calls the network's modules, as large ones as possible, and
    computes anew what depends on no image, such as a table of positions.

    Raises:
        NeedsMore: a part needs more than the features at its seam.
    """
    images = next(node for node in recording.nodes if node.op == "placeholder")
    logits = recording.nodes[-1].args[0]
    assert isinstance(logits, fx.Node)
    opened = {outer for cut in cuts for outer in _open_at(recording, cut)}
    ends = [images, *cuts, logits]
    return [_Segment(recording, ends[k], ends[k + 1], opened).module() for k in range(len(ends) - 1)]


def _open_at(recording: Recording, cut: fx.Node) -> list[Call]:
    """The calls with a seam inside: they cannot stay whole."""
    call = recording.values[cut].call
    return [] if call is None else [one for one in call.outer() if one.result is not cut]


class _Segment:
    """The part of a network between two values."""

    def __init__(self, recording: Recording, source: fx.Node, target: fx.Node, opened: set[Call]) -> None:
        self._recording, self._source, self._target = recording, source, target
        self._opened = set(opened)
        self._place = {node: number for number, node in enumerate(recording.nodes)}
        self._dropouts: dict[str, nn.Module] = {}

    def module(self) -> nn.Module:
        while (units := self._units()) is None:
            pass
        row = self._row(units)
        if row is not None:
            return row[0] if len(row) == 1 else nn.Sequential(*row).eval()
        graph = self._graph(units)
        return fx.GraphModule(self._targets(graph), graph, class_name="Segment").eval()

    def _units(self) -> list[fx.Node | Call] | None:
        """What must be executed, in order; None after a module had to be opened to get at a value inside."""
        units: dict[fx.Node | Call, float] = {}
        todo = [self._target]
        while todo:
            node = todo.pop()
            if node is self._source or self._is_batch(node):
                continue
            if node.op == "placeholder":
                self._open_all(units)
                return None
            unit = self._unit(node)
            if isinstance(unit, Call) and not _holds(unit.result, node):
                self._opened.update(unit.outer())
                return None
            if unit in units:
                continue
            # a call takes place when its own first node would
            units[unit] = unit.start - 0.5 if isinstance(unit, Call) else self._place[unit]
            map_arg((unit.args, unit.kwargs), todo.append)
        return sorted(units, key=units.__getitem__)

    def _open_all(self, units: Iterable[fx.Node | Call]) -> None:
        """A module may be given more than it reads: its operations may do without."""
        calls = {outer for one in units if isinstance(one, Call) for outer in one.outer()} - self._opened
        if not calls:
            raise NeedsMore
        self._opened |= calls

    def _unit(self, node: fx.Node) -> fx.Node | Call:
        """The largest module whose call made a value and has no seam inside, or its own operation."""
        call = self._recording.values[node].call
        if call is None or node.op == "get_attr":
            return node
        whole = [one for one in call.outer() if one not in self._opened and one.portable]
        # the source must not lie inside: its module would be executed once more
        return whole[-1] if whole else node

    def _is_batch(self, node: fx.Node) -> bool:
        return self._recording.values[node].batch

    def _row(self, units: list[fx.Node | Call]) -> list[nn.Module] | None:
        """The modules of a part that only passes features from one to the next."""
        value, row = self._source, []
        for unit in units:
            args = unit.args
            if len(args) != 1 or args[0] is not value or not self._only_defaults(unit):
                return None
            if isinstance(unit, Call) and isinstance(unit.result, fx.Node):
                value = unit.result
                row.append(unit.module)
            elif isinstance(unit, fx.Node) and unit.op == "call_module":
                value = unit
                row.append(self._recording.model.get_submodule(str(unit.target)))
            else:
                return None
        return (row or [nn.Identity()]) if value is self._target else None

    def _only_defaults(self, unit: fx.Node | Call) -> bool:
        """Whether a call gives no more by name than what its module would take anyway."""
        if not unit.kwargs:
            return True
        if not isinstance(unit, Call):
            return False
        known = inspect.signature(unit.module.forward).parameters
        return all(name in known and known[name].default is value for name, value in unit.kwargs.items())

    def _graph(self, units: list[fx.Node | Call]) -> fx.Graph:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {self._source: graph.placeholder("features")}

        def get(node: fx.Node) -> fx.Node:
            if self._is_batch(node) and node not in made:
                made[node] = graph.call_method("size", (made[self._source], 0))
            return made[node]

        for unit in units:
            args, kwargs = map_arg(unit.args, get), map_arg(unit.kwargs or {}, get)
            if isinstance(unit, Call):
                called = graph.call_module(_stripped(unit.path), args, kwargs)
                _spread(graph, unit.result, called, made)
            elif unit.target in _DROPOUTS:
                made[unit] = graph.call_module(self._dropout(unit), args[:1])
            else:
                made[unit] = graph.create_node(unit.op, _stripped(unit.target), args, kwargs)
        graph.output(made[self._target])
        return graph

    def _dropout(self, node: fx.Node) -> str:
        """Dropout by a function, as a module: it then knows whether it is training."""
        given: dict[str, Any] = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        name = f"dropout_{len(self._dropouts)}"
        self._dropouts[name] = _DROPOUTS[node.target](given.get("p", 0.5))  # type: ignore[index]
        return name

    def _targets(self, graph: fx.Graph) -> dict[str, Any]:
        """Modules and tensors a graph names, by name."""
        found: dict[str, Any] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                name = str(node.target)
                found[name] = self._dropouts.get(name) or _get(self._recording.model, name)
        return found


def _stripped(target: Any) -> Any:
    """Names as in the network itself, without the module that the recorder puts around it."""
    return target.removeprefix("model.") if isinstance(target, str) else target


def _get(root: nn.Module, name: str) -> Any:
    """A module or tensor of the network; constants that the recorder met lie beside it."""
    return operator.attrgetter(name if name.startswith("_tensor_constant") else f"model.{name}")(root)


def _holds(result: Any, node: fx.Node) -> bool:
    found: list[fx.Node] = []
    map_arg(result, found.append)
    return node in found


def _spread(graph: fx.Graph, result: Any, value: fx.Node, made: dict[fx.Node, fx.Node]) -> None:
    """Makes the parts of what a module gives known by the nodes that stood for them."""
    if isinstance(result, fx.Node):
        made[result] = value
    elif isinstance(result, (tuple, list)):
        for index, part in enumerate(result):
            _spread(graph, part, graph.call_function(operator.getitem, (value, index)), made)
    elif isinstance(result, dict):
        for key, part in result.items():
            _spread(graph, part, graph.call_function(operator.getitem, (value, key)), made)

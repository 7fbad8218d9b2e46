"""Tensors that go side by side from one block to the next, as one: concatenated, they are a seam like any other.

DenseNet's layers read everything that was computed before them in their stage, NASNet's cells the two cells before
them; CSPNet's blocks follow one another beside a branch that waits for the last of them. Where these tensors lie on
one grid, they are together the features at this place. Their concatenation along the channels is put into the
recording there, and whatever follows reads slices of it. Where the network concatenates the same tensors itself,
that operation is the bundle.

A residual block's shortcut is no such thing: the layers beside it do not read it, and are no blocks in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from klas_zoo.cutting.features import channels_last
from klas_zoo.cutting.recording import CONTAINERS, Call, Recording, Value, concatenated
from klas_zoo.cutting.seams import has_parts
from klas_zoo.layouts import Kind

_LEAST = 3  # modules of one class in one module are repeated, two may be a pair of branches


def bundle(recording: Recording) -> None:
    """Puts bundles into a recording: its `bundles` and `slices`. What it computes remains the same, bit for bit."""
    firsts = {call: recording.nodes[call.start] for call in recording.calls}
    for call, in_a_row in _repeated(recording):
        alive, read = _alive(firsts[call], recording), _read(call, recording)
        together = read if set(read) == set(alive) else alive if in_a_row else []
        kind = _common_kind(together, recording) if len(together) > 1 else None
        if kind is not None:
            _join(together, kind, call, firsts, recording)
    if recording.bundles:
        _use_bundles(firsts, recording)
        place = {node: number for number, node in enumerate(recording.nodes)}
        for call, node in firsts.items():
            call.start = place[node]


def _repeated(recording: Recording) -> list[tuple[Call, bool]]:
    """Calls of modules that stand in a module beside others of one class; and whether they are blocks in a row.

    These follow another one of their class in a container, and consist of modules that have parts themselves.
    """
    calls = [call for call in recording.calls if has_parts(call.module)]
    kinds = Counter((call.parent, type(call.module)) for call in calls)
    parents = {parent for (parent, _), number in kinds.items() if number >= _LEAST}
    met: set[tuple[Call | None, type]] = set()
    found = []
    for call in calls:
        kind = (call.parent, type(call.module))
        contained = call.parent is not None and isinstance(call.parent.module, CONTAINERS)
        in_a_row = contained and kinds[kind] > 1 and any(map(has_parts, call.module.children()))
        if in_a_row or call.parent in parents:
            found.append((call, in_a_row))
        met.add(kind)
    return found


def _read(call: Call, recording: Recording) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg((call.args, call.kwargs), found.append)
    return [node for node in dict.fromkeys(found) if recording.values[node].data]


def _alive(here: fx.Node, recording: Recording) -> list[fx.Node]:
    """What was computed from the images before a node, and is read by it or later."""
    nodes = recording.nodes
    place = nodes.index(here)
    later = set(nodes[place:])
    return [node for node in nodes[:place] if recording.values[node].data and not later.isdisjoint(node.users)]


def _common_kind(nodes: Sequence[fx.Node], recording: Recording) -> Kind | None:
    """How tensors of one grid lie, where they do; None where they are anything else."""
    found = {_grid(node, recording) for node in nodes}
    return found.pop()[0] if len(found) == 1 and None not in found else None  # type: ignore[index]


def _grid(node: fx.Node, recording: Recording) -> tuple[Kind, tuple[int, ...]] | None:
    shape = recording.values[node].shape
    if shape is None or len(shape) not in (3, 4) or shape[0] != recording.batch:
        return None
    last = channels_last(recording, node)
    if len(shape) == 3:
        return ("tokens", shape[1:2]) if last else None
    return ("nhwc", shape[1:3]) if last else ("maps", shape[2:])


def _axis(kind: Kind) -> int:
    """Of the channels, in a batch."""
    return {"tokens": 2, "maps": 1, "nhwc": 3}[kind]


def _join(nodes: Sequence[fx.Node], kind: Kind, call: Call, firsts: dict[Call, fx.Node], recording: Recording) -> None:
    """Concatenates tensors before a call, and gives the call and all that follows slices of this."""
    axis, here, place = _axis(kind), firsts[call], recording.nodes.index(firsts[call])
    later = set(recording.nodes[place:])
    with recording.graph.inserting_before(here):
        parts = _merged(nodes, axis, recording)
        shapes = [recording.values[node].shape or () for node in nodes]
        shape = tuple(sum(one[k] for one in shapes) if k == axis else size for k, size in enumerate(shapes[0]))
        joined = recording.graph.call_function(torch.cat, (parts, axis))
        recording.values[joined] = _value(shape, call)
        recording.bundles[joined] = kind
        start, slices = 0, {}
        for node, own in zip(nodes, shapes, strict=True):
            part = recording.graph.call_function(torch.narrow, (joined, axis, start, own[axis]))
            recording.values[part], recording.slices[part] = _value(own, call), joined
            slices[node], start = part, start + own[axis]
    for node, part in slices.items():
        node.replace_all_uses_with(part, delete_user_cb=later.__contains__)
    enclosing = set(call.outer()) - {call}
    for one in recording.calls:
        if firsts[one] in later:
            one.args, one.kwargs = _mapped(one.args, slices), _mapped(one.kwargs, slices)
            one.result = _mapped(one.result, slices)
        elif one in enclosing:
            one.result = _mapped(one.result, slices)


def _value(shape: tuple[int, ...], call: Call) -> Value:
    return Value(shape=shape, data=True, number=False, batch=False, call=call.parent, work=0)


def _mapped(values: Any, others: dict[fx.Node, fx.Node]) -> Any:
    return map_arg(values, lambda node: others.get(node, node))


def _merged(nodes: Sequence[fx.Node], axis: int, recording: Recording) -> list[fx.Node]:
    """Nodes that are concatenated, with a bundle in place of all of its slices in a row."""
    found: list[fx.Node] = []
    todo = list(nodes)
    while todo:
        joined = recording.slices.get(todo[0])
        row = [one for one in joined.users if recording.slices.get(one) is joined] if joined else []
        if joined and _axis(recording.bundles[joined]) == axis and todo[: len(row)] == row:
            found.append(joined)
            del todo[: len(row)]
        else:
            found.append(todo.pop(0))
    return found


def _use_bundles(firsts: dict[Call, fx.Node], recording: Recording) -> None:
    """Where the network concatenates all slices of a bundle again, it can take the bundle instead."""
    for node in recording.nodes:
        found, shape = concatenated(node), recording.values[node].shape
        if found is None or shape is None or node in recording.bundles:
            continue
        given, axis = found
        parts = _merged(given, axis % len(shape), recording)
        if parts == given:
            continue
        inside = recording.values[node].call
        for call in inside.outer() if inside else ():
            call.portable = False  # called as a whole it would concatenate once more
        if len(parts) > 1:
            node.args, node.kwargs = (parts, axis), {}
            continue
        for call, first in firsts.items():
            if first is node:
                firsts[call] = node.next
        node.replace_all_uses_with(parts[0])
        for call in recording.calls:
            call.args, call.kwargs = _mapped(call.args, {node: parts[0]}), _mapped(call.kwargs, {node: parts[0]})
            call.result = _mapped(call.result, {node: parts[0]})
        recording.graph.erase_node(node)
        del recording.values[node]

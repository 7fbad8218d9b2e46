"""Seams: the values of a recorded network through which all of its data pass.

At such a value (an articulation point of the graph) the network can be cut: what comes after needs
nothing of what came before but this one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from klas_zoo.cutting.recording import Recording


@dataclass(frozen=True)
class Seams:
    """Where a network can be cut, in the order of execution, and what stood in the way elsewhere.

    Attributes:
        nodes: tensors of tokens (B, N, D) or maps (B, …, …, …) through which all data pass.
        shared: name of a weight that is used on both sides of a place that would otherwise be a seam.
        several: how many tensors were alive together, at most, where there was no seam.
    """

    nodes: tuple[fx.Node, ...]
    shared: str
    several: int


def find_seams(recording: Recording) -> Seams:
    """All values at which a network can be cut into independent parts."""
    nodes, values = recording.nodes, recording.values
    place = {node: number for number, node in enumerate(nodes)}
    data = {node for node in nodes if node.op != "output" and values[node].data}
    last = {n: max((place[u] for u in n.users if u in data or u.op == "output"), default=-1) for n in data}
    ends = _shared(recording, data, place)
    found: dict[fx.Node, None] = {}
    alive: dict[fx.Node, None] = {}
    shared, several = "", 0
    for number, node in enumerate(nodes):
        if node in data:
            alive[node] = None
        alive = {one: None for one in alive if last[one] > number}
        several = max(several, len(alive))
        if len(alive) != 1:
            continue
        (only,) = alive
        shape = values[only].shape
        if only.op == "placeholder" or shape is None or len(shape) not in (3, 4) or shape[0] != recording.batch:
            continue
        if _inside_a_layer(only, recording):
            continue
        across = next((name for name, first, end in ends if first <= place[only] < end), "")
        if across:
            shared = across
        else:
            found[only] = None
    return Seams(tuple(found), shared, several)


def _shared(recording: Recording, data: set[fx.Node], place: dict[fx.Node, int]) -> list[tuple[str, int, int]]:
    """Weights that more than one operation reads: their names, the first and the last place."""
    used: dict[str, list[int]] = {}
    read: dict[fx.Node, frozenset[str]] = {}
    names = {id(p): name.removeprefix("model.") for name, p in recording.model.named_parameters()}
    for node in recording.nodes:
        own = frozenset(names[id(p)] for p in _weights(recording.model, node) if id(p) in names)
        through = (read[one] for one in node.all_input_nodes if one not in data)
        read[node] = own.union(*through)
        if node in data:
            for name in read[node]:
                used.setdefault(name, []).append(place[node])
    return [(name, places[0], places[-1]) for name, places in used.items() if places[0] < places[-1]]


def _weights(model: nn.Module, node: fx.Node) -> Iterator[nn.Parameter]:
    if node.op == "call_module":
        yield from model.get_submodule(str(node.target)).parameters()
    elif node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        found = getattr(model.get_submodule(owner), name)
        if isinstance(found, nn.Parameter):
            yield found


def _inside_a_layer(node: fx.Node, recording: Recording) -> bool:
    """Whether a value is a step of a module that has no modules with weights, such as a norm."""
    call = recording.values[node].call
    while call is not None and not has_parts(call.module):
        if call.result is not node:
            return True
        call = call.parent
    return False


def has_parts(module: nn.Module) -> bool:
    """Whether weights lie in modules below it, not only in its own."""
    return any(True for child in module.children() for _ in child.parameters())


def work_before(recording: Recording) -> dict[fx.Node, int]:
    """What a network has computed when a node is done, in multiply-adds; the images' own part is 0."""
    total, found = 0, {}
    for node in recording.nodes:
        if node.op != "output":
            total += recording.values[node].work
        found[node] = total
    return found

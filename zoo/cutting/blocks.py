"""Blocks: which of a network's seams a chain is cut at.

A block is what the network's author repeats: the module of a class that stands several times in a
row between two seams (a transformer block, a residual block), not the stage around it, and not the
convolutions inside it. What only shrinks the grid between stages (patch merging, a strided
convolution of its own) belongs to the block behind it, so that features after a block have the
resolution of the block's own stage; where blocks are few and whole stages it is one of its own.
Networks without such modules are cut at their layers, and these are grouped into blocks of even
cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

from torch import fx, nn

from klas_zoo.cutting.recording import CONTAINERS, Call, Recording, concatenated
from klas_zoo.cutting.seams import has_parts, work_before
from klas_zoo.layouts import Layout

MOST = 64
"""More blocks than this are grouped: the candidates for stitches grow with the square."""
FEW = 8
"""In a chain of fewer blocks, what shrinks the grid inside a stage may be a block of its own."""
SMALLEST = 0.25
"""A layer with less work than this share of the mean belongs to the block before it."""
_STEM = 1 / 3  # a module that reads the images and does no more of the work is the stem, as a whole


@dataclass(eq=False)
class _Section:
    """A module that reads one seam and writes another: from seam `first` to seam `last` (0: the images)."""

    call: Call | None
    first: int
    last: int
    work: int
    parts: list[_Section] = field(default_factory=list)

    @property
    def kind(self) -> Any:
        return type(self.call.module) if self.call else object

    def below(self) -> list[_Section]:
        return [one for part in self.parts for one in (part, *part.below())]


def choose_blocks(recording: Recording, seams: Mapping[fx.Node, Layout]) -> list[fx.Node]:
    """The seams at which the stem ends, every block but the last ends, and the head begins.

    At least two, where there are two seams; `seams` in the order of execution.
    """
    places = _Places(recording, seams)
    units = _units(places.root)
    if len(units) > 1 and _cover(units, places):
        bounds = _entered(_bounds(units, places), units, places)
    else:
        bounds = _layers(places)
    return [list(seams)[one - 1] for one in _grouped(bounds, places)]


class _Places:
    """Seams by number, 0 being the images, and the modules between them as a tree."""

    def __init__(self, recording: Recording, seams: Mapping[fx.Node, Layout]) -> None:
        images = next(node for node in recording.nodes if node.op == "placeholder")
        work = work_before(recording)
        output = recording.nodes[-1]
        shape = recording.values[images].shape
        assert shape is not None
        self.cells = [prod(shape[-2:]), *(layout.vectors for layout in seams.values())]
        self.work = [work[node] for node in (images, *seams)]
        self.number = {node: index for index, node in enumerate((images, *seams))}
        self.root = _Section(None, 0, len(seams), work[output] - work[images])
        sections: dict[Call, _Section] = {}
        for call in recording.calls:
            if (section := self._section(call, recording)) is not None:
                sections[call] = section
                inside = next((sections[c] for c in list(call.outer())[1:] if c in sections), self.root)
                inside.parts.append(section)

    def _section(self, call: Call, recording: Recording) -> _Section | None:
        if not isinstance(call.result, fx.Node) or not has_parts(call.module):
            return None
        read: list[fx.Node] = []
        fx.node.map_arg((call.args, call.kwargs), read.append)
        inputs = {recording.slices.get(node, node) for node in read if recording.values[node].data}
        first = self.number.get(inputs.pop(), -1) if len(inputs) == 1 else -1
        last = self.number.get(_bundle_of(call.result, recording), -1)
        if first < 0 or last <= first:
            return None
        return _Section(call, first, last, self.work[last] - self.work[first])

    def shrinks(self, first: int, last: int) -> bool:
        """Whether the grid after one seam is larger than at a later one."""
        return self.cells[first] > self.cells[last]


def _bundle_of(result: fx.Node, recording: Recording) -> fx.Node:
    """The bundle that a module's result is part of, together with what was there before it; else the result."""
    for user in result.users:
        others = set(user.all_input_nodes) - {result}
        if concatenated(user) and (user in recording.bundles or _all_bundled(others, recording)):
            return user
    return result


def _all_bundled(nodes: set[fx.Node], recording: Recording) -> bool:
    return bool(nodes) and all(node in recording.bundles or node in recording.slices for node in nodes)


def _units(root: _Section) -> list[_Section]:
    """The sections that are blocks, in order."""
    instances: dict[type, list[_Section]] = defaultdict(list)
    for one in root.below():
        instances[one.kind].append(one)
    divisible = {kind: _divisible(kind, found, root.work) for kind, found in instances.items()}

    def divide(section: _Section) -> list[_Section]:
        if section.parts and (section is root or divisible[section.kind]):
            return [unit for part in section.parts for unit in divide(part)]
        return [section]

    stem = _stem(root)
    return [one for one in divide(root) if one is not root and one.work > 0 and one.first >= stem]


def _cover(units: list[_Section], places: _Places) -> bool:
    """Whether units do most of the work between the first and the last of them, and enough of the whole.

    A row of layers (VGG's) that a container holds is no unit, however much it does.
    """
    rows = [one for one in units if one.kind in CONTAINERS and one.last - one.first > 1]
    if len(units) < 4 and any(one.work > places.root.work / 2 for one in rows):
        return False
    done = sum(one.work for one in units)
    between = places.work[units[-1].last] - places.work[units[0].first]
    return done >= between / 2 and (len(units) >= 4 or done >= places.root.work / 5)


def _divisible(kind: Any, instances: list[_Section], whole: int) -> bool:
    """Whether modules of a class are stages of blocks rather than blocks."""
    if kind.forward in {container.forward for container in CONTAINERS}:
        return True
    if any(sum(part.work for part in one.parts) < one.work / 2 for one in instances):
        return False  # one of them goes around its parts: a residual block, whose others are blocks too
    if len(instances) == 1 and instances[0].work > whole / 3:
        return True
    for one in instances:
        work: dict[Any, list[int]] = defaultdict(list)
        for part in one.below():
            if part.kind.forward not in {container.forward for container in CONTAINERS}:
                work[part.kind].append(part.work)
        if any(len(each) > 1 and sum(each) >= one.work / 4 for each in work.values()):
            return True
    return False


def _stem(root: _Section) -> int:
    """Where the module that reads the images ends."""
    reading = [one for one in root.below() if one.first == 0 and one.work <= root.work * _STEM]
    return max((one.last for one in reading), default=0)


def _bounds(units: list[_Section], places: _Places) -> list[int]:
    """Ends of the stem and of all blocks: what stands between units belongs to one of its neighbours."""
    blocks = [
        one
        for one, after in zip(units, [*units[1:], None], strict=True)
        if after is None or not _only_shrinks(one, after, places)
    ]
    bounds = [blocks[0].first]
    for before, after in pairwise(blocks):
        bounds.append(before.last if places.shrinks(before.last, after.first) else after.first)
    return [*bounds, blocks[-1].last]


def _only_shrinks(one: _Section, after: _Section, places: _Places) -> bool:
    """Whether a section only leads from one stage to the next: of another class than the blocks, and less work."""
    assert one.call is not None
    if one.kind is after.kind or not places.shrinks(one.first, one.last):
        return False
    alone = not one.call.path.rpartition(".")[2].isdigit() or one.kind is nn.Sequential
    return alone or (one.work < after.work / 2 and not places.shrinks(after.first, after.last))


def _layers(places: _Places) -> list[int]:
    """Every seam but those behind operations that do next to nothing."""
    last = len(places.work) - 1
    steps = range(1, last)
    mean = (places.work[last] - places.work[1]) / max(len(steps), 1)
    bounds = [1]
    for number in range(2, last + 1):
        if places.work[number] - places.work[bounds[-1]] >= SMALLEST * mean:
            bounds.append(number)
        elif len(bounds) > 1 and not places.shrinks(bounds[-1], number):
            bounds[-1] = number  # an activation, a norm: with the layer before it
    return bounds if len(bounds) > 1 else [1, last]


def _entered(bounds: list[int], units: list[_Section], places: _Places) -> list[int]:
    """With a further seam behind what shrinks the grid inside a unit, where there are few and most do so.

    Units that are whole stages (GCViT's) could not be entered on their own grids otherwise.
    """
    found: dict[int, int] = {}  # the end of a block to where its features get its grid
    for one in units:
        for part in one.below():
            begins = part.first == one.first and part.last < one.last and one.work <= 16 * part.work <= 8 * one.work
            if begins and places.shrinks(part.first, part.last) and not places.shrinks(part.last, one.last):
                found.setdefault(one.last, part.last)
    if len(bounds) - 1 >= FEW or len(found) < len(units) / 2:
        return bounds
    return sorted({*bounds, *(seam for end, seam in found.items() if end in bounds[1:])})


def _grouped(bounds: list[int], places: _Places) -> list[int]:
    """At most `MOST` blocks, of costs as even as their borders allow."""
    if len(bounds) <= MOST + 1:
        return bounds
    start, end = places.work[bounds[0]], places.work[bounds[-1]]
    kept = [bounds[0]]
    for number in range(1, MOST):
        goal = start + (end - start) * number / MOST
        kept.append(min(bounds, key=lambda one: abs(places.work[one] - goal)))
    return sorted({*kept, bounds[-1]})

"""How features lie at the seams of a recorded network: channels first or last, grid, prefix tokens.

Shapes do not say which axis holds the channels; the layers that read a value do, and those that
made it. How many prefix tokens there are, and on which grid the others lie, timm's models state in
`num_prefix_tokens` and `patch_embed.grid_size`; of other networks it shows where maps are flattened
into tokens, and where tokens that depend on no image are joined to others. Whatever is stated is checked
against the shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from klas_zoo.cutting.recording import Recording, concatenated
from klas_zoo.layouts import Layout, Shape

_FAR = 8  # operations between a seam and a layer that knows its channels
_LAST = (F.linear, F.layer_norm)
_FIRST = (F.conv2d, F.batch_norm, F.group_norm, F.instance_norm)
_SAME_AXES = {
    "add", "mul", "sub", "div", "relu", "gelu", "silu", "clone", "contiguous", "to", "dropout", "hardswish", "iadd",
    "relu_", "add_", "mul_", "float", "sigmoid", "tanh", "type_as",
}  # fmt: skip


def layouts_of(recording: Recording, seams: tuple[fx.Node, ...]) -> dict[fx.Node, Layout]:
    """The seams whose channels lie first or last, with their layouts. Grids of tokens are still unknown."""
    prefix = int(getattr(_model(recording), "num_prefix_tokens", 0) or 0)
    found = {}
    for node in seams:
        shape = recording.values[node].shape
        assert shape is not None
        last = recording.bundles[node] != "maps" if node in recording.bundles else channels_last(recording, node)
        if len(shape) == 4:
            found[node] = Layout.of_nhwc(shape[1:]) if last else Layout.of_maps(shape[1:])
        elif last:
            found[node] = Layout.of_tokens(shape[1:], prefix=prefix if prefix < shape[1] else 0)
    return found


def with_grids(recording: Recording, bounds: dict[fx.Node, Layout]) -> list[Layout]:
    """The same layouts with the prefix tokens that are joined to others, and with grids where tokens lie row by row."""
    grids = {} if _scrambled(recording, next(iter(bounds))) else _grids(recording)
    joined = _prefixes(recording, grids, next(iter(bounds.values())).prefix)
    found = []
    for layout in bounds.values():
        if layout.kind == "tokens":
            total = layout.vectors
            # a prefix may join only later in the network: believe it where the rest is a grid
            stated = (layout.prefix, joined.get(total, 0), 0)
            prefix = next((p for p in stated if total - p in grids), layout.prefix or joined.get(total, 0))
            shape = (total, layout.width)
            found.append(Layout.of_tokens(shape, grid=grids.get(total - prefix), prefix=prefix))
        else:
            found.append(layout)
    return found


def _model(recording: Recording) -> nn.Module:
    return recording.model.get_submodule("model")


def _by_shape(shape: Shape) -> bool:
    """Whether channels lie last, from a shape alone: two equal sides are the grid; tokens have them last."""
    return len(shape) == 2 or (shape[0] == shape[1] != shape[2])


def channels_last(recording: Recording, node: fx.Node) -> bool:
    """What the layers around tokens or maps say; where they say nothing, or not the same, what the shape does."""
    for users in (True, False):
        votes = set(_votes(recording, node, users))
        if len(votes) == 1:
            return votes.pop()
    shape = recording.values[node].shape
    assert shape is not None
    return _by_shape(shape[1:])


def _votes(recording: Recording, node: fx.Node, users: bool) -> Iterator[bool]:
    shape, seen, near = recording.values[node].shape, {node}, [node]
    assert shape is not None
    for _ in range(_FAR):
        reached: list[fx.Node] = []
        for one in near:
            others = one.users if users else one.all_input_nodes if _keeps_axes(recording, one) else ()
            if not users and (vote := _vote(recording, one, shape[1:])) is not None:
                yield vote
                continue
            for other in others:
                if other in seen or other.op == "output" or not recording.values[other].data:
                    continue
                seen.add(other)
                if users and (vote := _vote(recording, other, shape[1:])) is not None:
                    yield vote
                elif recording.values[other].shape == shape and (not users or _keeps_axes(recording, other)):
                    reached.append(other)
        near = reached


def _keeps_axes(recording: Recording, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = recording.model.get_submodule(str(node.target))
        return type(module).__name__ in ("Identity", "Dropout", "GELU", "ReLU", "SiLU", "Hardswish", "ReLU6")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _SAME_AXES


def _vote(recording: Recording, node: fx.Node, shape: Shape) -> bool | None:
    """True: this layer reads or writes channels last; False: first; None: it does not say."""
    target: Any = node.target
    if node.op == "call_module":
        target = recording.model.get_submodule(str(node.target))
        if isinstance(target, (nn.Conv2d, nn.Conv1d, nn.GroupNorm, nn.modules.batchnorm._NormBase)):
            return False
        if isinstance(target, (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.MultiheadAttention)):
            return True
        return None
    return True if target in _LAST else False if target in _FIRST else None


def _grids(recording: Recording) -> dict[int, Shape]:
    """H·W → (H, W) of all maps that are flattened into tokens, and of timm's patch embedding."""
    found: dict[int, Shape] = {}
    sizes = getattr(getattr(_model(recording), "patch_embed", None), "grid_size", None)
    if sizes is not None and len(sizes) == 2:
        found[prod(sizes)] = tuple(sizes)
    for node in recording.nodes:
        if node.op != "call_method" and node.op != "call_function":
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        before = recording.values[node.all_input_nodes[0]].shape if node.all_input_nodes else None
        after = recording.values[node].shape
        if name not in ("flatten", "reshape", "view") or before is None or after is None:
            continue
        if len(before) == 4 and len(after) == 3 and before[0] == after[0] == recording.batch:
            if after[1:] == (before[1], before[2] * before[3]):
                found.setdefault(after[2], before[2:])
            if after[1:] == (before[1] * before[2], before[3]):
                found.setdefault(after[1], before[1:3])
    return found


def _prefixes(recording: Recording, grids: Mapping[int, Shape], stated: int) -> dict[int, int]:
    """P + N → P, of tokens in front of which others are joined: a class token, say, that no image has a part in.

    Networks that pool their tokens between stages take such a prefix off and join it again (PiT).
    """
    found: dict[int, int] = {}
    known = {stated} - {0}
    for node in recording.nodes:
        joined = concatenated(node)
        if joined is None or joined[1] not in (1, -2):
            continue
        values = [recording.values[one] for one in joined[0]]
        lengths = [one.shape[1] for one in values if one.shape is not None and len(one.shape) == 3]
        if len(lengths) < len(values) or not values[-1].data:
            continue
        prefix = sum(lengths[:-1])
        if not any(one.data for one in values[:-1]):
            known.add(prefix)
        elif prefix not in known or lengths[-1] not in grids:
            continue
        found.setdefault(sum(lengths), prefix)
    return found


def _scrambled(recording: Recording, end: fx.Node) -> bool:
    """Whether the stem sorts tokens into windows or groups: then they no longer lie row by row."""
    for node in recording.nodes:
        shape = recording.values[node].shape
        if shape is not None and len(shape) > 4 and recording.values[node].data:
            return True
        if node is end:
            break
    return False

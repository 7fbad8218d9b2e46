"""Any network as stem, blocks and head."""

from __future__ import annotations

import linecache
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from klas_zoo.cutting.blocks import choose_blocks
from klas_zoo.cutting.bundles import bundle
from klas_zoo.cutting.features import layouts_of, with_grids
from klas_zoo.cutting.patches import token_grid
from klas_zoo.cutting.recording import Recording, record, version_of
from klas_zoo.cutting.seams import Seams, find_seams
from klas_zoo.cutting.segments import NeedsMore, segment_modules
from klas_zoo.errors import FamilyError
from klas_zoo.layouts import Layout, first_token, mean_pool

BY_HAND = "build klas_zoo.Chain(stem, blocks, head, input_shape=…) from its modules"


@dataclass(frozen=True)
class Parts:
    """Modules that compute together what a network computes, and the layouts of the features between them."""

    stem: nn.Module
    blocks: list[nn.Module]
    head: nn.Module
    layouts: tuple[Layout, ...]
    pool: Callable[[Tensor, Layout], Tensor]


def cut(model: nn.Module, example: Tensor, *, training: bool) -> Parts:
    """Cuts a network at its seams; the parts share its modules and weights.

    Args:
        model: in evaluation mode; images (B, C, H, W) → logits (B, classes).
        example: images (B, C, H, W); the values do not matter, the size does.
        training: the mode in which modules that are made new are left.

    Raises:
        FamilyError: the network cannot be recorded, has no seams or cannot be cut at them.
        Exception: what the network itself raises on such images.
    """
    # a batch of one hides what depends on its size
    images = torch.cat([example, example]) if len(example) == 1 else example
    recording = _recorded(model, images)
    bundle(recording)
    try:
        return _parts(recording, model, images, training)
    except _OtherLogits:
        if not recording.bundles:
            raise
    # slices of a bundle lie elsewhere in memory, and some of torch's kernels round otherwise then
    return _parts(_recorded(model, images), model, images, training)


class _OtherLogits(FamilyError):
    """The parts compute something else than the network."""


def _recorded(model: nn.Module, images: Tensor) -> Recording:
    name = type(model).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recording = record(model, images)
    except Exception as error:
        model(images)  # where the network itself fails, as with images of another size, this is its own error
        raise FamilyError(f"{name} cannot be cut into blocks: {_reason(error)}. Change that, or {BY_HAND}.") from error
    logits = recording.nodes[-1].args[0]
    if not isinstance(logits, fx.Node):
        raise FamilyError(
            f"{name} returns {_kind(logits)}, not logits (B, classes): wrap it in a module that returns those."
        )
    return recording


def _kind(results: object) -> str:
    """What a network returns instead of one tensor, in words: a recording holds classes of its own for some."""
    if isinstance(results, dict):
        return f"a dictionary ({', '.join(map(str, results))})"
    if isinstance(results, (tuple, list)):
        return f"{len(results)} tensors"
    return "nothing" if results is None else f"a {type(results).__name__}"


def _parts(recording: Recording, model: nn.Module, images: Tensor, training: bool) -> Parts:
    name = type(model).__name__
    seams = find_seams(recording)
    nodes = layouts_of(recording, seams.nodes)
    while len(nodes) > 1:
        bounds = choose_blocks(recording, nodes)
        if len(bounds) < 3:
            break  # a single block: nothing can be stitched
        try:
            modules = segment_modules(recording, bounds)
        except NeedsMore as error:
            raise FamilyError(
                f"{name} cannot be cut into blocks: a part reads what an earlier one keeps. Pass it on, or {BY_HAND}."
            ) from error
        written = _compare(model, modules, images)
        if not written:
            layouts = _with_orders(with_grids(recording, {node: nodes[node] for node in bounds}), modules[0], images)
            _set_mode(modules, model, training)
            return Parts(modules[0], modules[1:-1], modules[-1], tuple(layouts), _pool(model, layouts))
        spoilt = {bounds[number] for number in written}
        nodes = {node: layout for node, layout in nodes.items() if node not in spoilt}
        if len(nodes) < 2:
            raise FamilyError(
                f"{name} cannot be cut into blocks: its layers change the features at every seam in place. Build it "
                f"with inplace=False, or {BY_HAND}."
            )
    raise FamilyError(_no_seams(name, recording, seams))


def _with_orders(layouts: list[Layout], stem: nn.Module, images: Tensor) -> list[Layout]:
    """Tokens on no known grid, on the one on which the stem puts them where that shows; as many tokens stay there."""
    first = layouts[0]
    if first.kind != "tokens" or len(first.grid) == 2:
        return layouts
    grid = token_grid(stem, images, first)
    return [replace(one, grid=grid) if grid and one.grid == first.grid else one for one in layouts]


def _compare(model: nn.Module, modules: list[nn.Module], like: Tensor) -> list[int]:
    """Runs model and parts on another image than those that were recorded, and on one instead of several.

    Returns:
        The numbers of the seams whose features the part behind them changes in place.

    Raises:
        _OtherLogits: their logits differ.
    """
    images = torch.randn(1, *like.shape[1:], device=like.device, dtype=like.dtype, generator=_generator(like))
    written = []
    with torch.no_grad():
        features = images.clone()
        for number, module in enumerate(modules):
            version = version_of(features)
            result = module(features)
            if version_of(features) != version and number > 0:
                written.append(number - 1)
            features = result
        expected = model(images.clone())
    if not written and not images.is_meta and not torch.equal(features.nan_to_num(), expected.nan_to_num()):
        raise _OtherLogits(
            f"{type(model).__name__} cannot be cut into blocks: what was recorded for {len(like)} images is not what "
            f"it computes for {len(images)} others (its forward pass may depend on how many there are, or be random); "
            f"{BY_HAND}."
        )
    return written


def _set_mode(modules: list[nn.Module], model: nn.Module, training: bool) -> None:
    """Puts the modules that are not the model's own into a mode."""
    own = set(model.modules())
    for part in {one for module in modules for one in module.modules()} - own:
        part.training = training


def _generator(like: Tensor) -> torch.Generator | None:
    return None if like.is_meta else torch.Generator(like.device).manual_seed(0)


def _no_seams(name: str, recording: Recording, seams: Seams) -> str:
    if recording.failures:
        # the innermost failure comes first; the outermost one hides the most
        path, error = min(recording.failures, key=lambda failure: failure[0].count("."))
        inside = path.removeprefix("model").lstrip(".")
        where = f"in {inside}, " if inside else ""
        return f"{name} cannot be cut into blocks: {where}{_reason(error)}. Change that, or {BY_HAND}."
    if seams.shared:
        return (
            f"{name} cannot be cut into blocks: all of them share the weights {seams.shared}. Give each block weights "
            f"of its own (copy.deepcopy), or {BY_HAND}."
        )
    if seams.several > 1:
        return (
            f"{name} cannot be cut into blocks: up to {seams.several} tensors go from one layer to the next, and a "
            f"seam is one tensor of tokens (B, N, D) or maps. Concatenate them between blocks, or {BY_HAND}."
        )
    return (
        f"{name} cannot be cut into blocks: it has fewer than two blocks between tokens (B, N, D) or maps; {BY_HAND}."
    )


def _reason(error: Exception) -> str:
    """What stopped the recorder, and the line of the network's own code."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if f"{Path('torch')}/" not in frame.filename and "cutting" not in Path(frame.filename).parts:
            line = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{text} ({Path(frame.filename).name}, line {frame.lineno}: {line})"
    return text


def _pool(model: nn.Module, layouts: list[Layout]) -> Callable[[Tensor, Layout], Tensor]:
    """What a linear probe reads: the class token where the model's own head does."""
    return first_token if getattr(model, "global_pool", "") == "token" and all(x.prefix for x in layouts) else mean_pool

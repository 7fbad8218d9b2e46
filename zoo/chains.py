"""A chain: any network seen as stem → block 1 … block n → head.

`Chain.of` makes one of any network; everything behind this module sees networks only in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from klas_zoo.cutting.parts import cut
from klas_zoo.cutting.recording import version_of
from klas_zoo.errors import FamilyError
from klas_zoo.layouts import Layout, Shape, mismatch
from klas_zoo.layouts import first_token as first_token
from klas_zoo.layouts import mean_pool as mean_pool


class Chain(nn.Module):
    """Stem, blocks and head of one network.

    Args:
        stem: images (B, C, H, W) → features, tokens (B, P + N, D) or maps (B, D, H, W) or (B, H, W, D).
        blocks: each features → features; n of them.
        head: features → logits (B, classes).
        input_shape: (C, H, W) of one image.
        layout: the shape of features without the batch → what lies where in them; or the layouts after the
            stem and after each block. Default: tokens without a prefix and on no known grid, or maps (D, H, W).
        pool: features and their layout → (B, D), what a linear probe reads. Default: the mean over
            tokens (none of the prefix) or positions.

    Raises:
        FamilyError: no blocks, features that are neither tokens nor maps or not laid out as
            `layout` says, or a head that does not give one row of logits an image; a part that gives several
            tensors, changes the features it is given, or shares weights with another part.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        input_shape: Shape,
        layout: Callable[[Shape], Layout] | Sequence[Layout] = Layout.inferred,
        pool: Callable[[Tensor, Layout], Tensor] = mean_pool,
    ) -> None:
        super().__init__()
        if not blocks:
            raise FamilyError("A chain needs at least one block between its stem and its head.")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.pool = pool
        self.input_shape = tuple(input_shape)
        self._refuse_shared_weights()
        self.shapes, self.classes = self._trace()
        self.layouts = tuple(map(layout, self.shapes)) if callable(layout) else tuple(layout)
        for found, said in zip(self.shapes, self.layouts, strict=True):
            if said.shape != found:
                raise FamilyError(f"Features of shape {found} are not laid out as {said.kind}, {said}.")

    @classmethod
    def of(cls, model: nn.Module, example: Tensor | Shape) -> Chain:
        """Any network as a chain: of timm, of torchvision, or of your own. The chain shares its weights.

        torch.fx records one forward pass; the network is cut where all data pass through one tensor
        of tokens or maps. A block is a module that the network repeats, as far as there are such.
        On other images than `example` the chain is checked to compute bit for bit what the model does.

        Args:
            model: images (B, C, H, W) → logits (B, classes); its mode and its state stay as they are.
            example: images (B, C, H, W) of the size the chain will take, one or more, on the model's device;
                or that size alone, (C, H, W).

        Raises:
            FamilyError: it cannot be recorded or has no seams; says why and what to change.
        """
        if not isinstance(example, Tensor):
            like = next(model.parameters(), torch.empty(0))
            example = torch.zeros(1, *example, device=like.device, dtype=like.dtype)
        if example.ndim != 4:
            raise FamilyError(f"An example is a batch of images (B, C, H, W), not {tuple(example.shape)}.")
        training = model.training
        with torch.inference_mode(False), evaluating(model):
            parts = cut(model, example, training=training)
        return cls(
            parts.stem,
            parts.blocks,
            parts.head,
            input_shape=tuple(example.shape[1:]),
            layout=parts.layouts,
            pool=parts.pool,
        )

    def _refuse_shared_weights(self) -> None:
        """A route may run one part without the other, and tuning would change both."""
        blocks = {f"block {number}": block for number, block in enumerate(self.blocks, start=1)}
        parts = {"the stem": self.stem, **blocks, "the head": self.head}
        owners: dict[Tensor, str] = {}
        for name, part in parts.items():
            for weight, tensor in part.named_parameters():
                if (owner := owners.setdefault(tensor, name)) != name:
                    raise FamilyError(
                        f"{name[0].upper()}{name[1:]} shares its weight {weight} with {owner}: give each part its own "
                        "(copy.deepcopy), or put both into one block."
                    )

    @torch.no_grad()
    def _trace(self) -> tuple[tuple[Shape, ...], int]:
        """Shapes without the batch after the stem and after each block, and the number of classes."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        shapes: list[Shape] = []
        features = torch.zeros(1, *self.input_shape, device=device)
        with evaluating(self):
            for place, part in enumerate((self.stem, *self.blocks)):
                features = _applied(part, features, f"Block {place}" if place else "The stem")
                shapes.append(tuple(features.shape[1:]))
                if features.ndim not in (3, 4):
                    raise FamilyError(f"Blocks must give tokens (N, D) or maps (D, H, W), not {shapes}.")
            logits = _applied(self.head, features, "The head")
        if logits.ndim != 2:
            raise FamilyError(f"A head must give logits (classes,) for an image, not {tuple(logits.shape[1:])}.")
        return tuple(shapes), logits.shape[1]

    @property
    def depth(self) -> int:
        """n, the number of blocks."""
        return len(self.blocks)

    def width(self, position: int) -> int:
        """Channels after block `position`; 0 is the stem's output."""
        return self.layouts[position].width

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes)."""
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.head(features)

    def walk(self, images: Tensor) -> Iterator[Tensor]:
        """Features after the stem and after each block, n + 1 of them, one at a time."""
        features = self.stem(images)
        yield features
        for block in self.blocks:
            features = block(features)
            yield features


class WrongShape(FamilyError):
    """A part of a chain cannot take what comes before it; the message names the part and the shape."""


def _applied(part: nn.Module, features: Tensor, name: str) -> Tensor:
    """
    Raises:
        WrongShape: the part does not take features of this shape, or gives no tensor.
        FamilyError: it changes the features it is given.
    """
    shape, version = tuple(features.shape[1:]), version_of(features)
    try:
        found = part(features)
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "images" if name == "The stem" else "features"
        raise WrongShape(f"{name} does not take {what} {shape}: {reason}") from error
    if not isinstance(found, Tensor):
        raise WrongShape(
            f"{name} gives a {type(found).__name__} for {shape}, not one tensor: a seam is one tensor, so concatenate "
            "them, or put the blocks between which several tensors pass into one."
        )
    if version_of(features) != version and name != "The stem":
        raise FamilyError(
            f"{name} changes the features it is given in place, and routes that branch give them to two blocks: build "
            "it with inplace=False, or let it clone them first."
        )
    return found


def can_stitch(source: Chain, i: int, target: Chain, j: int) -> bool:
    """Whether a stitching layer can turn features after block i of `source` into those after block j of `target`."""
    return not mismatch(source.layouts[i], target.layouts[j])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode and every part of it back into its own mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training

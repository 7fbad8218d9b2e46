"""In which order a stem lays patches down, found out by changing single patches."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.cutting.patches import token_grid
from klas_zoo.layouts import Layout

IMAGE = (3, 16, 24)
PATCH, WIDTH = 4, 12


class Patches(nn.Module):
    """Patches of 4×4 by reshaping, a token each; `order` sorts them, a class token may go before them."""

    def __init__(self, order: Any = None, *, classes: int = 0, mixing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * PATCH**2, WIDTH)
        self.prefix = nn.Parameter(torch.randn(1, classes, WIDTH))
        self.order, self.mixing = order, mixing

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        patches = images.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = patches.permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(batch, (height // PATCH) * (width // PATCH), PATCH**2 * channels)
        tokens = self.embed(patches)
        if self.order is not None:
            tokens = tokens[:, self.order]
        if self.mixing:
            tokens = tokens + tokens.mean(1, keepdim=True)
        return torch.cat([self.prefix.expand(batch, -1, -1), tokens], dim=1)


class PlainViT(nn.Module):
    """A Vision Transformer as people write it, with patches by reshaping."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True) for _ in range(3))
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean(1))


WINDOWS = torch.arange(24).reshape(2, 2, 3, 2).transpose(1, 2).flatten()  # 2×2 patches after another, as Hiera has them
COLUMNS = torch.arange(24).reshape(4, 6).T.flatten()


@pytest.mark.parametrize(
    ("stem", "prefix", "grid"),
    [
        (Patches(), 0, (4, 6)),
        (Patches(classes=2), 2, (4, 6)),
        (Patches(classes=2), 0, None),  # 26 tokens are no grid
        (Patches(WINDOWS), 0, None),
        (Patches(COLUMNS), 0, None),
        (Patches(mixing=True), 0, None),
    ],
    ids=["rows", "prefix", "prefix not stated", "windows", "columns", "mixed"],
)
def test_tokens_lie_on_a_grid_where_each_changes_with_its_own_patch(
    stem: nn.Module, prefix: int, grid: tuple[int, int] | None
) -> None:
    with torch.no_grad():
        tokens = stem(torch.zeros(1, *IMAGE)).shape[1]
    layout = Layout.of_tokens((tokens, WIDTH), prefix=prefix)
    assert token_grid(stem, torch.zeros(2, *IMAGE), layout) == grid


@pytest.mark.parametrize(
    ("stem", "layout"),
    [
        (Patches(), "4×6 of width 12"),
        (Patches(classes=1), "1 + 4×6 of width 12"),
        (Patches(WINDOWS), "24 of width 12"),
    ],
)
def test_a_transformer_of_ones_own_has_its_prefix_and_its_grid(stem: nn.Module, layout: str) -> None:
    chain = Chain.of(PlainViT(stem).eval(), IMAGE)
    assert chain.depth == 3
    assert {str(one) for one in chain.layouts} == {layout}


def test_pits_class_token_is_a_prefix_in_every_stage() -> None:
    model = timm.create_model("pit_ti_224", num_classes=5).eval()
    chain = Chain.of(model, (3, 224, 224))
    assert list(dict.fromkeys(map(str, chain.layouts))) == [
        "1 + 27×27 of width 64", "1 + 14×14 of width 128", "1 + 7×7 of width 256",
    ]  # fmt: skip
    # the first token after the stem is the class token, the second is the upper left patch
    one = torch.randn(1, 3, 224, 224)
    other = one.clone()
    other[:, :, :8, :8] += 1
    with torch.inference_mode():
        changed = (chain.stem(one) != chain.stem(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1]
    assert chain.pool(chain.stem(one), chain.layouts[0]).equal(chain.stem(one)[:, 0])


def test_qwens_tokens_lie_row_by_row_not_in_groups_of_four() -> None:
    """Its merger reads 2×2 patches at once, and its published weights came with tokens sorted by them."""
    arguments = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("qwen3_vit_88m", **arguments, pretrained_cfg_overlay={"input_size": (3, 128, 192)}).eval()
    chain = Chain.of(model, (3, 128, 192))
    assert set(map(str, chain.layouts)) == {"8×12 of width 32"}
    one = torch.randn(1, 3, 128, 192)
    for row, column in ((0, 1), (1, 0), (5, 7)):
        other = one.clone()
        other[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1
        with torch.inference_mode():
            changed = (chain.stem(one) - chain.stem(other)).abs().amax(-1)[0]
        assert (changed > 1e-3 * changed.amax()).nonzero().flatten().tolist() == [12 * row + column]

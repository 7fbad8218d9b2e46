"""Families of networks that cannot be cut or stitched, at the command line: one sentence, before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import run
from toys import write_images

VIT = 'model = "deit_tiny_patch16_224"\narguments = { img_size = 48, patch_size = 16, depth = 3, num_heads = 2, '
SMALL = VIT + "embed_dim = 12 }"
CROSSVIT = (
    'model = "crossvit_tiny_240"\narguments = { img_size = 48, img_scale = [1.0, 1.0], patch_size = [12, 16], '
    "depth = [[1, 2, 0], [1, 2, 0]], embed_dim = [%d, %d], num_heads = [2, 2] }"
)

NEAREST = (
    "Anchors small and large cannot be stitched: nearest to a seam are small after block 1 and large after block 1, "
)
ADVICE = ". Choose anchors with a common grid and equal prefix tokens, or an image size at which they have one."


@pytest.mark.parametrize(
    ("small", "large", "sentence"),
    [
        (
            SMALL,
            VIT.replace("patch_size = 16", "patch_size = 12") + "embed_dim = 24 }",
            NEAREST + "but features 1 + 3×3 of width 12 and 1 + 4×4 of width 24 do not lie on one grid" + ADVICE,
        ),
        (
            SMALL,
            VIT + "embed_dim = 24, reg_tokens = 4 }",
            NEAREST + "but prefix tokens (class, distillation, registers) cannot go from 1 to 5" + ADVICE,
        ),
        (
            CROSSVIT % (12, 16),
            CROSSVIT % (24, 32),
            "CrossVit cannot be cut into blocks: up to 7 tensors go from one layer to the next, and a seam is one "
            "tensor of tokens (B, N, D) or maps. Concatenate them between blocks, or build "
            "klas_zoo.Chain(stem, blocks, head, input_shape=…) from its modules.",
        ),
    ],
    ids=["grids", "prefixes", "several tensors"],
)
def test_networks_that_cannot_be_stitched_are_one_sentence(
    small: str, large: str, sentence: str, tmp_path: Path
) -> None:
    write_images(tmp_path / "images" / "train", ("ant", "bee", "cat", "dog"), 16, seed=1)
    write_images(tmp_path / "images" / "val", ("ant", "bee", "cat", "dog"), 4, seed=2)
    (tmp_path / "family.toml").write_text(
        'name = "bad"\ninput_shape = [3, 48, 48]\nnum_classes = 4\nimages = { crop_pct = 1.0 }\n'
        f'[[anchors]]\nname = "small"\n{small}\n[[anchors]]\nname = "large"\n{large}\n'
    )
    code, out, error = run(
        "build", "--family", tmp_path / "family.toml", "--data", tmp_path / "images", "--random-weights",
        "--registry", tmp_path / "registry", "--threads", 1,
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert error.splitlines()[-1] == f"Error: {sentence}"
    assert "Traceback" not in error and "probes" not in error

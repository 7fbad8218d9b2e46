"""The anchors of deit-micro as timm models."""

from __future__ import annotations

import pytest
import timm
import torch

from klas_zoo.families.micro import DEPTH, GRID, ConvStem, LocalMlp

NAMES = ["deit_micro_tiny", "deit_micro_small", "deit_micro_base"]


def test_timm_knows_the_models_by_name() -> None:
    assert set(timm.list_models("deit_micro*")) == set(NAMES)


@pytest.mark.parametrize(("name", "width"), [*zip(NAMES, (20, 40, 80), strict=True)])
def test_every_model_turns_small_images_into_tokens_on_a_grid_and_ten_logits(name: str, width: int) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 10)
    assert model.forward_features(images).shape == (2, GRID * GRID, width)
    assert len(model.blocks) == DEPTH
    assert model.num_prefix_tokens == 0


def test_timms_settings_are_those_of_cifar10() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("deit_micro_tiny"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)
    assert config["crop_pct"] == 1.0


def test_the_number_of_classes_and_the_drop_path_are_arguments_like_any_models() -> None:
    model = timm.create_model("deit_micro_tiny", num_classes=3, drop_path_rate=0.1)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_there_are_no_weights_on_the_hub() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("deit_micro_tiny", pretrained=True)


def test_the_stem_keeps_the_order_of_rows_and_columns() -> None:
    torch.manual_seed(0)
    stem = ConvStem((16, 16, 16), 32).eval()
    images = torch.zeros(1, 3, 32, 32)
    base = stem(images)
    images[..., 30:, :2] = 100.0  # the lower left corner
    changed = (stem(images) - base).abs().sum(-1)[0].view(GRID, GRID)
    assert changed.argmax() == (GRID - 1) * GRID
    assert changed[0, -1] == 0


def test_a_local_mlp_without_its_convolution_is_the_usual_mlp() -> None:
    mlp = LocalMlp(6, 10, act_layer=None, drop=0.0)
    tokens = torch.randn(2, GRID * GRID, 6)
    torch.nn.init.zeros_(mlp.local.weight)
    torch.nn.init.zeros_(mlp.local.bias)
    usual = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(tokens)))
    assert torch.allclose(mlp(tokens), usual, atol=1e-6)


def test_a_local_mlp_mixes_a_token_with_its_neighbours_on_the_grid_only() -> None:
    mlp = LocalMlp(6, 10)
    tokens = torch.randn(1, GRID * GRID, 6)
    moved = tokens.clone()
    moved[0, GRID + 1] += 1.0  # row 1, column 1
    changed = (mlp(moved) - mlp(tokens)).abs().sum(-1)[0].view(GRID, GRID) > 1e-6
    expected = torch.zeros(GRID, GRID, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("name", "width"), [("tiny", 6), ("small", 10), ("base", 18)])
def test_the_residual_networks_halve_the_resolution_once_before_their_stages(name: str, width: int) -> None:
    model = timm.create_model(f"resnet_micro_{name}").eval()
    images = torch.randn(2, 3, 32, 32)
    stem = model.maxpool(model.act1(model.bn1(model.conv1(images))))
    assert stem.shape == (2, width, 16, 16)
    assert model.forward_features(images).shape == (2, 4 * width, 2, 2)
    assert model(images).shape == (2, 10)

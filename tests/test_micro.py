"""The anchors of deit-micro and convnet-micro as timm models."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from timm.models.vision_transformer import Block

from klas_zoo.chains import Chain
from klas_zoo.families.micro import CONVNET_DEPTH, DEPTH, GRID, LocalBlock
from klas_zoo.profiles.macs import chain_cost

NAMES = ["deit_micro_tiny", "deit_micro_small", "deit_micro_base"]


def test_timm_knows_the_models_by_name() -> None:
    assert set(timm.list_models("deit_micro*")) == set(NAMES)


@pytest.mark.parametrize(("name", "width"), [*zip(NAMES, (48, 96, 192), strict=True)])
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


def test_every_size_costs_at_least_two_and_a_half_times_the_one_before() -> None:
    macs = [chain_cost(Chain.of(timm.create_model(name).eval(), (3, 32, 32)), (3, 32, 32)).total.macs for name in NAMES]
    assert all(large >= 2.5 * small for small, large in itertools.pairwise(macs))
    assert macs == pytest.approx([13.2e6, 64.1e6, 241.5e6], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_embedding_is_linear_and_at_least_as_wide_as_a_patch_has_values(name: str) -> None:
    projection = timm.create_model(name).patch_embed.proj
    assert projection.kernel_size == projection.stride == (4, 4)
    assert projection.out_channels >= 3 * 4 * 4


def test_a_block_without_its_convolution_is_timms() -> None:
    torch.manual_seed(0)
    ours, usual = LocalBlock(24, 3).eval(), Block(24, 3).eval()
    usual.load_state_dict({name: one for name, one in ours.state_dict().items() if not name.startswith("local.")})
    torch.nn.init.zeros_(ours.local.weight)
    torch.nn.init.zeros_(ours.local.bias)
    tokens = torch.randn(2, GRID * GRID, 24)
    assert torch.equal(ours(tokens), usual(tokens))


def test_a_block_adds_to_a_token_its_neighbours_on_the_grid_only() -> None:
    block = LocalBlock(6, 2)
    tokens = torch.zeros(1, GRID * GRID, 6)
    moved = tokens.clone()
    moved[0, GRID + 1] += 1.0  # row 1, column 1
    seen: list[torch.Tensor] = []
    block.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(tokens)
    block(moved)
    changed = (seen[1] - seen[0]).abs().sum(-1)[0].view(GRID, GRID) > 1e-6
    expected = torch.zeros(GRID, GRID, dtype=torch.bool)
    expected[:3, :3] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize(("name", "width"), [("small", 16), ("base", 32)])
def test_the_residual_networks_keep_one_grid_and_lose_no_pixel_in_the_stem(name: str, width: int) -> None:
    model = timm.create_model(f"convnet_micro_{name}").eval()
    images = torch.randn(2, 3, 32, 32)
    assert model.stem.kernel_size == model.stem.stride == (2, 2)
    assert model.stem.out_channels >= 3 * 2 * 2
    assert model(images).shape == (2, 10)
    chain = Chain.of(model, (3, 32, 32))
    assert chain.depth == CONVNET_DEPTH
    assert {(layout.width, layout.grid) for layout in chain.layouts} == {(width, (16, 16))}
    assert torch.equal(chain(images), model(images))

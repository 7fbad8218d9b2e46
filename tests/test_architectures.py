"""Cutting the built-in families' and other timm models into chains that compute what the models compute."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from small_models import MODELS, SHAPE, VIT, build, small_chain, small_model
from torch import nn

import klas_zoo.families.micro  # noqa: F401  registers deit-micro with timm
from klas_zoo.chains import Chain, Layout, mismatch
from klas_zoo.errors import FamilyError, SelectionError
from klas_zoo.families.anchors import Family
from klas_zoo.families.specs import builtin_families
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

# fewer of the same blocks: the large anchors of a family differ from its smallest only in width and depth
SHALLOW: dict[str, dict[str, Any]] = {
    "deit-base": {"depth": 3},
    "deit3-medium": {"depth": 3},
    "deit3-base": {"depth": 3},
    "swin-small": {"depths": (2, 2, 3, 2)},
    "swin-base": {"depths": (1, 1, 2, 1)},
    "resnet-swin-swin-tiny": {"depths": (2, 2, 2, 2)},
    "swinv2-tiny": {"depths": (2, 2, 3, 2)},
    "swinv2-small": {"depths": (1, 1, 3, 1)},
    "swinv2-base": {"depths": (1, 1, 2, 1)},
    "convnext-small": {"depths": (1, 1, 4, 1)},
    "convnext-base": {"depths": (1, 1, 2, 1)},
}
# families of other architectures are in test_census.py and, whole, in test_published.py
FAMILIES = (
    "deit-micro", "deit", "deit3", "swin", "resnet-swin", "swinv2", "convnext", "efficientnet", "levit", "resnet",
)  # fmt: skip
BUILTIN = [
    pytest.param(anchor.model, SHALLOW.get(name, {}), spec.input_shape, id=name)
    for spec in map(builtin_families().__getitem__, FAMILIES)
    for anchor in spec.anchors
    for name in [f"{spec.name}-{anchor.name}"]
]
SQUARE = (3, 32, 32)
SMALL = VIT | {"img_size": 32, "patch_size": 8, "depth": 3}
VARIANTS = [
    *(pytest.param(model, arguments, SHAPE, id=f"small-{name}") for name, (model, arguments) in MODELS.items()),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}, SQUARE, id="mean-of-patches"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "max"}, SQUARE, id="largest-of-patches"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "map"}, SQUARE, id="attention-pooling"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"pre_norm": True}, SQUARE, id="norm-before-blocks"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"pos_embed": "none"}, SQUARE, id="without-positions"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"dynamic_img_size": True}, (3, 48, 32), id="any-image-size"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"in_chans": 1}, (1, 32, 32), id="grey-images"),
    pytest.param("levit_128s", MODELS["levit"][1] | {"img_size": (64, 96)}, (3, 64, 96), id="levit-wide-images"),
    pytest.param("resnet18", MODELS["resnet"][1] | {"drop_rate": 0.5}, (3, 40, 56), id="resnet-odd-images"),
    pytest.param("convnext_tiny", MODELS["convnext"][1] | {"head_norm_first": True}, SHAPE, id="norm-before-pooling"),
]
BLOCKS = (
    "Block", "LocalBlock", "SwinTransformerBlock", "SwinTransformerV2Block", "LevitBlock", "BasicBlock", "Bottleneck",
    "ConvNeXtBlock", "InvertedResidual", "DepthwiseSeparableConv",
)  # fmt: skip


def blocks_in(model: nn.Module) -> int:
    """How many residual blocks timm's classes make; MobileNetV3 ends with a convolution of its own."""
    found = sum(type(part).__name__ in BLOCKS for part in model.modules())
    return found + (type(model).__name__ == "MobileNetV3")


@pytest.mark.parametrize(("name", "arguments", "shape"), [*BUILTIN, *VARIANTS])
def test_a_chain_computes_bit_for_bit_what_its_model_computes(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(name, arguments)
    chain = Chain.of(model, shape)
    images = torch.randn(1 if shape[1] > 200 else 3, *shape)
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(chain(images), logits)
        # every block has an effect, so that one left out or out of its place would show
        features = list(chain.walk(images))
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(features))
    assert torch.isfinite(logits).all() and logits.std() > 0
    assert (chain.depth, chain.classes) == (blocks_in(model), model.num_classes)

    # every parameter of the model is in exactly one part of the chain, and is the model's own
    parts = Counter(id(p) for part in (chain.stem, *chain.blocks, chain.head) for p in part.parameters())
    assert parts == Counter(id(p) for p in model.parameters())


# their own modules leave features in another order in memory than a stitching layer does, and torch's
# kernels then round otherwise: patch embeddings without a class token to be put in front, and ConvNeXt
REORDERED = ("deit-micro-tiny", "small-vit", "small-convnext", "small-convnextv2", "norm-before-pooling")


@pytest.mark.parametrize(
    ("name", "arguments", "shape"), [*VARIANTS, *(p for p in BUILTIN if p.id in ("deit-tiny", "deit-micro-tiny"))]
)
def test_a_stitch_of_a_model_with_itself_by_the_identity_is_the_model(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int], request: pytest.FixtureRequest
) -> None:
    exact = request.node.callspec.id not in REORDERED
    model = build(name, arguments)
    chain = Chain.of(model, shape)
    images = torch.randn(2, *shape)
    routes = [Route.stitch("it", i, "it", i, chain.depth) for i in range(1, chain.depth)]
    net = Supernet({"it": chain}, routes).eval()
    for seam in net.seams:
        nn.init.eye_(net.stitch(seam).linear.weight)
        nn.init.zeros_(net.stitch(seam).linear.bias)
    with torch.inference_mode():
        logits = model(images)
        assert len(routes) == chain.depth - 1 >= 2
        for _, found in net.forward_all(images, routes):
            assert torch.equal(found, logits) if exact else torch.allclose(found, logits, atol=1e-5)


def test_the_anchors_of_a_family_from_a_file_are_chains_of_their_models(tiny_family: Family) -> None:
    assert [(chain.depth, chain.shapes[0]) for chain in tiny_family.chains.values()] == [
        (3, (5, 12)),
        (3, (5, 24)),
        (4, (5, 48)),
    ]


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit", 0), ("deit", 1), ("distilled", 2), ("deit3", 1), ("registers", 5), ("registers-without-class", 3)],
)
def test_a_transformer_knows_its_prefix_tokens_and_how_its_patches_lie(name: str, prefix: int) -> None:
    layouts = set(small_chain(name).layouts)
    assert layouts == {Layout(kind="tokens", width=24, grid=(4, 4), prefix=prefix)}


def test_patches_of_images_of_any_size_lie_as_the_image_does() -> None:
    chain = Chain.of(build("vit_tiny_patch16_224", SMALL | {"dynamic_img_size": True}), (3, 48, 32))
    assert chain.layouts[0].grid == (6, 4)


def test_where_maps_are_flattened_into_tokens_it_shows_on_which_grid_these_lie() -> None:
    # 4×4 patches of 32×32 images
    assert Chain.of(timm.create_model("deit_micro_tiny"), (3, 32, 32)).layouts[0].grid == (8, 8)


STAGES = {
    "swin": ("nhwc", [16, 16, 8, 8, 4, 4, 4, 2], [12, 12, 24, 24, 48, 48, 48, 96]),
    "swinv2": ("nhwc", [16, 16, 8, 8, 4, 4, 4, 2], [12, 12, 24, 24, 48, 48, 48, 96]),
    "levit": ("tokens", [4, 4, 4, 2, 2, 1], [16, 16, 16, 24, 24, 32]),
    "levit-conv": ("maps", [4, 4, 4, 2, 2, 1], [16, 16, 16, 24, 24, 32]),
    "resnet": ("maps", [16, 16, 8, 8, 4, 4, 2], [64, 8, 16, 16, 24, 24, 32]),
    "resnet-bottleneck": ("maps", [16, 16, 8, 8, 4, 4, 2], [16, 32, 64, 64, 96, 96, 128]),
    "convnext": ("maps", [16, 16, 8, 8, 4, 4, 4, 2], [8, 8, 16, 16, 24, 24, 24, 32]),
    "mobilenetv3": ("maps", [32, 16, 8, 8] + [4] * 5 + [2] * 4, [16, 8, 16, 16, 24, 24, 24, 24, 24, 48, 48, 48, 288]),
}


@pytest.mark.parametrize("name", STAGES)
def test_features_after_a_block_have_the_grid_and_the_width_of_the_blocks_own_stage(name: str) -> None:
    kind, sides, widths = STAGES[name]
    assert list(small_chain(name).layouts) == [
        Layout(kind=kind, width=width, grid=(side, side))  # type: ignore[arg-type]
        for side, width in zip(sides, widths, strict=True)
    ]


def test_shrinking_attention_keeps_the_sides_of_wide_images_apart() -> None:
    chain = Chain.of(build("levit_128s", MODELS["levit"][1] | {"img_size": (64, 96)}), (3, 64, 96))
    assert [layout.grid for layout in chain.layouts] == [(4, 6)] * 3 + [(2, 3)] * 2 + [(1, 2)]


@pytest.mark.parametrize(
    ("source", "target", "i", "j"),
    [
        ("resnet", "swin", 3, 3),
        ("swin", "resnet", 1, 1),
        ("resnet", "levit", 5, 1),
        ("levit", "convnext", 2, 4),
        ("swin", "levit", 6, 2),
        ("efficientnet", "vit", 4, 2),
        ("vit", "swinv2", 3, 5),
        ("deit", "deit3", 2, 1),
    ],
)
def test_architectures_are_stitched_where_their_features_lie_on_one_grid(
    source: str, target: str, i: int, j: int
) -> None:
    chains = {source: small_chain(source), target: small_chain(target, seed=4)}
    route = Route.stitch(source, i, target, j, chains[target].depth)
    net = Supernet(chains, [route]).eval()
    images = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        features = list(chains[source].walk(images))[i]
        linear = net.stitch(net.seams[0]).linear
        # by hand: one vector for every place, row by row
        vectors = as_vectors(features, chains[source].layouts[i])
        mapped = vectors @ linear.weight.T + linear.bias
        expected = as_vectors(net.stitch(net.seams[0])(features), chains[target].layouts[j])
        assert torch.allclose(mapped, expected, rtol=1e-4, atol=1e-4)
        assert net(images, route).shape == (2, chains[target].classes)


def as_vectors(features: torch.Tensor, layout: Layout) -> torch.Tensor:
    if layout.kind == "maps":
        return features.flatten(2).mT
    return features if layout.kind == "tokens" else features.flatten(1, 2)


@pytest.mark.parametrize(
    ("source", "target", "numbers"),
    [("deit", "swin", (1, 0)), ("deit", "distilled", (1, 2)), ("resnet", "deit", (0, 1)), ("vit", "registers", (0, 5))],
)
def test_prefix_tokens_can_neither_appear_nor_vanish_at_a_seam(
    source: str, target: str, numbers: tuple[int, int]
) -> None:
    chains = {source: small_chain(source), target: small_chain(target)}
    reasons = {mismatch(a, b) for a in chains[source].layouts for b in chains[target].layouts}
    reason = f"prefix tokens (class, distillation, registers) cannot go from {numbers[0]} to {numbers[1]}"
    assert reasons == {reason}
    with pytest.raises(SelectionError, match=r"^There is no seam .*: prefix tokens \(class, distillation, reg"):
        Supernet(chains, [Route.stitch(source, 1, target, 1, chains[target].depth)])


@pytest.mark.parametrize("name", [*STAGES, "efficientnet", "mobilenetv2"])
def test_blocks_leave_the_features_they_are_given_as_they_are(name: str) -> None:
    # a branching of routes feeds the same features to two blocks
    chain = small_chain(name)
    with torch.inference_mode():
        features = chain.stem(torch.randn(2, *SHAPE))
        for part in (*chain.blocks, chain.head):
            before = features.clone()
            after = part(features)
            assert torch.equal(features, before)
            features = after


@pytest.mark.parametrize("name", ["levit", "levit-conv"])
def test_weights_loaded_after_an_evaluation_count_in_the_next(name: str) -> None:
    chain, other = small_chain(name), small_chain(name, seed=4)
    images = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        chain(images)
    chain.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(chain(images), other(images))


@pytest.mark.parametrize("name", ["swin", "levit", "resnet", "convnext", "efficientnet", "mobilenetv3"])
def test_training_a_chain_of_any_architecture_trains_its_model(name: str) -> None:
    model = small_model(name)
    chain = Chain.of(model, SHAPE).train()
    chain(torch.randn(2, *SHAPE)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "first", "last"),
    [
        ({}, 0, 1),
        ({"global_pool": "avg"}, 1, 17),
        ({"global_pool": "map", "reg_tokens": 2}, 3, 19),
        ({"global_pool": "avg", "class_token": False}, 0, 16),
    ],
    ids=["class token", "patches", "patches after registers", "patches without class token"],
)
def test_a_probe_reads_the_class_token_where_the_model_does_and_else_the_mean_of_patches(
    arguments: dict[str, Any], first: int, last: int
) -> None:
    chain = Chain.of(build("vit_tiny_patch16_224", SMALL | arguments), (3, 32, 32))
    tokens = torch.randn(2, chain.shapes[1][0], 24)
    assert torch.allclose(chain.pool(tokens, chain.layouts[1]), tokens[:, first:last].mean(1))


def test_training_a_chain_trains_its_model() -> None:
    model = build("deit_tiny_patch16_224", SMALL, training=True)
    chain = Chain.of(model, (3, 32, 32))
    chain(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert chain.training
    state = {name: torch.zeros_like(tensor) for name, tensor in chain.state_dict().items()}
    chain.load_state_dict(state)
    assert not any(p.any() for p in model.parameters())


def test_a_chain_goes_to_another_type_as_a_whole() -> None:
    chain = Chain.of(build("deit_tiny_distilled_patch16_224", SMALL), (3, 32, 32)).double()
    assert chain(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["deit", "levit"])
def test_cutting_a_model_leaves_the_model_whole(name: str) -> None:
    model = small_model(name)
    children, parameters = list(model._modules), list(model._parameters)
    Chain.of(model, SHAPE)
    assert (list(model._modules), list(model._parameters)) == (children, parameters)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_a_model_that_does_not_pool_gives_no_logits_for_an_image(name: str) -> None:
    model, arguments = MODELS[name]
    classes = 0 if name == "resnet" else 7
    with pytest.raises(FamilyError, match=r"logits \(classes,\) for an image, not \(\d+, \d+"):
        Chain.of(build(model, arguments | {"num_classes": classes, "global_pool": ""}), SHAPE)


def test_a_chain_is_whatever_torch_modules_it_is_made_of() -> None:
    chain = small_chain("swin")
    again = Chain(chain.stem, list(chain.blocks), chain.head, input_shape=SHAPE, layout=Layout.of_nhwc)
    assert again.layouts == chain.layouts

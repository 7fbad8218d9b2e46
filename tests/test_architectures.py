"""Cutting timm models into chains that compute what the models compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import nn

import klas_zoo.micro  # noqa: F401  registers deit-micro with timm
from klas_zoo.anchors import Family
from klas_zoo.architectures import to_chain
from klas_zoo.errors import FamilyError
from klas_zoo.families import builtin_families
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}
BUILTIN = [
    pytest.param(anchor.model, {}, spec.input_shape, id=f"{spec.name}-{anchor.name}")
    for spec in builtin_families().values()
    for anchor in spec.anchors
]
VARIANTS = [
    pytest.param("deit_tiny_distilled_patch16_224", SMALL, (3, 32, 32), id="distilled"),
    pytest.param("deit3_small_patch16_224", {}, (3, 224, 224), id="deit3-small"),
    pytest.param("deit3_small_patch16_224", SMALL, (3, 32, 32), id="deit3-layer-scale"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"reg_tokens": 4}, (3, 32, 32), id="registers"),
    pytest.param(
        "vit_tiny_patch16_224",
        SMALL | {"reg_tokens": 3, "class_token": False, "global_pool": "avg"},
        (3, 32, 32),
        id="registers-without-class-token",
    ),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}, (3, 32, 32), id="mean-of-patches"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "max"}, (3, 32, 32), id="largest-of-patches"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"global_pool": "map"}, (3, 32, 32), id="attention-pooling"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"pre_norm": True}, (3, 32, 32), id="norm-before-blocks"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"pos_embed": "none"}, (3, 32, 32), id="without-positions"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"dynamic_img_size": True}, (3, 48, 32), id="any-image-size"),
    pytest.param("vit_tiny_patch16_224", SMALL | {"in_chans": 1}, (1, 32, 32), id="grey-images"),
]


def build(name: str, arguments: dict[str, Any], *, training: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return timm.create_model(name, **arguments).train(training)


@pytest.mark.parametrize(("name", "arguments", "shape"), [*BUILTIN, *VARIANTS])
def test_a_chain_computes_bit_for_bit_what_its_model_computes(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(name, arguments)
    chain = to_chain(model, shape)
    images = torch.randn(1 if shape[1] == 224 else 3, *shape)
    with torch.inference_mode():
        logits = model(images)
        assert torch.equal(chain(images), logits)
    assert logits.std() > 0
    assert (chain.depth, chain.classes) == (len(model.blocks), model.num_classes)

    # every parameter of the model is in exactly one part of the chain, and is the model's own
    parts = Counter(id(p) for part in (chain.stem, *chain.blocks, chain.head) for p in part.parameters())
    assert parts == Counter(id(p) for p in model.parameters())


SLOW = ("deit-small", "deit-base", "deit3-small")


@pytest.mark.parametrize(("name", "arguments", "shape"), [p for p in (*BUILTIN, *VARIANTS) if p.id not in SLOW])
def test_a_stitch_of_a_model_with_itself_by_the_identity_is_the_model(
    name: str, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(name, arguments)
    chain = to_chain(model, shape)
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
            # a convolutional stem leaves its tokens in another memory layout than a linear map does
            same = torch.allclose(found, logits, atol=1e-5) if "micro" in name else torch.equal(found, logits)
            assert same


def test_the_anchors_of_a_family_from_a_file_are_chains_of_their_models(tiny_family: Family) -> None:
    assert [(chain.depth, chain.shapes[0]) for chain in tiny_family.chains.values()] == [
        (3, (5, 12)),
        (3, (5, 24)),
        (4, (5, 48)),
    ]


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
    chain = to_chain(build("vit_tiny_patch16_224", SMALL | arguments), (3, 32, 32))
    tokens = torch.randn(2, chain.shapes[1][0], 24)
    assert torch.allclose(chain.pool(tokens), tokens[:, first:last].mean(1))


def test_training_a_chain_trains_its_model() -> None:
    model = build("deit_tiny_patch16_224", SMALL, training=True)
    chain = to_chain(model, (3, 32, 32))
    chain(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert chain.training
    state = {name: torch.zeros_like(tensor) for name, tensor in chain.state_dict().items()}
    chain.load_state_dict(state)
    assert not any(p.any() for p in model.parameters())


def test_a_chain_goes_to_another_type_as_a_whole() -> None:
    chain = to_chain(build("deit_tiny_distilled_patch16_224", SMALL), (3, 32, 32)).double()
    assert chain(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_cutting_a_model_leaves_the_model_whole() -> None:
    model = build("deit_tiny_patch16_224", SMALL)
    children = list(model._modules)
    to_chain(model, (3, 32, 32))
    assert list(model._modules) == children
    assert "cls_token" in model._parameters


class Mixed(timm.models.VisionTransformer):
    """A subclass may do anything between its blocks."""


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet"),
        (lambda: timm.create_model("levit_128s"), "LevitDistilled"),
        (lambda: Mixed(**SMALL), "Mixed"),
    ],
    ids=["resnet18", "levit", "subclass"],
)
def test_an_architecture_nobody_has_read_is_refused_with_the_way_out(model: Any, name: str) -> None:
    with pytest.raises(FamilyError) as caught:
        to_chain(model(), (3, 224, 224))
    assert str(caught.value) == (
        f"{name} is not an architecture klas-zoo can cut into blocks (it knows timm's ViT, DeiT and DeiT III): "
        "build klas_zoo.Chain(stem, blocks, head) from it in Python."
    )


def test_a_model_that_does_not_pool_gives_no_logits_for_an_image() -> None:
    with pytest.raises(FamilyError, match=r"logits \(classes,\) for an image, not \(17, 7\)"):
        to_chain(build("vit_tiny_patch16_224", SMALL | {"global_pool": ""}), (3, 32, 32))

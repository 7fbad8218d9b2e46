"""One network of each of timm's modules, and what becomes of it as a chain."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from census import CENSUS, IN_WINDOWS, NOT_CUT, QUICK
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.errors import FamilyError
from klas_zoo.layouts import Layout
from klas_zoo.profiles.macs import chain_cost, count_macs
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet


def model_of(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=10, **arguments).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # a head that starts at zero would hide everything
    return model, model.pretrained_cfg["input_size"]


def check(name: str, arguments: dict[str, Any]) -> None:
    """Bit for bit the model; whole again when stitched to itself; no multiply-add lost or counted twice."""
    model, shape = model_of(name, arguments)
    state = {key: id(tensor) for key, tensor in model.named_parameters()}
    chain = Chain.of(model, shape)
    assert chain.depth >= 2
    assert {id(tensor) for tensor in chain.parameters()} == set(state.values())

    images = two_that_differ_in_a_corner(shape)
    with torch.inference_mode():
        features = list(chain.walk(images))
        logits = chain.head(features[-1])
        assert torch.equal(logits, model(images))
    assert all(a is not b for a, b in pairwise(features))

    first = {(layout.kind, layout.grid): place for place, layout in reversed([*enumerate(chain.layouts)])}
    wrong = [place for place in first.values() if not lies_as_said(chain.layouts[place], features[place])]
    assert bool(wrong) == (name in IN_WINDOWS), [str(chain.layouts[place]) for place in wrong]

    exact = all(map(in_order, chain.layouts, features))
    for found in stitched_to_itself(chain, images):
        error = (found - logits).norm() / logits.norm()
        assert torch.equal(found, logits) if exact else error < 1e-3, f"{name}: {error}"

    # a table of positions may be computed in every block that reads it: never less than the model's own
    own, parts = count_macs(model, images[:1]), chain_cost(chain, shape).total.macs
    assert own <= parts <= 1.001 * own


def two_that_differ_in_a_corner(shape: tuple[int, int, int]) -> Tensor:
    """Two images (2, C, H, W) that are the same but for the upper right quarter."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    different = torch.zeros(shape[1:], dtype=torch.bool)
    different[: shape[1] // 2, shape[2] // 2 :] = True
    images[1] = torch.where(different, images[1], images[0])
    return images


def lies_as_said(layout: Layout, features: Tensor) -> bool:
    """Whether the features of two such images differ most in the upper right quarter of the grid, where there is one.

    Tokens in another order, a prefix of another length or channels on another axis would spread the difference. On
    small grids every feature may have seen all of an image.
    """
    if len(layout.grid) == 1 or min(layout.grid) <= 8:
        return True
    rows, columns = layout.grid
    vectors = layout.channels_last(features)
    if layout.kind == "tokens":
        vectors = vectors[:, layout.prefix :].unflatten(1, layout.grid)
    difference = (vectors[1] - vectors[0]).norm(dim=-1)[1:-1, 1:-1]  # convolutions see less at borders
    top, bottom = difference.tensor_split(2, 0)
    quarters = [float(one.mean()) for half in (top, bottom) for one in half.tensor_split(2, 1)]
    # row by row: two rows in turn would mix left and right
    upper = difference[: rows // 2 - 1]
    beside = upper[:, columns // 2 :].mean(1) > upper[:, : columns // 2 - 1].mean(1)
    return quarters[1] == max(quarters) and bool(beside.all())


def in_order(layout: Any, features: Tensor) -> bool:
    """Whether features lie in memory as a stitching layer leaves them: else torch's kernels round otherwise."""
    return layout.arrange(layout.channels_last(features).contiguous()).stride() == features.stride()


def stitched_to_itself(chain: Chain, images: Tensor) -> list[Tensor]:
    """Logits of stitches by the identity behind the first, the middle and the last block but one."""
    places = sorted({1, chain.depth // 2, chain.depth - 1})
    net = Supernet({"it": chain}, [Route.stitch("it", i, "it", i, chain.depth) for i in places]).eval()
    for seam in net.seams:
        nn.init.eye_(net.stitch(seam).linear.weight)
        nn.init.zeros_(net.stitch(seam).linear.bias)
    with torch.inference_mode():
        return [net(images, route) for route in net.routes]


def test_the_census_names_every_module_of_timm() -> None:
    # a newer timm may have more
    assert set(CENSUS) | set(NOT_CUT) <= set(timm.list_modules())
    assert len(CENSUS) >= 97
    assert len(set(QUICK)) == 12


@pytest.mark.parametrize("module", QUICK)
def test_networks_of_many_kinds_are_chains(module: str) -> None:
    check(*CENSUS[module])


@pytest.mark.slow
@pytest.mark.parametrize("module", [name for name in CENSUS if name not in QUICK])
def test_a_network_of_each_other_module_of_timm_is_a_chain(module: str) -> None:
    check(*CENSUS[module])
    gc.collect()


@pytest.mark.slow
@pytest.mark.parametrize("module", NOT_CUT)
def test_networks_without_seams_are_refused_or_one_block(module: str) -> None:
    model, shape = model_of(NOT_CUT[module][0], {})
    try:
        assert Chain.of(model, shape).depth == 1
    except FamilyError as error:
        assert "cannot be cut into blocks: " in str(error)

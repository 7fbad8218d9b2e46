"""torch.compile, block by block: computes the same, and a route that is made of known parts compiles nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo

from klas_zoo.families.anchors import Family
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.compiling import block_by_block, compiled

ANCHORS = [Route.anchor("half", 3), Route.anchor("train", 3), Route.anchor("float", 4)]
STITCHES = [Route.stitch("half", 2, "train", 1, 3), Route.stitch("half", 1, "float", 2, 4)]


# dynamo looks at every tensor's gradient, and torch warns of it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_new_route_compiles_nothing_but_its_stitching_layer(tiny_family: Family) -> None:
    made: list[Any] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = Supernet(tiny_family.chains, [*ANCHORS, *STITCHES]).train()
    images = torch.randn(4, 3, 16, 16)
    plain = {route: net(images, route) for route in net.routes}
    parts = sum(len(chain.blocks) + 2 for chain in net.chains.values())
    with block_by_block(net, backend=counting):  # type: ignore[arg-type]
        assert all(compiled(block) for chain in net.chains.values() for block in chain.blocks)
        for route in ANCHORS:
            assert torch.allclose(net(images, route), plain[route], atol=1e-6)
        after_anchors = len(made)
        assert 0 < after_anchors <= parts
        for route in STITCHES:
            assert torch.allclose(net(images, route), plain[route], atol=1e-6)
        after_stitches = len(made)
        assert 0 < after_stitches - after_anchors <= len(STITCHES)
        for route in net.routes:
            net(torch.randn(4, 3, 16, 16), route).sum().backward()
        assert len(made) == after_stitches
    assert not any(compiled(module) for module in net.modules())
    torch._dynamo.reset()

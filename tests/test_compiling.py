"""torch.compile, block by block: computes the same, and a route that is made of known parts compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from klas_zoo.errors import ExportError
from klas_zoo.families.anchors import Family
from klas_zoo.routes import Route
from klas_zoo.runtimes import open_engine, pytorch
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


class Net(nn.Module):
    """Every width is another version of this code."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen, self.head = nn.Linear(12, width), nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.widen(images.flatten(1)).relu())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that ran, in place of machine code made of them."""
    ran: list[torch.fx.GraphModule] = []

    def recording(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*values: Any) -> Any:
            ran.append(graph)
            return graph.forward(*values)

        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=recording))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=64):
        yield ran
    torch._dynamo.reset()


def run(width: int, count: int = 1) -> np.ndarray:
    images = np.ones((2, 3, 2, 2), np.float32)
    torch.manual_seed(0)
    with open_engine(Net(width), runtime="torch", threads=1, options={"compile": "1"}) as session:
        for _ in range(count):
            found = session.run(images)
    return found


def test_a_compiled_session_runs_compiled_code_of_more_versions_than_torch_keeps(
    runs: list[torch.fx.GraphModule],
) -> None:
    for number, width in enumerate(range(4, 16), 1):  # torch's own default runs the ninth eagerly
        found = run(width, count=3)
        assert len(runs) == 3 * number
        torch.manual_seed(0)
        assert found == pytest.approx(Net(width)(torch.ones(2, 3, 2, 2)).detach().numpy(), abs=1e-6)


def test_a_version_that_torch_would_run_eagerly_is_an_error(
    runs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytorch, "_COMPILED_VERSIONS", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        run(4), run(5)
        with pytest.raises(ExportError, match=r"torch cannot run the network: .*recompile_limit"):
            run(6)
    assert len(runs) == 2

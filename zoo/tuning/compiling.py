"""torch.compile, one part of a network at a time, so that no combination of parts is compiled anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch._dynamo
from torch import nn

from klas_zoo.chains import Chain
from klas_zoo.supernet import Supernet


@contextmanager
def block_by_block(supernet: Supernet, *chains: Chain, backend: str = "inductor") -> Iterator[None]:
    """Stems, blocks, heads and stitching layers run compiled in here, each when it is first used."""
    parts = [*supernet.stitches.values()]
    for chain in (*supernet.chains.values(), *chains):
        assert isinstance(chain, Chain)
        parts += [chain.stem, *chain.blocks, chain.head]
    for route in supernet.routes:
        parts += [supernet.module(step) for step in supernet.steps(route) if step.owner is not None]
    # blocks of one class share their code, for which dynamo keeps eight versions unless told otherwise
    limits: dict[str, Any] = {"recompile_limit": 4 * len(parts), "accumulated_recompile_limit": 16 * len(parts)}
    try:
        for part in parts:
            part.compile(backend=backend, dynamic=False)
        with torch._dynamo.config.patch(limits):
            yield
    finally:
        for part in parts:
            part._compiled_call_impl = None  # torch has no name for undoing it


def compiled(module: nn.Module) -> bool:
    """Whether calls of a module run compiled now."""
    return module._compiled_call_impl is not None

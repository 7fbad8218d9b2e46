"""How much a network computes, operation by operation: what seams are placed by, not what profiles report."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counting(TorchDispatchMode):
    """Counts multiply-adds of products and convolutions, and for every operation the elements it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.work += formula(*args, **(kwargs or {}), out_val=out) // 2
        elif "scaled_dot_product" in str(func):
            self.work += 2 * prod(args[0].shape) * args[1].shape[-2]
        self.work += sum(one.numel() for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, Tensor))
        return out

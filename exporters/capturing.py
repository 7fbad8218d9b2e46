"""A torch module as a program of few kinds of operators, before it is translated to ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from klas_zoo.chains import Shape
from klas_zoo.exporters.opset import FUSED

BATCH = "batch"


def capture(module: nn.Module, input_shape: Shape, opset: int) -> torch.export.ExportedProgram:
    """The program of a module, for batches of any size.

    Args:
        module: images (B, C, H, W) → logits (B, classes), or a tuple of tensors.
        opset: that it will be translated to.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    # torch takes a batch of 0 or 1 for a constant; any other number stands for all
    images = torch.zeros(2, *input_shape, device=device)
    module(images)  # some networks keep tensors from their first call, which must not happen while they are captured
    # torch.onnx would write these with shapes that are computed when the graph runs
    table: dict[Any, Callable[..., Any]] = {torch.ops.aten.unbind.int: _unbind}
    if opset < FUSED:
        table[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    with _Rewritten(opset):
        program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim(BATCH)},))
    # called by torch's own functions, which the mode does not see into; decomposing is a quarter of a translation
    missed = any(node.target in table for node in program.graph.nodes)
    return program.run_decompositions(table) if missed else program


class _Rewritten(TorchFunctionMode):
    """While it is entered, some functions of torch are those below, in Python: torch captures what they consist of."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._instead: dict[Any, Callable[..., Any]] = {torch.unbind: _unbind, Tensor.unbind: _unbind}
        if opset < FUSED:
            self._instead[torch.nn.functional.scaled_dot_product_attention] = _attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))


def _unbind(tensor: Tensor, dim: int = 0) -> list[Tensor]:
    return [tensor.select(dim, number) for number in range(tensor.shape[dim])]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as products and a softmax: (B, H, N, D), (B, H, M, D), (B, H, M, E) → (B, H, N, E).

    Queries are scaled before the product: products of unscaled halves overflow.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped heads")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value

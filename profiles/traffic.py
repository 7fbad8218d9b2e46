"""What the parts of a chain move through memory, and what they hold there at most: a roofline's other half.

Each part is executed once, on one image of zeros, and every operator that torch dispatches is
written down: its multiply-adds (torch's own formulas of matrix products, convolutions and attention)
and how many numbers it reads and writes, weights apart from activations. Activations grow with the
batch, weights do not. Views move nothing. An operator counts as one even where a runtime would fuse
it with its neighbours: that is torch's eager traffic, and an upper bound for compilers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from klas_zoo.chains import Chain, Shape, evaluating


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator on one image: multiply-adds, and numbers read and written."""

    macs: int
    activations: int
    weights: int

    def bytes_moved(self, batch: int, bytes_each: int) -> int:
        """For a whole batch, numbers of `bytes_each` bytes."""
        return bytes_each * (batch * self.activations + self.weights)


@dataclass(frozen=True, kw_only=True)
class PartTraffic:
    """What a stem, block or head does in memory for one image.

    Attributes:
        operations: in the order of their execution.
        peak_activations: the most numbers that are alive at one moment, input and output included, weights not.
    """

    operations: tuple[Operation, ...]
    peak_activations: int

    def bytes_moved(self, batch: int = 1, bytes_each: int = 4) -> int:
        """Read and written by all operators for a batch."""
        return sum(one.bytes_moved(batch, bytes_each) for one in self.operations)

    def peak_activation_bytes(self, batch: int = 1, bytes_each: int = 4) -> int:
        return self.peak_activations * batch * bytes_each


@dataclass(frozen=True, kw_only=True)
class ChainTraffic:
    """Of every part of a chain; blocks in order, the first one first."""

    stem: PartTraffic
    blocks: tuple[PartTraffic, ...]
    head: PartTraffic

    @property
    def parts(self) -> tuple[PartTraffic, ...]:
        return (self.stem, *self.blocks, self.head)


def chain_traffic(chain: Chain, input_shape: Shape) -> ChainTraffic:
    """Observes every part of a chain on one image of `input_shape`, (C, H, W)."""
    device = next((p.device for p in chain.parameters()), torch.device("cpu"))
    features = torch.zeros(1, *input_shape, device=device)
    found = []
    with evaluating(chain), torch.no_grad():
        for part in (chain.stem, *chain.blocks, chain.head):
            traffic, features = observe(part, features)
            found.append(traffic)
    return ChainTraffic(stem=found[0], blocks=tuple(found[1:-1]), head=found[-1])


def observe(module: nn.Module, features: Tensor) -> tuple[PartTraffic, Tensor]:
    """Runs a module once in its present mode; what it did and its output."""
    weights = {*module.parameters(), *module.buffers()}
    observer = _Observer({_storage(one) for one in weights}, features)
    with observer:
        output = module(features)
    return PartTraffic(operations=tuple(observer.operations), peak_activations=observer.peak), output


class _Observer(TorchDispatchMode):
    """Writes down every operator that moves data, and the most that was alive at once."""

    def __init__(self, weights: set[int], features: Tensor) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._weights = weights
        self._alive = {StorageWeakRef(features.untyped_storage()): features.numel()}
        self.peak = features.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs))
        outputs = _tensors(result)
        read = {_storage(one) for one in inputs}
        new = [one for one in outputs if _storage(one) not in read]
        in_place = func._schema.is_mutable
        if new or in_place:
            moved = [*_once(inputs), *(new if new else outputs)]
            held = [one for one in moved if _storage(one) in self._weights]
            self.operations.append(
                Operation(
                    macs=_macs(func, args, kwargs or {}, result),
                    activations=sum(one.numel() for one in moved if _storage(one) not in self._weights),
                    weights=sum(one.numel() for one in held),
                )
            )
        self._remember(new)
        return result

    def _remember(self, new: list[Tensor]) -> None:
        self._alive = {kept: size for kept, size in self._alive.items() if not kept.expired()}
        for one in new:
            storage = one.untyped_storage()
            self._alive[StorageWeakRef(storage)] = storage.nbytes() // one.element_size()
        self.peak = max(self.peak, sum(self._alive.values()))


def _storage(tensor: Tensor) -> int:
    # the storage's own address, which views of it share
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _once(tensors: list[Tensor]) -> list[Tensor]:
    """An operator that is given one tensor twice reads it once."""
    seen = {(one.data_ptr(), one.shape, one.stride()): one for one in tensors}
    return list(seen.values())


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        # torch has a formula for CUDA's attention only; scores and their sums over values
        query, key, value = (one.shape for one in args[:3])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if func is torch.ops.aten.mkldnn_rnn_layer.default:
        # one layer of an LSTM in one direction: every token goes through the weights of inputs and of states
        tokens, of_inputs, of_states = args[:3]
        return math.prod(tokens.shape[:-1]) * (of_inputs.numel() + of_states.numel())
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) // 2 if formula else 0

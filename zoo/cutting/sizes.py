"""Tensors made or repeated once for each image, in a form that a recording sees.

`torch.ones(images.shape[0], 4)` and `table.expand(images.shape[0], -1)` take their sizes as C++ integers and
know nothing of torch.fx: while the number of images is a value of a graph, both would fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

_FUNCTIONS = ("zeros", "ones", "empty", "full")
_METHODS = ("expand", "repeat", "new_zeros", "new_ones", "new_empty", "new_full")


@contextmanager
def counted_by_images() -> Iterator[None]:
    """Records these calls where a size among their arguments is a value of a graph, and leaves all others alone."""
    functions = {name: getattr(torch, name) for name in _FUNCTIONS}
    methods = {name: getattr(torch.Tensor, name) for name in _METHODS}
    own = {name: vars(torch.Tensor)[name] for name in _METHODS if name in vars(torch.Tensor)}
    try:
        for name, function in functions.items():
            setattr(torch, name, _recorded("call_function", function, function))
        for name, method in methods.items():
            setattr(torch.Tensor, name, _recorded("call_method", name, method))
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)
        for name in methods:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)  # torch.Tensor has it from its base class


def _recorded(kind: str, target: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = _tracer((args, kwargs))
        if tracer is None:
            return original(*args, **kwargs)
        return tracer.create_proxy(kind, target, args, kwargs)

    return call


def _tracer(arguments: Any) -> Any:
    """The recorder of the first value of a graph among some arguments; None where there is none."""
    found: list[Any] = []
    map_aggregate(arguments, lambda one: found.append(one.tracer) if isinstance(one, fx.Proxy) else None)
    return found[0] if found else None

"""What modules keep in plain attributes between passes, put back after one was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Callable[[], list[nn.Module]]]:
    """Restores what modules keep in plain attributes: a cache filled while recording would hold proxies.

    Gives a function that names the modules which do hold proxies. What they keep in evaluation
    (timm's LeViT keeps biases it looked up) would outlive weights that are loaded or tuned later, so
    that such modules are not called as a whole: their operations stand in the graph instead.
    """
    kept = [(part, {k: _copy(v) for k, v in vars(part).items()}) for part in model.modules()]
    try:
        yield lambda: [part for part, _ in kept if any(map(_holds_proxies, vars(part).values()))]
    finally:
        for part, before in kept:
            attributes = vars(part)
            for name, value in before.items():
                now: Any = attributes.get(name)
                if type(value) in (dict, list, set) and type(now) is type(value):
                    now.clear()
                    now.extend(value) if isinstance(now, list) else now.update(value)
                else:
                    attributes[name] = value
            for name in attributes.keys() - before.keys():
                del attributes[name]


def _holds_proxies(value: Any) -> bool:
    if type(value) in (dict, list, tuple, set):
        return any(map(_holds_proxies, value.values() if isinstance(value, dict) else value))
    return isinstance(value, fx.Proxy)


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list, set) else value

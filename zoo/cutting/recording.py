"""Records the forward pass of any network as a torch.fx graph, with the values it computes.

torch.fx's own tracer knows no values: `if x.shape[2] == self.size` or `for part in parts` stop it.
The recorder executes every operation on an example while it records it. Sizes are plain integers,
and decisions by them are taken; only the batch stays a value of the graph, so that the recorded
network takes batches of any size. A module whose own code cannot be recorded (it decides by the
values of a tensor, say) becomes one operation of the graph, as a convolution is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError

from klas_zoo.cutting.counting import Counting
from klas_zoo.cutting.keeping import unchanged
from klas_zoo.cutting.sizes import counted_by_images
from klas_zoo.layouts import Kind

CONTAINERS = (nn.Sequential, nn.TransformerEncoder)
_AS_THEY_ARE = {"dim", "ndimension", "is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device"}
_PLAIN = (bool, int, float, str, torch.device, torch.dtype, torch.layout, type(None))


@dataclass(eq=False)
class Call:
    """One call of a module; nodes of the graph stand in its arguments and its result.

    `start` is the number of nodes before it. `portable`: it can stand in a graph as one operation.
    """

    path: str
    module: nn.Module
    parent: Call | None
    start: int
    args: Any = ()
    kwargs: Any = None
    result: Any = None
    portable: bool = True

    def outer(self) -> Iterator[Call]:
        """This call and those it was made by, the innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True)
class Value:
    """What a node of the graph computed for the example.

    Attributes:
        shape: of a tensor; None for anything else.
        data: depends on the images, beyond their number.
        number: depends on how many images there are, and on nothing else of them.
        batch: is that number itself.
        call: the innermost module whose code made it.
        work: multiply-adds (and elements written) of this node alone.
    """

    shape: tuple[int, ...] | None
    data: bool
    number: bool
    batch: bool
    call: Call | None
    work: int


@dataclass(eq=False)
class Recording:
    """A recorded network: `graph` from its only placeholder, the images, to its logits.

    Attributes:
        bundles: values that the network itself does not compute: tensors that go side by side from block to
            block, concatenated, with their layout's kind. `bundles` puts them in.
        slices: the parts of these, each with its bundle.
    """

    model: nn.Module
    graph: fx.Graph
    values: dict[fx.Node, Value]
    calls: list[Call]
    batch: int
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    bundles: dict[fx.Node, Kind] = field(default_factory=dict)
    slices: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)


def record(model: nn.Module, example: Tensor) -> Recording:
    """Executes `model` on images (B, C, H, W) and records what it does.

    The model must be in evaluation mode; it is left as it was, whatever it keeps between passes.

    Raises:
        Exception: what the model's own forward pass raises, or torch.fx.proxy.TraceError.
    """
    recorder = _Recorder(example)
    root = _Root(model)
    with torch.no_grad(), counted_by_images(), unchanged(model) as changed:
        graph = recorder.trace(root)
        keep = {id(part) for part in changed()}
    for call in recorder.calls:
        if id(call.module) in keep:
            for one in call.outer():
                one.portable = False
    return Recording(root, graph, recorder.values, recorder.calls, len(example), recorder.failures)


class _Root(nn.Module):
    """Passes images on to the model and nothing else, whatever further arguments its forward pass has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class _Proxy(fx.Proxy):
    """A value of the graph that knows what it is for the example."""

    def __init__(self, node: fx.Node, tracer: _Recorder, concrete: Any) -> None:
        super().__init__(node, tracer)
        self._concrete = concrete

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.size()

    def size(self, dim: int | None = None) -> Any:
        sizes: list[Any] = list(self._concrete.shape)
        if sizes and self.tracer.depends_on_batch(self.node):  # type: ignore[attr-defined]
            sizes[0] = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return tuple(sizes) if dim is None else sizes[dim]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._concrete, name)
        if isinstance(found, _PLAIN):
            return found
        if not callable(found):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if name in _AS_THEY_ARE:
            return found
        return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self._concrete))])  # type: ignore[index]

    def __bool__(self) -> bool:
        if self.tracer.values[self.node].data:  # type: ignore[attr-defined]
            raise TraceError("its forward pass decides by the values of a tensor")
        return bool(self._concrete)

    def __index__(self) -> int:
        if self.tracer.values[self.node].batch:  # type: ignore[attr-defined]
            raise TraceError("its forward pass counts the images of a batch one by one")
        raise TraceError("its forward pass takes a number out of a tensor")

    __int__ = __float__ = __complex__ = __index__

    def __len__(self) -> int:
        if isinstance(self._concrete, Tensor) and self.tracer.depends_on_batch(self.node):  # type: ignore[attr-defined]
            raise TraceError("its forward pass takes len() of a batch (x.shape[0] can be recorded)")
        return len(self._concrete)


class _Recorder(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self._example = example
        self._executing = False
        self._stack: list[Call] = []
        self._attributes: dict[str, fx.Proxy] = {}
        self._names: dict[int, str] = {}
        self.values: dict[fx.Node, Value] = {}
        self.calls: list[Call] = []
        self.failures: list[tuple[str, Exception]] = []

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        named = [*root.named_parameters(), *root.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        return super().trace(root, concrete_args)

    def depends_on_batch(self, node: fx.Node) -> bool:
        value = self.values[node]
        return value.data or value.number

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> Any:
        arguments = self.create_arg(args), self.create_arg(kwargs)
        with Counting() as counting:
            before = _versions((args, kwargs))
            concrete = self._execute(kind, target, args, kwargs)
        node = self.create_node(kind, target, *arguments, *rest[:2])
        self.values[node] = self._value(node, concrete, counting.work)
        for changed, version in before:
            if version_of(changed._concrete) != version and changed._concrete is concrete:
                changed.node = node  # what reads it from now on reads what was written into it
        if type(concrete) in (tuple, list):
            whole = _Proxy(node, self, concrete)
            return type(concrete)(self._part(whole, index) for index in range(len(concrete)))
        return _Proxy(node, self, concrete)

    def _part(self, whole: _Proxy, index: int) -> Any:
        """One of several results; sizes and flags among them are taken as they are."""
        found = whole._concrete[index]
        if isinstance(found, _PLAIN):
            return found
        return self.create_proxy("call_function", operator.getitem, (whole, index), {})

    def _execute(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == "placeholder":
            return self._example
        concrete = lambda value: value._concrete if isinstance(value, _Proxy) else value  # noqa: E731
        args, kwargs = map_aggregate(args, concrete), map_aggregate(kwargs, concrete)
        self._executing = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            function = self.root.get_submodule(target) if kind == "call_module" else target
            return function(*args, **kwargs)
        finally:
            self._executing = False

    def _value(self, node: fx.Node, concrete: Any, work: int) -> Value:
        inputs = [self.values[one] for one in node.all_input_nodes]
        tensor = isinstance(concrete, Tensor)
        data = node.op == "placeholder" or any(one.data for one in inputs)
        batch = node.op == "call_method" and node.target == "size" and concrete == len(self._example)
        data = data and not batch
        number = batch or (not data and any(one.number for one in inputs))
        call = self._stack[-1] if self._stack else None
        return Value(tuple(concrete.shape) if tensor else None, data, number, batch, call, work)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        # constants are made without a proxy; every other node gets its value in create_proxy
        self.values[node] = Value(None, False, False, False, None, 0)
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._executing or not isinstance(attr_val, Tensor) or (name := self._names.get(id(attr_val))) is None:
            return attr_val
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._executing:
            return forward(*args, **kwargs)
        call = Call(self.path_of_module(m), m, self._stack[-1] if self._stack else None, len(self.graph.nodes))
        self._lower(call, args=args, kwargs=kwargs)
        self.calls.append(call)
        known = len(self.calls)
        self._stack.append(call)
        try:
            whole = self.is_leaf_module(m, call.path)
            if not whole:
                try:
                    result = forward(*args, **kwargs)
                except Exception as error:  # code that cannot be recorded raises anything
                    self.failures.append((call.path, error))
                    self._forget(call.start, known)
                    whole = True
            if whole:
                result = self.create_proxy("call_module", call.path, args, kwargs)
        finally:
            self._stack.pop()
        self._lower(call, result=result)
        return result

    def _lower(self, call: Call, **values: Any) -> None:
        """Notes nodes instead of proxies: what is written in place later makes a proxy another node."""
        try:
            for name, value in values.items():
                setattr(call, name, self.create_arg(value))
        except (NotImplementedError, TypeError, RuntimeError):
            call.portable = False  # takes or gives an object that no graph can hold

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, CONTAINERS)

    def _forget(self, nodes: int, calls: int) -> None:
        """Takes back what was recorded after the first `nodes` nodes and `calls` calls."""
        for node in reversed(list(self.graph.nodes)[nodes:]):
            self.graph.erase_node(node)
            del self.values[node]
        self._attributes = {name: proxy for name, proxy in self._attributes.items() if proxy.node in self.values}
        del self.calls[calls:]


def concatenated(node: fx.Node) -> tuple[list[fx.Node], int] | None:
    """What a node concatenates, and along which axis; None where it does something else."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    tensors, axis = given["tensors"], given.get("dim", given.get("axis", 0))
    if not isinstance(axis, int) or not isinstance(tensors, (list, tuple)):
        return None
    return [one for one in tensors if isinstance(one, fx.Node)], axis


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written into; tensors of torch's inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(arguments: Any) -> list[tuple[_Proxy, int]]:
    """How often each tensor among some arguments was written into."""
    found: list[tuple[_Proxy, int]] = []

    def note(value: Any) -> Any:
        if isinstance(value, _Proxy) and isinstance(value._concrete, Tensor):
            found.append((value, version_of(value._concrete)))
        return value

    map_aggregate(arguments, note)
    return found

"""Opens and runs one network of every built-in family in every precision on the CUDA provider; prints what lies where.

A network is a family's smallest anchor with one block of each kind, two where every other one shifts its windows: the
operators of further blocks are the same, and translating them is what takes time.
"""

from __future__ import annotations

import gc
import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from klas_zoo.chains import Chain
from klas_zoo.errors import KlasZooError
from klas_zoo.exporters.precision import converter
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families import micro as micro  # registers its models with timm
from klas_zoo.families.specs import builtin_families
from klas_zoo.routes import Route
from klas_zoo.runtimes import CUDA_PROVIDER, open_engine
from klas_zoo.supernet import Supernet

PRECISIONS = ("fp32", "fp16", "bf16")


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays; the collector would look at it and at translated graphs again and again
    gc.disable()
    families = sys.argv[1:] or sorted(builtin_families())
    known: dict[str, dict[str, Any]] = {}  # two families have the same smallest network
    found = {}
    for name in families:
        model = builtin_families()[name].anchors[0].model
        started = time.process_time()
        known[model] = found[name] = known.get(model) or partitions(name)
        gc.collect()
        print(f"{name}: {time.process_time() - started:.1f} s of processor time", file=sys.stderr, flush=True)
    print(json.dumps(found))


def chains(family: str) -> tuple[Chain, Chain]:
    """The family's smallest anchor, shortened and whole."""
    spec = builtin_families()[family]
    anchor = spec.anchors[0]
    model = timm.create_model(anchor.model.split(".")[0], num_classes=spec.num_classes, **anchor.arguments)
    whole = Chain.of(model.eval(), spec.input_shape)
    return shortened(whole, 2 if "swin" in family else 1), whole


def translated(chain: Chain) -> tuple[RouteExporter, Route]:
    route = Route.anchor("short", chain.depth)
    return RouteExporter(Supernet({"short": chain}, [route]).eval(), chain.input_shape), route


class _Operators(TorchDispatchMode):
    """Collects what torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def operators(module: nn.Module, shape: tuple[int, ...]) -> set[str]:
    """Names of torch's operators, of which a translated graph's are made; of features without the batch's edge."""
    with torch.no_grad(), _Operators() as seen:
        module(torch.zeros(2, *shape))
    return seen.names - {"aten.as_strided_.default"}  # of layouts in memory: no graph has it


def partitions(family: str) -> dict[str, Any]:
    chain, _ = chains(family)
    exporter, route = translated(chain)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            path = Path(folder) / f"{precision}.onnx"
            exporter._convert = converter(precision, list)
            exporter.export(route, path, metadata={})
            found[precision] = partition(path, chain.input_shape)
    return found


class Cut(nn.Module):
    """Features of any shape as those that the next block takes: as many numbers, in another order."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.size = shape, math.prod(shape)

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(1)
        flat = flat.repeat(1, -(-self.size // flat.shape[1])) if flat.shape[1] < self.size else flat
        return flat[:, : self.size].reshape(-1, *self.shape)


def shortened(chain: Chain, most: int) -> Chain:
    """Blocks with modules or operators that none before them had, at most so many alike, and what hands features on."""
    kept: list[nn.Module] = []
    seen: Counter[str] = Counter()
    now = chain.shapes[0]
    for before, after, block in zip(chain.shapes, chain.shapes[1:], chain.blocks, strict=False):
        parts = set(re.findall(r"\w+(?=\()|kernel_size=[^=]*\)|stride=[^=]*\)", repr(block))) | {f"rank {len(before)}"}
        parts |= operators(block, before)  # some blocks of a class have a skip connection, others none
        if any(seen[part] < most for part in parts):
            seen.update(parts)
            kept += [block] if now == before else [Cut(before), block]
            now = after
    kept += [] if now == chain.shapes[-1] else [Cut(chain.shapes[-1])]
    return Chain(chain.stem, kept, chain.head, input_shape=chain.input_shape)


def partition(path: Path, input_shape: tuple[int, ...]) -> dict[str, Any]:
    options = {"session.record_ep_graph_assignment_info": "1"}
    try:
        session = open_engine(path, provider=CUDA_PROVIDER, options=options)
    except KlasZooError as error:
        return {"refused": str(error)}
    with session:
        nodes: dict[str, Counter[str]] = {}
        for part in session.raw.get_provider_graph_assignment_info():
            nodes.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        logits = session.run(np.zeros((2, *input_shape), np.float32))
    return {"nodes": nodes, "shape": logits.shape}


if __name__ == "__main__":
    main()

"""A family as a package for torch: one safetensors file, routes and references beside it.

    manifest.json            as of every package; routes have no file of their own
    weights.safetensors      the supernet's tensors, in the package's precision
    references.safetensors   real images, and what the fp32 torch routes answer

Only numbers are stored: reading one executes nothing, and no pickle is ever read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.errors import DamagedPackage, UsageError, VerificationError
from klas_zoo.exporters.contract import Answer, Artifact, Verdict, judge
from klas_zoo.exporters.family import (
    REFERENCES,
    Answers,
    Images,
    Listener,
    Source,
    ask_torch,
    entries,
    staging,
    write_references,
)
from klas_zoo.exporters.manifest import Manifest, PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.precision import limits_for
from klas_zoo.supernet import Supernet

WEIGHTS = "weights.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_torch(
    source: Source,
    out: Path,
    *,
    precision: str,
    images: Images,
    listener: Listener = lambda stage, route: None,
) -> tuple[Package, list[Verdict]]:
    """Writes the supernet's weights in a precision; computing stays in fp32, where `load` brings them back.

    Raises:
        UsageError: int8, which has no such weights.
        VerificationError: a route is too far from fp32.
        PackageError: `out` is taken.
        OSError: a file cannot be written.
    """
    if precision not in DTYPES:
        raise UsageError(f"--format torch takes --precision {', '.join(DTYPES)}, not {precision}: export it as onnx.")
    with staging(out) as folder:
        supernet = source.load([one.route for one in source.routes]).eval()
        answers = ask_torch(supernet, source.routes, images.test, listener)
        stored = {name: _stored(tensor, DTYPES[precision]) for name, tensor in supernet.state_dict().items()}
        path = folder / WEIGHTS
        save_file(stored, path)
        path.chmod(0o666 & ~_umask(folder))  # safetensors keeps a file from everybody but its owner
        # what is verified is what was read back
        _fill(supernet, path)
        verdicts = _verdicts(source, supernet, answers, path, precision)
        refused = [one for one in verdicts if one.status == "refused"]
        if refused:
            raise VerificationError(f"Cannot export {refused[0].artifact.route}: {refused[0].reason}")
        kept = tuple(
            replace(one, verification=verdict.verification)
            for one, verdict in zip(source.routes, verdicts, strict=True)
        )
        write_references(folder / REFERENCES, answers, [one.name for one in kept])
        write_manifest(
            folder,
            Manifest(
                format="torch", precision=precision, family=source.facts, weights=WEIGHTS, references=REFERENCES,
                routes=kept, files=entries(folder), provenance=source.provenance,
            ),
        )  # fmt: skip
        Package.open(folder)
    return Package.open(out, content=False), verdicts


def load_supernet(package: Package, chains: Mapping[str, Chain]) -> Supernet:
    """The supernet of a package of format torch, in fp32, in chains of the same family whose weights it replaces.

    Raises:
        UsageError: the package is of another format.
        DamagedPackage: the weights are not those of these chains and routes.
    """
    if package.manifest.format != "torch":
        raise UsageError(f"{package.folder} is of format {package.manifest.format}, not torch.")
    supernet = Supernet(dict(chains), [one.route for one in package.routes])
    _fill(supernet, package.weights)
    return supernet.eval()


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    plain = tensor.detach().cpu().contiguous()
    return plain.to(dtype) if plain.is_floating_point() else plain


def _fill(supernet: Supernet, weights: Path) -> None:
    try:
        found = load_file(weights)
        wanted = supernet.state_dict()
        supernet.load_state_dict({n: t.to(wanted[n].dtype) if n in wanted else t for n, t in found.items()})
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        raise DamagedPackage(f"{weights} does not hold the weights of this family's routes.") from error


def _verdicts(
    source: Source, supernet: Supernet, answers: Answers, path: Path, precision: str
) -> list[Verdict]:
    by_name = {one.name: one for one in source.routes}

    def open_route(artifact: Artifact) -> Answer:
        return partial(_answer, supernet, by_name[artifact.route])

    limits = limits_for(precision, source.facts.weights)
    return [
        judge(
            Artifact(route=one.name, format="torch", precision=precision, path=path),
            open_route, answers.compared(one.name), limits,
        )
        for one in source.routes
    ]  # fmt: skip


def _answer(supernet: Supernet, route: PackagedRoute, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return supernet(torch.from_numpy(images), route.route).numpy()


def _umask(folder: Path) -> int:
    """Of this process, read off a folder it made: asking the system for it would change it for a moment."""
    return 0o777 & ~folder.stat().st_mode

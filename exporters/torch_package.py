"""A family as a package for torch: one safetensors file, routes and references beside it.

    manifest.json            as of every package; routes have no file of their own
    weights.safetensors      the supernet's tensors, in the package's precision
    references.safetensors   real images, and what the fp32 torch routes answer

Only numbers are stored: reading one executes nothing, and no pickle is ever read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.errors import CannotRunHere, DamagedPackage, FamilyError, UnknownName, UsageError, VerificationError
from klas_zoo.exporters.contract import Artifact, OpenedEngine, OpenEngine, Verdict
from klas_zoo.exporters.family import REFERENCES, PackageSource, VerificationImages
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.manifest import MANIFEST, Manifest, PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_writing import entries, staging, write_references
from klas_zoo.exporters.reference_logits import Listener, ReferenceLogits, reference_logits
from klas_zoo.exporters.verification import verify_engines
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import AnchorSpec, FamilySpec
from klas_zoo.supernet import Supernet
from klas_zoo.tensors import write_tensors

WEIGHTS = "weights.safetensors"
_FILES = ("checkpoint_path", "cache_dir")  # arguments of timm's that name some
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export_torch(
    source: PackageSource,
    out: Path,
    *,
    precision: str,
    images: VerificationImages,
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
        wanted = [one.route for one in source.routes]
        supernet = source.load(wanted).narrowed(wanted).eval()
        reference = reference_logits(supernet, wanted, images.test, folder=folder.parent, listener=listener)
        stored = {name: _stored(tensor, DTYPES[precision]) for name, tensor in supernet.state_dict().items()}
        path = folder / WEIGHTS
        write_tensors(stored, path)
        # what is verified is what was read back
        _fill(supernet, path)
        verdicts = _verdicts(source, supernet, reference, path, precision)
        refused = [one for one in verdicts if one.status == "refused"]
        if refused:
            raise VerificationError(f"Cannot export {refused[0].artifact.route}: {refused[0].reason}")
        kept = tuple(
            replace(one, verification=verdict.verification)
            for one, verdict in zip(source.routes, verdicts, strict=True)
        )
        write_references(folder / REFERENCES, reference, [one.name for one in kept])
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

    Anchors that no route of the package needs are left out.

    Raises:
        UsageError: the package is of another format.
        DamagedPackage: the weights are not those of these chains and routes.
    """
    if package.manifest.format != "torch":
        raise UsageError(f"{package.folder} is of format {package.manifest.format}, not torch.")
    routes = [one.route for one in package.routes]
    used = {segment.anchor for route in routes for segment in route.segments}
    supernet = Supernet({name: chain for name, chain in chains.items() if name in used}, routes)
    _fill(supernet, package.weights)
    return supernet.eval()


def opener(package: Package) -> OpenEngine:
    """How routes of a package are opened; its supernet is built when the first route is opened.

    Opening raises:
        CannotRunHere: the anchors are not timm's, or of a newer timm.
        DamagedPackage: the manifest describes anchors that cannot be built, or the weights are not theirs.
    """
    by_name = {one.name: one for one in package.routes}
    supernet = cache(lambda: load_supernet(package, _chains(package)))

    return lambda artifact: _opened(supernet(), by_name[artifact.route])


def _chains(package: Package) -> Mapping[str, Chain]:
    """The family's anchors as the manifest describes them, with weights that are to be replaced."""
    family = package.manifest.family
    if not all("model" in anchor for anchor in family.anchors):
        raise CannotRunHere("Its anchors are no models of timm; load_supernet takes them as chains.")
    where = package.folder / MANIFEST
    for anchor in family.anchors:
        _refuse_files(anchor, where)
        _refuse_excess(anchor, where, package.weights)
    anchors = tuple(
        AnchorSpec(name=one["name"], model=one["model"], arguments=one["arguments"]) for one in family.anchors
    )
    shape = family.input_shape
    spec = FamilySpec(
        name=family.name, description="", input_shape=(shape[0], shape[1], shape[2]),
        num_classes=family.num_classes, anchors=anchors,
    )  # fmt: skip
    try:
        return load_family(spec, random_weights=True).chains
    except UnknownName as error:
        raise CannotRunHere(str(error)) from error
    except FamilyError as error:
        raise DamagedPackage(f"{where} describes anchors that cannot be built: {error}") from error


def _refuse_files(anchor: Mapping[str, Any], where: Path) -> None:
    """timm would read or fetch files where an argument names them."""
    try:
        names = (str(anchor["name"]), str(anchor["model"]))
        plain = all(type(value) in (int, float, bool, str, list) for value in anchor["arguments"].values())
        asked = [name for name in anchor["arguments"] if name.startswith("pretrained") or name in _FILES]
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedPackage(f"{where} describes an anchor that cannot be understood ({error}).") from error
    if asked or not plain:
        found = asked[0] if asked else "what is no number or text"
        raise DamagedPackage(f"{where} gives the anchor {names[0]} ({names[1]}) {found}, which no package does.")


def _refuse_excess(anchor: Mapping[str, Any], where: Path, weights: Path) -> None:
    """Building a network of 10^7 blocks takes hours before it can be found that the weights are of another one.

    A block has a tensor at least, and a tensor as many bytes as any of its dimensions.
    """
    with safetensors.safe_open(weights, "np") as opened:
        tensors = len(opened.keys())
    size = weights.stat().st_size
    for name, value in anchor["arguments"].items():
        most = tensors if name.startswith(("depth", "num_layers", "layers")) else size
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not -most <= number <= most:
                raise DamagedPackage(
                    f"{where} gives the anchor {anchor['name']} {name} {str(number)[:20]}, more than the weights have "
                    f"({tensors} tensors, {size} bytes)."
                )


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
    source: PackageSource, supernet: Supernet, reference: ReferenceLogits, path: Path, precision: str
) -> list[Verdict]:
    by_name = {one.name: one for one in source.routes}

    return verify_engines(
        [Artifact(route=one.name, format="torch", precision=precision, path=path) for one in source.routes],
        lambda artifact: _opened(supernet, by_name[artifact.route]),
        reference,
        lambda one: limits_for(one.precision, source.facts.weights),
    )


def _opened(supernet: Supernet, route: PackagedRoute) -> OpenedEngine:
    return OpenedEngine(outputs=partial(_outputs, supernet, route))


def _outputs(supernet: Supernet, route: PackagedRoute, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return supernet(torch.from_numpy(images), route.route).numpy()

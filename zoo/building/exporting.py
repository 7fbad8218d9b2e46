"""What `klas-zoo export` writes, in every format, and the images it verifies with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klas_zoo.data.loading import Split, batches, load_data
from klas_zoo.errors import UnknownName, UsageError
from klas_zoo.exporters.carried_cascades import carry_cascades
from klas_zoo.exporters.contract import Verdict
from klas_zoo.exporters.family import Labelled, Listener, PackageSource, Profile, VerificationImages, export_family
from klas_zoo.exporters.formats import DERIVED, FORMATS
from klas_zoo.exporters.limits import FEW, images_needed, limits_for
from klas_zoo.exporters.opset import FUSED, PORTABLE
from klas_zoo.exporters.package_writing import scratch, staging
from klas_zoo.families.specs import FamilySpec, builtin_families
from klas_zoo.runtimes.plans import TENSORRT_RUNTIMES

_MOST_CALIBRATION = 200


def export_as(
    source: PackageSource,
    out: Path,
    options: Mapping[str, Any],
    *,
    precision: str,
    images: VerificationImages,
    threads: int | None,
    profile: Profile | None = None,
    opset: int | None = None,
    listener: Listener = lambda stage, route: None,
) -> list[Verdict]:
    """Writes a package of any format; `options` are `format` and those of the format.

    `opset` is the newest whose operators graphs may use; None: as old as possible, for TensorRT one with attention.

    The cascades of a registered build go with its routes, except into formats for TensorRT and torch.
    A format that is made of ONNX graphs is made of a package that is verified first, and gone afterwards.

    Raises:
        UsageError: there is no such format in that precision.
        ExportError, PackageError, OSError: as `export_family`.
    """
    form = options["format"]
    opset = opset or (FUSED if form in TENSORRT_RUNTIMES else PORTABLE)
    cascades, timed = source.cascades(precision), profile is not None
    if form == "onnx":
        exported = export_family(
            source, out, precision=precision, images=images, threads=threads, profile=profile, opset=opset,
            listener=listener,
        )  # fmt: skip
        return exported.verdicts + carry_cascades(exported.package, cascades, threads=threads, timed=timed)[1]
    if form == "torch":
        from klas_zoo.exporters.torch_package import export_torch

        return export_torch(source, out, precision=precision, images=images, listener=listener)[1]
    if form not in DERIVED:
        raise UnknownName("format", form, FORMATS)
    derived = DERIVED[form]
    if precision not in derived.precisions:
        raise UsageError(f"--format {form} takes --precision {', '.join(derived.precisions)}, not {precision}.")
    derive = derived.derive()
    with staging(out) as folder, scratch(out.absolute()) as place:
        exported = export_family(
            source, place / "onnx", precision=precision, images=images, threads=threads, profile=profile,
            opset=opset, listener=listener,
        )  # fmt: skip
        package, carried = exported.package, list[Verdict]()
        if form not in TENSORRT_RUNTIMES:  # whose engines cannot be cut
            package, carried = carry_cascades(package, cascades, threads=threads, timed=timed)
        made = derive(package, folder, {**options, "reference": exported.reference})
        listener(form, "")
    return [one for one in exported.verdicts if one.status == "refused"] + made + carried


def images_for(
    spec: FamilySpec, source: PackageSource, folder: Path | None, *, precision: str, count: int | None, seed: int,
    classes: Sequence[str] | None = None,
) -> tuple[VerificationImages, str]:
    """Real images to verify with, and what they are.

    A family without images of its own borrows those of deit-micro, scaled: differences can be
    measured on them, accuracy can not. So they may have other classes, and their colours stand for any channels.

    Args:
        folder: as a build takes it; None: the family's sample.
        precision: of the engines.
        count: of test images; None: as many as the limits of the precision need (`images_needed`), or
            all that there are.
        classes: the family's in its order, where the data name them.
    """
    facts = source.facts
    borrowed = folder is None and spec.sample is None
    channels, config, lender = facts.input_shape[0], dict(facts.data_config), builtin_families()["deit-micro"]
    lent = borrowed and channels not in (1, 3)
    if lent:
        config |= {"input_size": (3, *facts.input_shape[1:]), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    data = load_data(
        folder, sample=lender.sample if borrowed else spec.sample, data_config=config, seed=seed, classes=classes,
        num_classes=lender.num_classes if borrowed else facts.num_classes,
    )  # fmt: skip
    needed = images_needed(limits_for(precision, facts.weights))
    wanted = min(count or needed, len(data.test))
    size = 100 if max(facts.input_shape[1:]) <= 64 else 8

    def stream(split: Split, most: int) -> Labelled:
        part = split.spread(most)

        def batched() -> Iterator[tuple[Tensor, Tensor | None]]:
            for images, labels in batches(part, size):
                yield images[:, torch.arange(channels) % 3] if lent else images, None if borrowed else labels

        return batched

    found = VerificationImages(
        test=stream(data.test, wanted), calibration=stream(data.heldout, min(wanted, _MOST_CALIBRATION))
    )
    about = f"{wanted} images of {data.description}{', scaled' if borrowed else ''}"
    return found, f"{about} ({_sufficiency(wanted, needed, precision)})"


def _sufficiency(images: int, needed: int, precision: str) -> str:
    """How many images the limits of a precision need, beside how many there are."""
    if images >= needed:
        return f"the limits of {precision} need {needed}"
    shares = f", and shares of images are not compared below {FEW}" if images < FEW else ""
    return f"the limits of {precision} need {needed}: fewer find less{shares}"



"""Plain networks as candidates of a pick: exported, verified, evaluated, timed and registered."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.catalogue.evaluating import TestImages
from klas_zoo.catalogue.network_engines import Claim, Listener, NetworkEngines
from klas_zoo.catalogue.networks import Network, find_network
from klas_zoo.catalogue.registering import now, record_of
from klas_zoo.catalogue.targets import Target
from klas_zoo.errors import UsageError
from klas_zoo.exporters.limits import limits_for
from klas_zoo.profiles.devices import Device, resolve_device
from klas_zoo.profiles.latency import BUILD_METHOD, provider_on
from klas_zoo.profiles.timing import Method
from klas_zoo.registry import Registry
from klas_zoo.registry.records import EngineFacts
from klas_zoo.runtimes import runtime_named

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Added:
    """A network that was registered.

    Attributes:
        refused: why there is no engine in a precision, by its name.
    """

    build_id: int
    name: str
    engines: tuple[EngineFacts, ...]
    refused: Mapping[str, str]
    notes: tuple[str, ...]


def add(
    source: str | Path | nn.Module,
    *,
    name: str | None = None,
    data: str | Path | None = None,
    top1: float | None = None,
    top1_source: str = "",
    labels: int | None = None,
    classes: Sequence[str] | None = None,
    device: str = "cpu",
    precisions: Sequence[str] = ("fp32",),
    runtimes: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    data_config: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    registry: str | Path | None = None,
    method: Method = BUILD_METHOD,
    listener: Listener = lambda sentence: None,
) -> Added:
    """Registers a plain network, so that picks consider it beside all stitches.

    Args:
        source: `timm:NAME`, a torch module, or the path of an ONNX file.
        name: what it is called in the registry; see `find_network` for this and for `labels`, `input_shape`,
            `data_config`, `checkpoint` and `random_weights`.
        data: images to evaluate it on, as `klas_zoo.evaluate` takes them.
        top1, top1_source: instead of `data`: an accuracy in per cent that is claimed, and who claims it.
        classes: names of its classes in its order, where the data name them.
        device: that its engines are timed on.
        precisions: of its engines; int8 is calibrated on images of `data`.
        runtimes: that execute them and take ONNX files. `klas_zoo.install` compiles a package for the others.
        batches: sizes to time it at.

    Raises:
        UsageError: the source is no network of this kind, or the arguments contradict each other.
        VerificationError: its fp32 engine does not compute what the network does.
        KlasZooError: any other of its kinds. The registry is unchanged after each of them.
    """
    if (data is None) == (top1 is None):
        raise UsageError(
            "Pass either images (--data DIR), or an accuracy and who claims it (--top1 X --top1-source TEXT)."
        )
    claim = None if top1 is None else Claim(top1=top1, source=top1_source)
    if claim is None and top1_source:
        raise UsageError("--top1-source is the source of a --top1 that is claimed, and there is none.")
    target, started = resolve_device(device), now()
    chosen = _runtimes(runtimes, target)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-add-") as folder:
        network = find_network(
            source, Path(folder), name=name, labels=labels, input_shape=input_shape, data_config=data_config,
            checkpoint=Path(checkpoint) if checkpoint is not None else None, random_weights=random_weights,
        )  # fmt: skip
        wanted = _precisions(network, precisions)
        place = Registry.open(registry, create=True)
        _refuse_built(place, network.name)
        images = None if data is None else _images(network, data, classes)
        work = NetworkEngines(
            network=network, folder=Path(folder), device=target, threads=threads, listener=listener,
            classes=_class_names(network, images, classes),
            runtimes=chosen, method=method,
            batches=(network.onnx.batch,) if network.onnx.batch else tuple(batches),
            images=images,
        )  # fmt: skip
        engines, refused = work.engines(wanted, claim)
        listener(f"registering {network.name}")
        record = record_of(
            "add", target, network.source, started, family=network.name, weights=network.weights,
            dataset=images.description if images else claim.source if claim else "",
            data_fingerprint=images.data_fingerprint if images else "",
            settings={"precisions": list(precisions), "runtimes": list(work.runtimes), "batches": list(work.batches),
                      "threads": threads, "verified_with": network.reference_name},
        )  # fmt: skip
        number = place.register(record, engines)
    notes = (*network.notes, *(images.notes if images else ()))
    return Added(build_id=number, name=network.name, engines=tuple(engines), refused=refused, notes=notes)


def _runtimes(wanted: Sequence[str] | None, device: Device) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(wanted or ("onnxruntime",)))
    for name in chosen:
        provider_on(name, device)  # refuses what does not run there
        if "onnx" not in runtime_named(name).formats or runtime_named(name).compiles:
            raise UsageError(
                f"{name} does not run ONNX files: add the network first, then pass its package in the registry to "
                f"klas-zoo install --runtime {name}."
            )
        runtime_named(name).version()  # refuses what is not installed
    return chosen


def _precisions(network: Network, wanted: Sequence[str]) -> tuple[str, ...]:
    own = network.onnx.precision
    for precision in wanted:
        limits_for(precision, network.weights)  # refuses an unknown one
    if own != "fp32":
        if tuple(wanted) not in (("fp32",), (own,)):
            raise UsageError(f"{network.source} is in {own}: it is not converted to {', '.join(wanted)}.")
        return (own,)
    if network.onnx.batch is not None and tuple(wanted) != ("fp32",):
        raise UsageError(
            f"{network.source} takes batches of {network.onnx.batch} only, so that it is not converted to another "
            "precision: export it for batches of any size."
        )
    return tuple(dict.fromkeys(wanted))


def _images(network: Network, data: str | Path, classes: Sequence[str] | None) -> TestImages:
    target = Target(
        name=network.name, family=network.name, route=network.name, path=network.onnx.path, format="onnx",
        runtime="onnxruntime", precision=network.onnx.precision, num_classes=network.onnx.num_classes,
        preprocess=network.preprocess,
    )  # fmt: skip
    return TestImages.open(data, [target], classes)


def _class_names(network: Network, images: TestImages | None, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Names by number, of the list that was passed or of the images; empty where they are not known.

    Raises:
        UsageError: the list is of another number of classes.
    """
    count = network.onnx.num_classes
    if classes is not None and len(classes) != count:
        raise UsageError(f"--classes names {len(classes)} classes, and {network.name} has {count}.")
    named = tuple(classes or (images.classes if images else ()))
    return named if len(named) == count else ()


def _refuse_built(registry: Registry, name: str) -> None:
    """
    Raises:
        UsageError: a family of that name is built, and its engines would no longer be current.
    """
    from klas_zoo.families.specs import builtin_families

    with registry.reading() as connection:
        row = connection.execute(
            "SELECT kind FROM builds WHERE family = ? AND current AND kind <> 'add' LIMIT 1", (name,)
        ).fetchone()
    if row is not None or name in builtin_families():
        raise UsageError(f"{name} is a family that klas-zoo builds: pass another --name.")

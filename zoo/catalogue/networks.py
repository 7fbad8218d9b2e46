"""Plain networks that can be added to the registry: timm's by name, torch modules, ONNX files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from klas_zoo.catalogue.second_runtime import second_runtime
from klas_zoo.errors import DataError, UsageError
from klas_zoo.exporters.onnx_files import OnnxNetwork, read_network, stated_preprocessing
from klas_zoo.extras import explained
from klas_zoo.families.specs import NAME, AnchorSpec, FamilySpec, Weights
from klas_zoo.files import sha256_of
from klas_zoo.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import nn

_TIMM = "timm:"
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as an ONNX file, and another implementation to compare its engines with.

    Attributes:
        reference: images (B, C, H, W) → logits (B, classes), both float32, by `reference_name`.
        most_images: the reference can be asked for in reasonable time; None: any number.
        source: where it is from, for people.
    """

    name: str
    onnx: OnnxNetwork
    preprocess: Preprocess
    weights: Weights
    reference: Callable[[np.ndarray], np.ndarray]
    reference_name: str
    most_images: int | None
    source: str
    notes: tuple[str, ...] = ()


def find_network(
    source: str | Path | nn.Module,
    folder: Path,
    *,
    name: str | None = None,
    labels: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    data_config: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    random_weights: bool = False,
) -> Network:
    """The network of a source: `timm:NAME`, a torch module, or the path of an ONNX file.

    Args:
        folder: a temporary one, which lives as long as the network is used.
        name: what it is called in the registry. Default: its own, for an ONNX file that of the file.
        labels: how many classes it has, to be compared with what it has.
        input_shape: (C, H, W), of a torch module.
        data_config: how images are prepared, in timm's terms: `mean`, `std`, `interpolation`, `crop_pct`. Default:
            timm's own for its models, ImageNet's for others, and a note says so.
        checkpoint: of a timm model instead of timm's own weights.
        random_weights: of a timm model.

    Raises:
        UsageError: it is no such network; says what is expected.
        WeightsError: timm's weights cannot be loaded.
        ExportError: it cannot be exported.
    """
    if isinstance(source, (str, Path)) and not str(source).startswith(_TIMM):
        found = _of_file(Path(source), name, data_config)
    elif isinstance(source, (str, Path)):
        with explained("A network of timm"):
            model, own, account, size = _timm_model(str(source).removeprefix(_TIMM), checkpoint, random_weights)
        weights: Weights = "random" if random_weights else "pretrained"
        found = _of_module(
            model, folder, name or _plain(str(source).removeprefix(_TIMM)), size, {**own, **(data_config or {})},
            f"{source} ({account})", weights,
        )  # fmt: skip
    else:
        if name is None or input_shape is None:
            raise UsageError("Of a torch module, name and input_shape=(C, H, W) are needed.")
        found = _of_module(source, folder, name, input_shape, data_config, type(source).__name__, "pretrained")
    if not NAME.fullmatch(found.name):
        raise UsageError(f"'{found.name}' is no name of a network: letters, digits, - and _. Pass --name.")
    if labels is not None and labels != found.onnx.num_classes:
        raise UsageError(f"{found.source} has {found.onnx.num_classes} classes, not {labels}.")
    return found


def _of_file(path: Path, name: str | None, data_config: Mapping[str, Any] | None) -> Network:
    if not path.is_file():
        raise UsageError(f"{path} is no file: add takes timm:NAME, or the path of an ONNX file.")
    network = read_network(path)
    second = second_runtime(path)
    stated = {**stated_preprocessing(path), **(data_config or {})}
    preprocess, notes = _preprocess(network.input_shape, stated)
    return Network(
        name=name or _plain(path.stem), onnx=network, preprocess=preprocess, weights="pretrained",
        reference=second.logits, reference_name=second.name, most_images=second.most_images,
        source=f"{path.name}, SHA-256 {sha256_of(path)}", notes=notes,
    )  # fmt: skip


def _of_module(
    model: nn.Module, folder: Path, name: str, input_shape: tuple[int, int, int],
    data_config: Mapping[str, Any] | None, source: str, weights: Weights,
) -> Network:  # fmt: skip
    import torch

    from klas_zoo.chains import evaluating
    from klas_zoo.exporters.reference_logits import full_precision
    from klas_zoo.exporters.to_onnx import export

    path = folder / "network.onnx"
    export(model, input_shape, path, metadata={})

    def reference(images: np.ndarray) -> np.ndarray:
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
        with evaluating(model), torch.inference_mode(), full_precision():
            return model(torch.from_numpy(images).to(device)).float().cpu().numpy()

    preprocess, notes = _preprocess(input_shape, data_config)
    return Network(
        name=name, onnx=read_network(path), preprocess=preprocess, weights=weights, reference=reference,
        reference_name=f"torch {torch.__version__}", most_images=None, source=source, notes=notes,
    )  # fmt: skip


def _timm_model(
    name: str, checkpoint: Path | None, random_weights: bool
) -> tuple[nn.Module, dict[str, Any], str, tuple[int, int, int]]:
    """The model, how its images are prepared, where its weights are from, and (C, H, W)."""
    import timm

    import klas_zoo.families.micro  # noqa: F401  registers its models with timm
    from klas_zoo.errors import UnknownName
    from klas_zoo.families.models import build_model

    if not timm.is_model(name):
        raise UnknownName("timm model", name, timm.list_models(pretrained=True))
    known = timm.get_pretrained_cfg(name)
    # a family of one: what it is asked for is its name and its number of classes
    spec = cast(FamilySpec, _OneNetwork(name=name, num_classes=known.num_classes if known else 1000))
    source: Path | Weights = "random" if random_weights else checkpoint or "pretrained"
    model, account = build_model(AnchorSpec(name=_plain(name), model=name), spec, source)
    config = timm.data.resolve_model_data_config(model)
    return model.eval(), config, account, tuple(config["input_size"])


@dataclass(frozen=True, kw_only=True)
class _OneNetwork:
    name: str
    num_classes: int


def _plain(name: str) -> str:
    """A name of a model or file as one of a family."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:64]


def _averaged(values: Any, channels: int) -> Any:
    """Three numbers for RGB, their average for grey."""
    return (round(sum(values) / len(values), 6),) if channels == 1 else values


def _preprocess(
    input_shape: tuple[int, ...], data_config: Mapping[str, Any] | None
) -> tuple[Preprocess, tuple[str, ...]]:
    given = {key: value for key, value in (data_config or {}).items() if value is not None}
    missing = [key for key in ("mean", "std", "crop_pct", "interpolation") if key not in given]
    averaged = {key: _averaged(_IMAGENET[key], input_shape[0]) for key in ("mean", "std")}
    filled = {**_IMAGENET, **averaged, **given, "input_size": input_shape}
    try:
        preprocess = Preprocess.from_json(filled)
    except DataError as error:
        raise UsageError(str(error)) from error
    if not missing:
        return preprocess, ()
    taken = {**vars(preprocess), "mean": "ImageNet's mean", "std": "ImageNet's std"}
    taken |= {"crop_pct": f"crop_pct {preprocess.crop_pct:g}", "interpolation": f"{preprocess.interpolation} resizing"}
    note = (
        f"Images are prepared with {', '.join(taken[key] for key in missing)}: pass --mean, --std, --interpolation and "
        "--crop-pct where the network was trained otherwise."
    )
    return preprocess, (note,)

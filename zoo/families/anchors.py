"""Anchors built and loaded: from a family's description to chains with their weights."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from klas_zoo.architectures import to_chain
from klas_zoo.chains import Chain, Shape
from klas_zoo.errors import FamilyError, UnknownName, WeightsError
from klas_zoo.families.specs import NAME, AnchorSpec, FamilySpec, Weights

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Anchors as chains, ordered from cheap to dear.

    `data_config` is timm's: input size, mean, std, interpolation and crop of the images the
    anchors were trained on. `fingerprint` is a hash of all weights, `anchor_fingerprints` of each
    anchor's, `architecture` of what computes with them.
    """

    name: str
    input_shape: Shape
    num_classes: int
    chains: dict[str, Chain]
    data_config: dict[str, Any]
    weights: Weights
    fingerprint: str
    anchor_fingerprints: dict[str, str]
    architecture: str

    @classmethod
    def of(
        cls,
        name: str,
        chains: dict[str, Chain],
        data_config: dict[str, Any],
        weights: Weights = "pretrained",
        recipe: str | None = None,
    ) -> Family:
        """A family of chains that are there already, for anchors of any architecture.

        Args:
            chains: from cheap to dear.
            data_config: at least `mean` and `std`; also what else timm's create_transform takes.
            recipe: a text that is another one wherever the anchors compute something else with the same
                weights. Default: how torch prints them, which does not show everything.

        Raises:
            FamilyError: a name that cannot be part of a route's, or the anchors do not agree on images or
                classes.
        """
        for one in (name, *chains):
            if not NAME.fullmatch(one):
                raise FamilyError(f"A name is made of letters, digits, - and _, not '{one}'.")
        first = next(iter(chains.values()))
        recipe = str(chains) if recipe is None else recipe
        whole, each = _fingerprints(chains)
        for anchor, chain in chains.items():
            if (chain.input_shape, chain.classes) != (first.input_shape, first.classes):
                raise FamilyError(
                    f"Anchors of {name} do not agree: {anchor} takes images {chain.input_shape} and tells "
                    f"{chain.classes} classes apart, the first one {first.input_shape} and {first.classes}."
                )
        return cls(
            name=name,
            input_shape=first.input_shape,
            num_classes=first.classes,
            chains=chains,
            data_config={**data_config, "input_size": first.input_shape},
            weights=weights,
            fingerprint=whole,
            anchor_fingerprints=each,
            architecture=hashlib.sha256(recipe.encode()).hexdigest(),
        )


def load_family(
    spec: FamilySpec, *, weights_folder: Path | None = None, random_weights: bool = False, seed: int = 0
) -> Family:
    """Builds every anchor of a family and loads its weights.

    Args:
        weights_folder: take `<anchor>` or `<model>` with one of .safetensors, .pth, .pt, .bin from
            here instead of the family's own checkpoints.
        random_weights: initialise at random (from `seed`) instead; accuracies mean nothing.

    Raises:
        UnknownName: timm does not know a model.
        WeightsError: a checkpoint is missing, truncated or of another model.
        FamilyError: a model cannot be built or cut, or the anchors do not agree on classes, on the
            shape of images or on how these are normalised.
    """
    chains: dict[str, Chain] = {}
    configs: dict[str, dict[str, Any]] = {}
    for index, anchor in enumerate(spec.anchors):
        # weights are drawn on the CPU: no accelerator's generator is touched
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)
            model = _build(anchor, spec, _source(anchor, weights_folder, random_weights))
        chains[anchor.name] = _cut(model, anchor, spec).eval()
        configs[anchor.name] = timm.data.resolve_model_data_config(model)
    recipe = repr([(anchor.name, anchor.model, anchor.arguments) for anchor in spec.anchors])
    return Family.of(spec.name, chains, _common(configs), "random" if random_weights else "pretrained", recipe)


def _source(anchor: AnchorSpec, folder: Path | None, random_weights: bool) -> Path | Weights:
    if random_weights:
        return "random"
    if folder is None:
        return anchor.checkpoint or "pretrained"
    for stem in (anchor.name, anchor.model):
        for suffix in _SUFFIXES:
            if (candidate := folder / f"{stem}{suffix}").is_file():
                return candidate
    raise WeightsError(
        f"No weights for anchor {anchor.name} in {folder}: expected {anchor.name} or {anchor.model} "
        f"with one of {', '.join(_SUFFIXES)}."
    )


def _build(anchor: AnchorSpec, spec: FamilySpec, source: Path | Weights) -> nn.Module:
    import klas_zoo.families.micro  # noqa: F401  registers its models with timm

    if not timm.is_model(anchor.model):
        raise UnknownName("timm model", anchor.model, timm.list_models(), f"Asked for by {spec.name}.")
    if source == "pretrained":
        _check_pretrained_classes(anchor, spec)
    settings = {"num_classes": spec.num_classes, **anchor.arguments}
    try:
        model = timm.create_model(anchor.model, pretrained=source == "pretrained", **settings)
    except Exception as error:
        # what constructors, the hub's client and its transport raise has no base of its own
        if source != "pretrained" or isinstance(error, (TypeError, AssertionError)):
            raise FamilyError(f"timm cannot build {anchor.model} with {settings}: {_first_line(error)}.") from error
        raise WeightsError(
            f"timm could not load pretrained weights of {anchor.model} ({_first_line(error)}): put them in "
            "a folder and say --weights DIR, or --random-weights to go without."
        ) from error
    if isinstance(source, Path):
        _load(model, anchor, source)
    return model


def _check_pretrained_classes(anchor: AnchorSpec, spec: FamilySpec) -> None:
    """timm would give a model of another number of classes a head at random, and say nothing."""
    known = timm.get_pretrained_cfg(anchor.model)
    if known is not None and known.num_classes != spec.num_classes:
        raise WeightsError(
            f"timm's own weights of {anchor.model} tell {known.num_classes} classes apart, the family "
            f"{spec.num_classes}: give the anchor a checkpoint, or say --weights DIR."
        )


def _cut(model: nn.Module, anchor: AnchorSpec, spec: FamilySpec) -> Chain:
    try:
        chain = to_chain(model, spec.input_shape)
    except (AssertionError, RuntimeError) as error:
        # timm and torch raise these for images of another size or number of channels
        raise FamilyError(
            f"Anchor {anchor.name} takes no images of shape {spec.input_shape}: {_first_line(error)}."
        ) from error
    if chain.classes != spec.num_classes:
        raise FamilyError(
            f"Anchor {anchor.name} tells {chain.classes} classes apart, the family {spec.num_classes}."
        )
    return chain


def _common(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The first anchor's data configuration; a route sends one image through several anchors."""
    first = next(iter(configs))
    for name, config in configs.items():
        for field in ("mean", "std"):
            if tuple(config[field]) != tuple(configs[first][field]):
                raise FamilyError(
                    f"Anchors {first} and {name} were trained on images normalised differently: {field} "
                    f"{tuple(configs[first][field])} and {tuple(config[field])}."
                )
    return configs[first]


def _load(model: nn.Module, anchor: AnchorSpec, path: Path) -> None:
    state = read_state_dict(path)
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unknown = sorted(state.keys() - wanted.keys())
    if missing or unknown:
        odd = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise WeightsError(
            f"{path} is not a checkpoint of {anchor.model}: it {odd} "
            f"({len(missing)} missing, {len(unknown)} unknown of {len(wanted)} tensors)."
        )
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise WeightsError(
                f"{path} is not a checkpoint of {anchor.model}: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(wanted[name].shape)} in the model."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path} holds values that are not finite in {name}.")
    model.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file or a torch state dict; no code in it is ever run.

    A state dict may lie under the key `model` or `state_dict`, as in published DeiT checkpoints.

    Raises:
        WeightsError: missing, truncated, or not a plain state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"Weights {path} do not exist.") from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} is a pickle that would run code or is damaged; save a state dict.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise WeightsError(f"{path} is not a whole torch checkpoint ({_first_line(error)}).") from error
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise WeightsError(f"{path} is not a state dict: expected tensors by name.")
    return found


def _fingerprints(chains: dict[str, Chain]) -> tuple[str, dict[str, str]]:
    """SHA-256 of all weights, and of each anchor's."""
    whole, each = hashlib.sha256(), {}
    for anchor, chain in chains.items():
        own = hashlib.sha256()
        for name, tensor in chain.state_dict().items():
            data = tensor.detach().contiguous().cpu().numpy().tobytes()
            whole.update(f"{anchor}/{name}".encode())
            whole.update(data)
            own.update(name.encode())
            own.update(data)
        each[anchor] = own.hexdigest()
    return whole.hexdigest(), each


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

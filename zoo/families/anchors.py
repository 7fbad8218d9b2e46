"""Anchors built and loaded: from a family's description to chains with their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from klas_zoo.chains import Chain, evaluating
from klas_zoo.errors import FamilyError, first_line
from klas_zoo.families.checkpoints import read_state_dict as read_state_dict
from klas_zoo.families.fitting import NEW_HEAD
from klas_zoo.families.models import build_model, weights_facts, weights_source
from klas_zoo.families.specs import FRAME_FIELDS, NAME, AnchorSpec, FamilySpec, Weights
from klas_zoo.layouts import Shape
from klas_zoo.preprocess import DEFAULT_CROP_PCT, DEFAULT_INTERPOLATION


@dataclass(frozen=True, kw_only=True)
class Family:
    """Anchors as chains, ordered from small to large.

    `data_config` is timm's: input size, mean, std, interpolation and crop of the images the
    anchors were trained on. `fingerprint` is a hash of all weights, `anchor_fingerprints` of each
    anchor's, `architecture` of what computes with them. `checkpoints` has one line for each anchor about where its
    weights came from and what was done to them; `notes` are sentences for the user; `unfitted` names anchors whose
    heads are still random.
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
    checkpoints: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unfitted: frozenset[str] = frozenset()
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    supernet: Path | None = None

    def described(self, anchor: str) -> dict[str, Any]:
        """An anchor's name and depth, timm's `model` and `arguments` where it is one of timm's, and where its weights
        are from."""
        return {"name": anchor, "depth": self.chains[anchor].depth, **self.models.get(anchor, {})}

    @classmethod
    def of(
        cls,
        name: str,
        chains: dict[str, Chain],
        data_config: dict[str, Any],
        weights: Weights = "pretrained",
        recipe: str | None = None,
        models: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Family:
        """A family of chains that are there already, for anchors of any architecture.

        Args:
            chains: from small to large.
            data_config: how images are prepared: `mean` and `std`, and what else timm's create_transform takes, such as
                `crop_pct` and `interpolation`; where these are missing, timm's defaults are filled in and noted.
            recipe: a text that is another one wherever the anchors compute something else with the same
                weights. Default: how torch prints them, which does not show everything.

        Raises:
            FamilyError: no chains, a name that cannot be part of a route's, the anchors do not agree on images or
                classes, or mean and std of pretrained anchors are missing.
        """
        if not chains:
            raise FamilyError(f"The family {name} has no anchors: give at least one chain.")
        for one in (name, *chains):
            if not NAME.fullmatch(one):
                raise FamilyError(f"A name is made of letters, digits, - and _, not '{one}'.")
        first = next(iter(chains.values()))
        recipe = str(chains) if recipe is None else recipe
        whole, each = _fingerprints(chains)
        data_config, notes = _completed(name, data_config, weights, first.input_shape[0])
        training = [anchor for anchor, chain in chains.items() if any(part.training for part in chain.modules())]
        for anchor in training:
            chains[anchor].eval()
        if training:
            notes += (f"{name}: {', '.join(training)} was in training mode and is put into evaluation mode.",)
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
            notes=notes,
            models=models or {},
        )

    def check_unchanged(self) -> None:
        """
        Raises:
            FamilyError: weights are no longer those that `fingerprint` was computed from; results would be cached
                under the key of others.
        """
        if _fingerprints(self.chains)[0] != self.fingerprint:
            raise FamilyError(
                f"The weights of {self.name} were changed after the family was made: make a new one of its chains "
                "with Family.of."
            )


def load_family(
    spec: FamilySpec,
    *,
    weights_folder: str | Path | None = None,
    random_weights: bool = False,
    seed: int = 0,
    new_heads: bool = False,
) -> Family:
    """Builds every anchor of a family and loads its weights.

    Args:
        weights_folder: take `<anchor>` or `<model>` from here, a file with a suffix such as .safetensors or .pth or a
            folder, instead of the family's own checkpoints.
        random_weights: initialise at random (from `seed`) instead; accuracies mean nothing.
        new_heads: an anchor whose weights are for other classes keeps a head drawn at random, and is listed in
            `Family.unfitted`; see `klas_zoo.tuning.heads`.

    Raises:
        UnknownName: timm does not know a model.
        WeightsError: a checkpoint is missing, truncated or of another model.
        FamilyError: a model cannot be built or cut, or the anchors do not agree on classes, on the
            shape of images or on how these are normalised.
    """
    chains: dict[str, Chain] = {}
    configs: dict[str, dict[str, Any]] = {}
    accounts: dict[str, str] = {}
    weights_of: dict[str, dict[str, dict[str, str]]] = {}
    unfitted: set[str] = set()
    folder = Path(weights_folder).expanduser() if weights_folder is not None else None
    for index, anchor in enumerate(spec.anchors):
        # weights are drawn on the CPU: no accelerator's generator is touched
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + index)
            source = weights_source(anchor, folder, random_weights)
            model, accounts[anchor.name] = build_model(anchor, spec, source, new_heads=new_heads)
        weights_of[anchor.name] = weights_facts(anchor, spec, source, model)
        chains[anchor.name] = _cut(model, anchor, spec).eval()
        configs[anchor.name] = timm.data.resolve_model_data_config(model)
        unfitted |= {anchor.name} if NEW_HEAD in accounts[anchor.name] else set()
    recipe = repr([(anchor.name, anchor.model, anchor.arguments) for anchor in spec.anchors])
    models = {
        one.name: {"model": one.model, "arguments": one.arguments, **weights_of[one.name]} for one in spec.anchors
    }
    weights: Weights = "random" if random_weights else "pretrained"
    family = Family.of(spec.name, chains, _common(configs, spec), weights, recipe, models)
    own_weights = folder is None and not random_weights
    return replace(
        family, checkpoints=accounts, unfitted=frozenset(unfitted), supernet=spec.supernet if own_weights else None
    )


def model_state(spec: FamilySpec, name: str, chain: Chain) -> dict[str, torch.Tensor]:
    """The state dict of timm's model that an anchor's chain was cut from, with the chain's weights."""
    anchor = spec.anchor(name)
    with torch.random.fork_rng(devices=[]):
        model, _ = build_model(anchor, spec, "random")
    # a chain shares its model's weights, so they are loaded into both
    _cut(model, anchor, spec).load_state_dict(chain.state_dict())
    return model.state_dict()


def _completed(
    name: str, data_config: Mapping[str, Any], weights: Weights, channels: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A data configuration with timm's defaults for what is missing, and sentences about what was filled in."""
    missing = [field for field in ("mean", "std") if data_config.get(field) is None]
    if missing and weights == "pretrained":
        raise FamilyError(
            f"The family {name} needs {' and '.join(missing)} of the images its anchors were trained on, such as "
            f"data_config={{'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'crop_pct': 1.0}}."
        )
    defaults = {
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "crop_pct": DEFAULT_CROP_PCT,
        "interpolation": DEFAULT_INTERPOLATION,
    }
    filled = {field: value for field, value in defaults.items() if data_config.get(field) is None}
    found = {**data_config, **filled}
    notes: tuple[str, ...] = ()
    if filled:
        listed = ", ".join(f"{field} {value}" for field, value in filled.items())
        notes += (f"{name}: images are prepared by timm's defaults where data_config says nothing: {listed}.",)
    # timm has three numbers for networks of any number of channels
    fewer = [field for field in ("mean", "std") if len(found[field]) != channels]
    if fewer:
        found |= {field: (round(sum(found[field]) / len(found[field]), 6),) * channels for field in fewer}
        listed = ", ".join(f"{field} {found[field][0]}" for field in fewer)
        notes += (
            f"{name}: its networks take {channels} channel{'' if channels == 1 else 's'}, and timm's "
            f"{' and '.join(fewer)} are of three: their average is taken for each, {listed}. State others as "
            "images = { mean = [...], std = [...] } in the family file.",
        )
    return found, notes


def _cut(model: nn.Module, anchor: AnchorSpec, spec: FamilySpec) -> Chain:
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *spec.input_shape))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        # timm and torch raise these for images of another size or number of channels
        raise FamilyError(
            f"Anchor {anchor.name} takes no images of shape {spec.input_shape}: {first_line(error)}."
        ) from error
    chain = Chain.of(model, spec.input_shape)
    if chain.classes != spec.num_classes:
        raise FamilyError(
            f"Anchor {anchor.name} tells {chain.classes} classes apart, the family {spec.num_classes}."
        )
    return chain


def _common(configs: dict[str, dict[str, Any]], spec: FamilySpec) -> dict[str, Any]:
    """The data configuration of all anchors: a route sends one image through several of them."""
    first = next(iter(configs))
    for name, config in configs.items():
        for fact in ("mean", "std"):
            if tuple(config[fact]) != tuple(configs[first][fact]) and fact not in spec.images:
                raise FamilyError(
                    f"Anchors {first} and {name} were trained on images normalised differently: {fact} "
                    f"{tuple(configs[first][fact])} and {tuple(config[fact])}."
                )
        for fact in FRAME_FIELDS:
            ours, theirs = configs[first].get(fact), config.get(fact)
            if ours != theirs and fact not in spec.images:
                raise FamilyError(
                    f"Anchors {first} and {name} were evaluated on images prepared differently: {fact} {ours} and "
                    f"{theirs}. All routes of a family take the same images: state which in the family file, such as "
                    f"images = {{ {fact} = {json.dumps(ours)} }}."
                )
    return {**configs[first], **spec.images}


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

"""timm's models with their weights: from a checkpoint, from timm itself, or drawn at random."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import timm
from timm.models._hub import load_model_config_from_path
from torch import nn

from klas_zoo.errors import FamilyError, UnknownName, WeightsError, first_line
from klas_zoo.families.checkpoints import SUFFIXES, find_weights, read_checkpoint
from klas_zoo.families.fitting import NEW_HEAD, fit
from klas_zoo.families.specs import AnchorSpec, FamilySpec, Weights
from klas_zoo.hub import quick_when_offline

LOCAL = "local-dir:"
_HUB = ("hf-hub:", "hf_hub:")
_TIMM = ("timm/", "timm:")


def weights_source(anchor: AnchorSpec, folder: Path | None, random_weights: bool) -> Path | Weights:
    """Where an anchor's weights come from: a file or folder, `pretrained` (timm's own) or `random`.

    Raises:
        WeightsError: the folder has none for this anchor.
    """
    if random_weights:
        return "random"
    if folder is None:
        if anchor.checkpoint is not None:
            return anchor.checkpoint
        return Path(anchor.model.removeprefix(LOCAL)) if anchor.model.startswith(LOCAL) else "pretrained"
    if not folder.is_dir():
        raise WeightsError(f"--weights {folder} is not a folder: it takes one with a checkpoint for every anchor.")
    stems = dict.fromkeys((anchor.name, anchor.model.rpartition("/")[2].rpartition(":")[2]))
    found = find_weights(folder, stems)
    if found is None:
        raise WeightsError(
            f"No weights for anchor {anchor.name} in {folder}: expected {' or '.join(stems)} with one of "
            f"{', '.join(SUFFIXES)}."
        )
    return found


def build_model(
    anchor: AnchorSpec, spec: FamilySpec, source: Path | Weights, *, new_heads: bool = False
) -> tuple[nn.Module, str]:
    """An anchor as timm builds it, with its weights, and one line about where these came from.

    Args:
        new_heads: an anchor whose weights are for other classes keeps a head drawn at random.

    Raises:
        UnknownName: timm does not know the model.
        FamilyError: timm cannot build it with the anchor's arguments.
        WeightsError: its weights are missing or do not fit.
    """
    import klas_zoo.families.micro  # noqa: F401  registers its models with timm

    name = _timm_name(anchor.model)
    if ":" not in name and not timm.is_model(name):
        raise UnknownName("timm model", anchor.model, timm.list_models(), f"Asked for by {spec.name}.")
    if source == "pretrained" and not new_heads:
        known = timm.get_pretrained_cfg(name) if ":" not in name else None  # of others, once it is loaded
        _check_pretrained_classes(anchor.model, known.num_classes if known else None, spec)
    settings = {"num_classes": spec.num_classes, **anchor.arguments}
    if source == "pretrained":
        return _pretrained(name, anchor, spec, settings, new_heads)
    try:
        model = _create(name, settings)
    except Exception as error:  # what constructors raise has no base of its own
        raise FamilyError(f"timm cannot build {anchor.model} with {settings}: {first_line(error)}.") from error
    if not isinstance(source, Path):
        return model, "random weights"
    state, account = fit(read_checkpoint(source), model, anchor.model, new_head=new_heads)
    model.load_state_dict(state)
    return model, account


def weights_facts(
    anchor: AnchorSpec, spec: FamilySpec, source: Path | Weights, model: nn.Module
) -> dict[str, dict[str, str]]:
    """Where an anchor's weights are from and under which licence, for manifests: no folder of this machine is named."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if source == "random":
        return {}
    own = source == "pretrained" or source == anchor.checkpoint
    found = {"license": config.get("license") or spec.weights_license} if own else {}
    if isinstance(source, Path):
        found["source"] = source.name
    elif hub := config.get("hf_hub_id"):
        found |= {"source": hub, "url": f"https://huggingface.co/{hub}"}
    else:
        found |= {"source": config.get("url") or "timm", "url": config.get("url")}
    return {"weights": {name: str(value) for name, value in found.items() if value}}


def _create(name: str, settings: dict[str, Any]) -> nn.Module:
    """Without weights: from a folder's description, or with the hub's where it answers."""
    with quick_when_offline() if name.startswith(_HUB) else nullcontext():
        return timm.create_model(name, pretrained=False, **settings)


def _pretrained(
    name: str, anchor: AnchorSpec, spec: FamilySpec, settings: dict[str, Any], new_heads: bool
) -> tuple[nn.Module, str]:
    online = True
    try:
        with quick_when_offline() as online:
            model = timm.create_model(name, pretrained=True, **settings)
    except Exception as error:  # the hub's client and its transport raise errors without a base of their own
        if isinstance(error, (TypeError, AssertionError)):
            raise FamilyError(f"timm cannot build {anchor.model} with {settings}: {first_line(error)}.") from error
        reason = first_line(error) if online else "not in the cache, and the Hugging Face hub cannot be reached"
        raise WeightsError(
            f"timm could not load pretrained weights of {anchor.model} ({reason}): put them in a folder and pass "
            "--weights DIR, or pass --random-weights to build without any."
        ) from error
    config = cast(dict[str, Any], model.pretrained_cfg)
    classes = config.get("num_classes", spec.num_classes)
    if not new_heads:
        _check_pretrained_classes(anchor.model, classes, spec)
    place = config.get("hf_hub_id") or config.get("url") or "timm"
    head = f"; has a head for {classes:,} classes; {NEW_HEAD}" if classes != spec.num_classes else ""
    return model, f"timm's own, {place}{head}"


def _check_pretrained_classes(name: str, classes: int | None, spec: FamilySpec) -> None:
    """timm would give a model of another number of classes a head at random, without a word."""
    if classes is not None and classes != spec.num_classes:
        raise WeightsError(
            f"timm's own weights of {name} are for {classes:,} classes, the family has "
            f"{spec.num_classes:,}: give the anchor a checkpoint, pass --weights DIR, or pass --fit-heads to fit new "
            "heads to your images."
        )


def _timm_name(text: str) -> str:
    """As timm's registry has it; with its source where that is the hub or a folder."""
    for prefix in _TIMM:
        text = text.removeprefix(prefix)
    if text.startswith(LOCAL):
        folder = Path(text.removeprefix(LOCAL)).expanduser()
        try:
            load_model_config_from_path(folder)
        except Exception as error:  # JSON, files and fields of all kinds
            raise FamilyError(
                f"{folder} does not describe a timm model ({first_line(error)}): it needs a config.json, as timm and "
                "the hub write it."
            ) from error
        return f"{LOCAL}{folder}"
    return text.replace("hf_hub:", "hf-hub:", 1)

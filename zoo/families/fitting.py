"""A checkpoint's tensors brought to the names and shapes of a timm model, and an account of what was done.

Wrappers' prefixes are removed, buffers that are computed anew are left out, and what timm itself converts when it
loads its pretrained weights (names of official releases, position embeddings and relative position tables of another
image size) is converted by timm's own functions. Anything else that does not fit is refused.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.levit import Levit
from torch import Tensor, nn

from klas_zoo.errors import WeightsError
from klas_zoo.families.checkpoints import Checkpoint
from klas_zoo.families.recognition import nearest_models

State = dict[str, Tensor]
NEW_HEAD = "a new one is fitted"
"""Ends the account of an anchor whose head does not come from its checkpoint."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.", "ema_model.")
_COMPILED = "_orig_mod."
# buffers that models compute for themselves, counters, and what profilers leave
_COMPUTED = re.compile(
    r"(^|\.)(attn_mask|relative_position_index|relative_coords_table|attention_bias_idxs|n_averaged|num_updates|"
    r"total_ops|total_params)$"
)
_RESIZED = re.compile(r"pos_embed|relative_position_bias_table|patch_embed|attention_biases")
_COUNTED = "num_batches_tracked"


class OtherHead(WeightsError):
    """Everything fits but the classifier, which is for another number of classes."""


def fit(checkpoint: Checkpoint, model: nn.Module, name: str, *, new_head: bool = False) -> tuple[State, str]:
    """The state dict that `model` takes, and in one line what was done to get it.

    Args:
        name: timm's of the model, for messages.
        new_head: keep the model's own classifier where the checkpoint's is for other classes.

    Raises:
        OtherHead: the classifier is for another number of classes.
        WeightsError: it is a checkpoint of another model (the message names the nearest ones), or holds values
            that are not finite.
    """
    wanted = model.state_dict()
    notes = list(checkpoint.notes)
    state = _without_prefixes(checkpoint.state, wanted, notes)
    state = _without_computed(state, wanted, notes)
    if not _fits(state, wanted):
        state = _converted(state, model, notes)
        state = _without_computed(state, wanted, notes)
    for missing in wanted.keys() - state.keys():
        if missing.endswith(_COUNTED):
            state[missing] = wanted[missing]
    _check_head(checkpoint, state, model, wanted, new_head, notes)
    _check(checkpoint, state, wanted, name)
    return state, f"{checkpoint.path.name}{': ' if notes else ''}{'; '.join(notes)}"


def _without_prefixes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], notes: list[str]) -> State:
    removed: list[str] = []
    found = dict(state)
    if any(f".{_COMPILED}" in key for key in found):  # blocks that were compiled one by one
        found = {key.replace(f".{_COMPILED}", "."): value for key, value in found.items()}
        removed.append(_COMPILED)
    while True:
        prefix = next((one for one in _PREFIXES if _worth_removing(one, found, wanted)), None)
        if prefix is None:
            break
        left_out = [key for key in found if not key.startswith(prefix) and not _COMPUTED.search(key)]
        if left_out:
            notes.append(f"outside of {prefix[:-1]}, left out: {left_out[0]}{', …' if len(left_out) > 1 else ''}")
        found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        removed.append(prefix)
    if removed:
        notes.append(f"prefix {''.join(removed)} removed")
    return found


def _worth_removing(prefix: str, state: State, wanted: Mapping[str, Tensor]) -> bool:
    """Whether all names begin with it, or those that do are the model's without it."""
    within = [key for key in state if key.startswith(prefix)]
    if not within or any(key.startswith(prefix) for key in wanted):
        return False
    if all(key.startswith(prefix) or _COMPUTED.search(key) for key in state):
        return True
    return sum(key.removeprefix(prefix) in wanted for key in within) > sum(key in wanted for key in state)


def _without_computed(state: State, wanted: Mapping[str, Tensor], notes: list[str]) -> State:
    left_out = {key for key in state if key not in wanted and (_COMPUTED.search(key) or key.endswith(_COUNTED))}
    if left_out:
        kinds = sorted({key.rpartition(".")[2] for key in left_out})
        notes.append(f"left out: {', '.join(kinds)}")
    return {key: value for key, value in state.items() if key not in left_out}


def _fits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(state[key].shape == wanted[key].shape for key in state)


def _converted(state: State, model: nn.Module, notes: list[str]) -> State:
    """By timm's own conversion for the architecture; unchanged where that does not apply."""
    before = dict(state)
    convert = _timms_filter(model, state)
    if convert is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about how timm interpolates
                state = dict(convert(before.copy(), model))
        except Exception:  # it assumes that names and shapes are the model's; what they are is reported below
            return before
    elif isinstance(model, Levit):
        state = _levit_by_order(before, model)
    positions = [key for key in state if key in before and _RESIZED.search(key)]
    resized = [key for key in positions if before[key].shape != state[key].shape]
    if resized:
        key = resized[0]
        more = f" and {len(resized) - 1} more" if len(resized) > 1 else ""
        shapes = f"{tuple(before[key].shape)} → {tuple(state[key].shape)}"
        notes.append(f"resized by timm: {key} {shapes}{more}")
    if state.keys() - before.keys():
        notes.append("names converted to timm's")
    return state


def _timms_filter(model: nn.Module, state: State) -> Callable[..., Mapping[str, Tensor]] | None:
    if isinstance(model, Levit):
        return None  # timm's own leaves the official names as they are
    found: Any = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if found is None:
        return None
    if "adapt_layer_scale" in inspect.signature(found).parameters and any("gamma_1" in key for key in state):
        return lambda tensors, target: found(tensors, target, adapt_layer_scale=True)
    return found


def _levit_by_order(state: State, model: Levit) -> State:
    """LeViT's official release has the same tensors in the same order under other names; 1×1 convolutions are
    matrices in one of the two.
    """
    wanted = model.state_dict()
    if len(state) != len(wanted) or state.keys() == wanted.keys():
        return state
    found = {}
    for (key, target), value in zip(wanted.items(), state.values(), strict=True):
        if value.shape != target.shape and value.squeeze().shape == target.squeeze().shape:
            value = value.reshape(target.shape)
        is_head = key.startswith("head")
        if value.shape != target.shape and not (is_head and value.shape[1:] == target.shape[1:]):
            return state
        found[key] = value
    return found


def _check_head(
    checkpoint: Checkpoint, state: State, model: nn.Module, wanted: Mapping[str, Tensor], new_head: bool,
    notes: list[str],
) -> None:  # fmt: skip
    """Where only the classifier is of another size or missing, keeps the model's own, or says so."""
    classifiers = _classifiers(model)
    odd = {key for key in wanted.keys() | state.keys() if key not in state or key not in wanted}
    odd |= {key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape}
    if not odd or not all(key.rpartition(".")[0] in classifiers for key in odd):
        return
    classes = {len(state[key]) for key in odd if key in state}
    ours = next((len(wanted[key]) for key in odd if key in wanted), 0)
    has = f"has a head for {min(classes):,} classes" if classes else "has no head"
    if not new_head:
        raise OtherHead(
            f"{checkpoint.path} {has}, the family has {ours:,}: pass --fit-heads to build, or run klas-zoo finetune, "
            "which fit a new head to your images."
        )
    for key in odd & wanted.keys():
        state[key] = wanted[key]
    for key in odd - wanted.keys():
        del state[key]
    notes.append(f"{has}; {NEW_HEAD}")


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that give logits."""
    found = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _check(checkpoint: Checkpoint, state: State, wanted: Mapping[str, Tensor], name: str) -> None:
    path = checkpoint.path
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if missing or unknown or shaped:
        lacks = [f"lacks {missing[0]}"] if missing else []
        has = [f"has {unknown[0]}, which the model lacks"] if unknown else []
        counts = f"{len(missing)} missing, {len(unknown)} unknown of {len(wanted)} tensors"
        odd = f"it {' and '.join(lacks + has)} ({counts})"
        if not missing and not unknown:
            key = shaped[0]
            odd = f"{key} is {tuple(state[key].shape)} there and {tuple(wanted[key].shape)} in the model"
        raise WeightsError(f"{path} is not a checkpoint of {name}: {odd}.{_advice(checkpoint.state)}")
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path} holds values that are not finite in {key}.")


def _advice(state: Mapping[str, Tensor]) -> str:
    nearest = nearest_models(tuple(tensor.shape) for tensor in state.values())
    if not nearest:
        return ""
    listed = ", ".join(f"{model} ({share:.0%})" for model, share in nearest)
    return f" By the shapes of its tensors it is most like timm's {listed}."

"""A family whose checkpoints are for other classes, given heads for the user's; fitted once, then cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from klas_zoo.data.loading import Data, batches
from klas_zoo.families.anchors import Family
from klas_zoo.files import make_directory, replacing
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.progress.listeners import Listener
from klas_zoo.tuning.heads import fit_head

_VERSION = 2  # 1: files without a SHA-256
_SHA256 = "sha256"


def with_new_heads(
    family: Family,
    data: Data,
    *,
    device: str = "cpu",
    batch: int = 100,
    workers: int = 0,
    cache: Path | None = None,
    team: Team = ALONE,
    listener: Listener,
) -> Family:
    """The same anchors with fitted heads, where `family.unfitted` names some.

    Args:
        cache: a folder; a build that is resumed takes the heads from here, so that they are the same bit for bit.
        team: of which the first process fits, and the others read what it wrote.

    Raises:
        FamilyError: an anchor does not end in a linear classifier.
    """
    if not family.unfitted:
        return family
    file = cache / f"heads-{_key(family, data, batch)}.safetensors" if cache else None
    if team.is_main and _read(file) is None:
        for name in sorted(family.unfitted):
            _fit(family, name, data, device, batch, workers, listener)
        if file is not None:
            _save(family, file)
    team.barrier()
    found = _read(file)
    if found is not None:
        for name in family.unfitted:
            head = {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}
            family.chains[name].head.load_state_dict(head)
    again = Family.of(family.name, family.chains, family.data_config, family.weights)
    return replace(family, fingerprint=again.fingerprint, anchor_fingerprints=again.anchor_fingerprints)


def _fit(family: Family, name: str, data: Data, device: str, batch: int, workers: int, listener: Listener) -> None:
    chain = family.chains[name].to(device)
    total = len(data.train) + len(data.heldout)
    with listener.stage(f"fit the head of {name}", total, "images") as advance:
        head = fit_head(
            chain,
            batches(data.train, batch, device=device, workers=workers),
            batches(data.heldout, batch, device=device, workers=workers),
            on_batch=lambda images: advance(images, ""),
        )
    chain.to("cpu")
    listener.say(f"New head of {name}: right on {head.top1:.1f} % of {len(data.heldout):,} held-out images.")


def _save(family: Family, file: Path) -> None:
    make_directory(file.parent)
    tensors = {
        f"{name}/{key}": value.contiguous()
        for name in sorted(family.unfitted)
        for key, value in family.chains[name].head.state_dict().items()
    }
    with replacing(file) as temporary:
        save_file(tensors, temporary, metadata={_SHA256: _digest(tensors)})


def _read(file: Path | None) -> dict[str, Tensor] | None:
    """The heads in a file; None where there are none, or not those that were written."""
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
            noted = (opened.metadata() or {}).get(_SHA256)
    except SafetensorError:
        return None
    return found if noted == _digest(found) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(family: Family, data: Data, batch: int) -> str:
    """Of what determines the heads: the weights they start from do not, but the rest of the anchors does."""
    config = sorted((name, str(value)) for name, value in family.data_config.items())
    images = [data.train_fingerprint, len(data.heldout), config, batch]
    facts = [_VERSION, family.fingerprint, sorted(family.unfitted), images]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

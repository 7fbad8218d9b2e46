"""Anchors for a build, made of checkpoints for other classes: new heads, and if asked whole networks tuned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from klas_zoo.building.cache import content_key
from klas_zoo.building.new_heads import with_new_heads
from klas_zoo.building.settings import plain
from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch, Data, batches
from klas_zoo.families.anchors import Family, model_state
from klas_zoo.families.specs import FamilySpec
from klas_zoo.files import make_directory, replacing, sha256_of
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.progress.listeners import Listener
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tensors import write_tensors
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.finetuning import finetune
from klas_zoo.tuning.settings import TuningSettings

DONE = "finetuned.json"


@dataclass(frozen=True, kw_only=True)
class FinetunedAnchor:
    """A checkpoint that was written, and top-1 in per cent on the test images with the new head alone and tuned."""

    anchor: str
    file: Path
    head_top1: float
    top1: float


def finetune_family(
    spec: FamilySpec,
    family: Family,
    data: Data,
    out: Path,
    *,
    settings: TuningSettings,
    device: str = "cpu",
    batch: int = 100,
    workers: int = 0,
    checkpoint_s: float = 60.0,
    team: Team = ALONE,
    signals: Signals | None = None,
    listener: Listener,
) -> list[FinetunedAnchor]:
    """Writes `<anchor>.safetensors` for every anchor to `out`, which `build --weights` takes.

    Anchors that are done are not done again, so the same call resumes where an interrupted one stopped.

    Args:
        spec: that the family was loaded from.
        settings: of tuning; with 0 steps only heads are fitted. Distillation and stitching play no part.

    Raises:
        Interrupted: a signal came; the same call resumes.
        KlasZooError: any other of its kinds.
    """
    make_directory(out)
    family = with_new_heads(
        family, data, device=device, batch=batch, workers=workers, cache=out, team=team, listener=listener
    )
    settings = replace(settings, distillation=0.0, routes="same", reuse=1).on(device)
    steps = settings.total_steps(len(data.train))

    def top1(name: str, chain: Chain) -> float:
        route = Route.anchor(name, chain.depth)
        stream = batches(data.test, batch, device=device, workers=workers, team=team)
        return evaluate(Supernet({name: chain}, [route]), [route], stream, team=team)[route]

    def tune(name: str, chain: Chain, unfinished: Path) -> None:
        def stream(start: int) -> Iterator[Batch]:
            return batches(
                data.augmented, settings.batch // settings.accumulate, device=device, workers=workers, team=team,
                shuffle_seed=settings.seed, forever=True, start=start,
            )  # fmt: skip

        with listener.stage(f"tune {name}", steps * settings.batch, "images") as advance:
            finetune(
                name, chain, stream, steps, settings, unfinished=unfinished, checkpoint_s=checkpoint_s, team=team,
                signals=signals, on_step=lambda progress: advance(progress.images, f"loss {progress.loss:.3f}"),
            )  # fmt: skip

    found = []
    for name, chain in family.chains.items():
        key = content_key({
            "anchor": family.anchor_fingerprints[name], "images": data.train_fingerprint, "steps": steps,
            "test": data.test_fingerprint, "settings": plain(settings),
        })  # fmt: skip
        done = _done(out, name, key) if team.is_main else None
        done = team.broadcast(done)
        if done is None:
            before = top1(name, chain.to(device))
            unfinished = out / f".{name}.{key}"
            if steps:
                tune(name, chain, unfinished)
            after = top1(name, chain) if steps else before
            done = FinetunedAnchor(anchor=name, file=out / f"{name}.safetensors", head_top1=before, top1=after)
            if team.is_main:
                _write(model_state(spec, name, chain), done.file)
                _note(out, done, key)
                shutil.rmtree(unfinished, ignore_errors=True)
            chain.to("cpu")
        found.append(done)
        listener.say(f"{name}: {done.head_top1:.2f} % with the new head, {done.top1:.2f} % after {steps:,} steps.")
    team.barrier()
    return found


def _write(state: dict[str, Tensor], file: Path) -> None:
    with replacing(file) as temporary:
        write_tensors(state, temporary)


def _done(out: Path, name: str, key: str) -> FinetunedAnchor | None:
    """What an earlier run with the same images and settings wrote."""
    try:
        found = json.loads((out / DONE).read_text(encoding="utf-8"))[name]
        done = FinetunedAnchor(
            anchor=name, file=out / f"{name}.safetensors", head_top1=found["head_top1"], top1=found["top1"]
        )
        return done if found["key"] == key and found["sha256"] == sha256_of(done.file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(out: Path, done: FinetunedAnchor, key: str) -> None:
    try:
        table = json.loads((out / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        table = {}
    table[done.anchor] = {
        "key": key, "sha256": sha256_of(done.file), "head_top1": done.head_top1, "top1": done.top1,
    }  # fmt: skip
    with replacing(out / DONE) as temporary:
        temporary.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")

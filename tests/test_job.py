"""Builds called from Python: several on one family in one process, interrupted ones too."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import same_state, snapshot, write_images

from klas_zoo.building.job import build, plan
from klas_zoo.building.settings import BuildSettings
from klas_zoo.data.loading import Data, load_data
from klas_zoo.errors import FamilyError, Interrupted
from klas_zoo.families.anchors import Family
from klas_zoo.processes.signals import Signals
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.progress.listeners import Advance, NullListener
from klas_zoo.registry import Registry
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.tuning.settings import PRESETS

STEPS = 4
TUNING = replace(
    PRESETS["quick"], steps=STEPS, batch=8, init_images=16, anchor_rate=1e-2, stitch_rate=1e-2, precision="fp32"
)
SETTINGS = BuildSettings(
    probes=ProbeSettings(epochs=1, batch=8), selection=SelectionSettings(buckets=2, selector="cka", most=1),
    tuning=TUNING, batch=50, latency_batches=(1,), threads=1, workers=0, seed=0,
)  # fmt: skip


@pytest.fixture
def data(tiny_family: Family, tmp_path: Path) -> Data:
    for part, count in (("train", 16), ("val", 4)):
        write_images(tmp_path / "images" / part, ("ant", "bee", "cat", "dog"), count)
    return load_data(
        tmp_path / "images", sample=None, num_classes=tiny_family.num_classes, data_config=tiny_family.data_config
    )


class Enough(Exception):
    """Engines would come next, which take most of the time."""


class Listener(NullListener):
    """Ends a build before its first engine, and does something after a step of tuning."""

    def __init__(self, step: int = 0, do: Callable[[], None] = lambda: None) -> None:
        self._step, self._do = step, do

    def stage(self, name: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        if name == "export and verify":
            raise Enough
        return super().stage(name, total, unit)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if step == self._step:
            self._do()


def results(
    family: Family, data: Data, root: Path, settings: BuildSettings = SETTINGS, **options: Any
) -> dict[str, bytes]:
    """What a build keeps up to the accuracies after tuning, by its place in the cache, which is its key."""
    registry = Registry.open(root, create=True)
    with pytest.raises(Enough):
        build(
            family, data, settings, device=resolve_device("cpu"), registry=registry,
            **{"listener": Listener(), **options},
        )  # fmt: skip
    files = (path for path in (root / "cache").glob("*/*/*") if path.name != "stage.json")
    return {str(path.relative_to(root / "cache")): path.read_bytes() for path in files}


def of(stage: str, found: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in found.items() if path.startswith(f"{stage}/")}


def test_a_build_leaves_the_callers_family_as_it_was(tiny_family: Family, data: Data, tmp_path: Path) -> None:
    before = {name: snapshot(chain) for name, chain in tiny_family.chains.items()}
    results(tiny_family, data, tmp_path)
    assert all(same_state(chain, before[name]) for name, chain in tiny_family.chains.items())
    assert not any(part.training for chain in tiny_family.chains.values() for part in chain.modules())
    assert Family.of("again", tiny_family.chains, tiny_family.data_config).fingerprint == tiny_family.fingerprint


def test_a_second_build_of_one_family_object_is_that_of_a_new_one(
    tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    """Another selector and another seed, so that measurements, fits and tuning are all made anew."""
    other = replace(SETTINGS, selection=replace(SETTINGS.selection, selector="klas"), seed=1)
    alone = results(tiny_family, data, tmp_path / "alone", other)
    first = results(tiny_family, data, tmp_path / "both")
    both = results(tiny_family, data, tmp_path / "both", other)
    assert not first.keys() & alone.keys()
    assert both == first | alone


def test_what_a_build_keeps_can_be_read_by_everybody_who_may_read_its_folder(
    tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    found = results(tiny_family, data, tmp_path / "registry")
    modes = {path: (tmp_path / "registry" / "cache" / path).stat().st_mode for path in found}
    assert any(path.endswith(".safetensors") for path in modes)
    assert set(modes.values()) == {plain.stat().st_mode}


@pytest.mark.parametrize("step", [2, STEPS], ids=["in the middle", "at the last step"])
def test_a_build_stopped_while_tuning_resumes_in_the_same_process(
    step: int, tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    whole = results(tiny_family, data, tmp_path / "whole")
    stop = Listener(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = pytest.raises(Interrupted, match=f"Stopped by SIGTERM at step {step} of {STEPS} of tuning")
    with stopped, Signals().installed() as signals:
        results(tiny_family, data, tmp_path / "stopped", listener=stop, signals=signals)
    assert not list((tmp_path / "stopped" / "cache" / "tune").glob("*/supernet.safetensors"))
    assert results(tiny_family, data, tmp_path / "stopped") == whole


def test_weights_that_were_changed_after_the_family_was_made_are_refused(
    tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(tiny_family.chains["train"].parameters()).add_(1)
    with pytest.raises(FamilyError, match=r"weights of tiny-vits were changed .* make a new one"):
        results(tiny_family, data, tmp_path)
    assert not list((tmp_path / "cache").rglob("stage.json"))


@pytest.mark.parametrize("selector", ["cka", "mse"])
def test_another_direction_measures_the_stitches_it_adds(
    selector: str, tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    up = replace(SETTINGS, selection=replace(SETTINGS.selection, selector=selector), tuning=replace(TUNING, steps=0))
    both = replace(up, selection=replace(up.selection, direction="both"))
    first = results(tiny_family, data, tmp_path, up)
    second = results(tiny_family, data, tmp_path, both)
    (before,) = of("similarity", first).values()
    (added,) = (content for path, content in of("similarity", second).items() if path not in first)
    need = {"cka": "cka", "mse": "residual"}[selector]
    assert len(json.loads(added)[need]) > len(json.loads(before)[need])


def test_probes_serve_every_direction(tiny_family: Family, data: Data, tmp_path: Path) -> None:
    up = replace(SETTINGS, selection=replace(SETTINGS.selection, selector="klas"), tuning=replace(TUNING, steps=0))
    results(tiny_family, data, tmp_path, up)
    both = replace(up, selection=replace(up.selection, direction="both"))
    planned = plan(
        tiny_family, data, both, device=resolve_device("cpu"), registry=Registry.open(tmp_path, create=False),
        listener=NullListener(),
    )  # fmt: skip
    assert [one.status for one in planned[:2]] == ["cached", "cached"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
def test_a_build_on_a_gpu_leaves_the_callers_family_where_it_was(
    tiny_family: Family, data: Data, tmp_path: Path
) -> None:
    before = {name: snapshot(chain) for name, chain in tiny_family.chains.items()}
    build(
        tiny_family, data, SETTINGS, device=resolve_device("cuda"), registry=Registry.open(tmp_path, create=True),
        listener=NullListener(),
    )  # fmt: skip
    assert {one.device.type for chain in tiny_family.chains.values() for one in chain.parameters()} == {"cpu"}
    assert all(same_state(chain, before[name]) for name, chain in tiny_family.chains.items())

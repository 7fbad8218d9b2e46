"""Anchors for other classes: heads are fitted, whole networks tuned if asked, and a build takes what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from conftest import TINY_FAMILY
from safetensors.torch import load_file, save_file
from toys import write_images

from klas_zoo.building import finetuning
from klas_zoo.building.finetuning import finetune_family
from klas_zoo.cli import main
from klas_zoo.data.loading import load_data
from klas_zoo.errors import Interrupted
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import read_family
from klas_zoo.processes.signals import Signals
from klas_zoo.progress.listeners import NullListener
from klas_zoo.tuning.settings import PRESETS

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A family of four classes, images of them, and checkpoints of nine other classes."""
    (tmp_path / "f.toml").write_text(TINY_FAMILY)
    write_images(tmp_path / "photos" / "train", NAMES, 24, size=(20, 20), seed=1)
    write_images(tmp_path / "photos" / "val", NAMES, 8, size=(20, 20), seed=2)
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    for anchor in read_family(tmp_path / "f.toml").anchors:
        model = timm.create_model(anchor.model, num_classes=9, **anchor.arguments)
        save_file(model.state_dict(), tmp_path / "weights" / f"{anchor.name}.safetensors")
    return tmp_path


def run(place: Path, *more: str) -> Result:
    arguments = ["finetune", "--family", "f.toml", "--weights", "weights", "--data", "photos", "--out", "tuned", *more]
    arguments = [str(place / one) if one in ("f.toml", "weights", "photos", "tuned") else one for one in arguments]
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_heads_are_fitted_and_a_build_could_take_the_checkpoints(place: Path) -> None:
    result = run(place, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [one["anchor"] for one in found] == ["half", "train", "float"]
    assert all(one["top1"] == one["head_top1"] > 50 for one in found)  # colours, even for random features
    family = load_family(read_family(place / "f.toml"), weights_folder=place / "tuned")
    assert family.unfitted == frozenset()
    # everything but the head is what it was
    for anchor in ("half", "train", "float"):
        before, after = (load_file(place / folder / f"{anchor}.safetensors") for folder in ("weights", "tuned"))
        assert {key for key in before if before[key].shape != after[key].shape} == {"head.weight", "head.bias"}
        assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("head."))


def test_whole_networks_are_tuned_and_what_is_done_is_not_done_again(place: Path) -> None:
    result = run(place, "--steps", "6", "--batch", "16", "--json")
    assert result.exit_code == 0, result.stderr
    files = {file: file.stat().st_mtime_ns for file in (place / "tuned").glob("*.safetensors")}
    before, after = (load_file(place / folder / "half.safetensors") for folder in ("weights", "tuned"))
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    again = run(place, "--steps", "6", "--batch", "16", "--json")
    assert json.loads(again.stdout) == json.loads(result.stdout)
    assert files == {file: file.stat().st_mtime_ns for file in (place / "tuned").glob("*.safetensors")}
    assert not list((place / "tuned").glob(".*"))


def test_an_interrupted_run_ends_with_the_same_weights(place: Path) -> None:
    import signal

    spec = read_family(place / "f.toml")
    settings = PRESETS["quick"].__class__(**{**vars(PRESETS["quick"]), "steps": 6, "batch": 16})

    def tune(out: str, signals: Signals | None = None, listener: Any = None) -> None:
        family = load_family(spec, weights_folder=place / "weights", new_heads=True)
        data = load_data(place / "photos", sample=None, num_classes=4, data_config=family.data_config)
        finetune_family(
            spec, family, data, place / out, settings=settings, signals=signals, listener=listener or NullListener(),
            checkpoint_s=0,
        )  # fmt: skip

    tune("whole")
    signals, steps = Signals(), []

    class Stops(NullListener):
        def scalars(self, step: int, values: dict[str, float]) -> None: ...

        def stage(self, name: str, total: int, unit: str) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def passing() -> Any:
                def advance(work: int, remark: str) -> None:
                    if name == "tune train":
                        steps.append(work)
                        if len(steps) == 3:
                            signals.received = signal.SIGTERM

                yield advance

            return passing()

    with pytest.raises(Interrupted):
        tune("parts", signals, Stops())
    tune("parts")
    for anchor in ("half", "train", "float"):
        one, other = (load_file(place / folder / f"{anchor}.safetensors") for folder in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_every_step_takes_a_batch_of_its_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's several routes a batch are for stitches: one network would learn the same images again."""
    drawn: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        for batch in finetuning_batches(*arguments, **named):
            if named.get("forever"):
                drawn.append(len(batch[1]))
            yield batch

    finetuning_batches = finetuning.batches
    monkeypatch.setattr(finetuning, "batches", counted)
    assert PRESETS["quick"].reuse > 1
    result = run(place, "--steps", "5", "--batch", "16")
    assert result.exit_code == 0, result.stderr
    assert drawn == [16] * 5 * 3
    drawn.clear()
    result = run(place, "--epochs", "2", "--batch", "16", "--out", str(place / "epochs"))
    assert result.exit_code == 0, result.stderr
    assert drawn == [16] * 10 * 3  # 96 images, less those held out, are five batches an epoch


def test_contradictory_options_are_refused(place: Path) -> None:
    result = run(place, "--steps", "3", "--epochs", "2")
    assert result.exit_code == 2 and "contradict" in result.stderr

"""Generators: drawing for one image touches those of the CPU only, and puts them back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import load

from klas_zoo.data.loading import batches
from klas_zoo.processes.randomness import keeping_cpu_randomness, seed_cpu, seed_everything


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_what_is_drawn_inside_changes_nothing_outside() -> None:
    seed_everything(3)
    expected = drawn()
    seed_everything(3)
    with keeping_cpu_randomness():
        seed_cpu(7)
        inside = drawn()
    assert drawn() == expected != inside
    seed_cpu(7)
    assert drawn() == inside


def test_random_transforms_leave_the_generators_of_accelerators_alone(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if CUDA were in use: seeding or reading its generator for every image would fail here."""

    def touched(*arguments: object) -> None:
        raise AssertionError("a generator of CUDA was touched")

    data = load(image_folder)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("manual_seed_all", "manual_seed", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touched)
    assert len([*batches(data.augmented, 8, shuffle_seed=0)]) > 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_drawn_on_a_gpu_do_not_depend_on_the_images_between_them(workers: int, image_folder: Path) -> None:
    augmented = load(image_folder).augmented
    seed_everything(5)
    expected = [torch.rand(2, device="cuda").tolist() for _ in range(3)]
    seed_everything(5)
    stream = batches(augmented, 8, device="cuda", shuffle_seed=0, workers=workers, forever=True)
    found = []
    for _ in range(3):
        next(stream)
        found.append(torch.rand(2, device="cuda").tolist())
    assert found == expected

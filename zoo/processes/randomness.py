"""The generators that torch, timm's augmentations and numpy draw from, seeded and kept together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """All generators of this process, those of accelerators too where they have been used."""
    seed_cpu(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seed_cpu(seed: int) -> None:
    """The generators of the CPU: Python's, numpy's and torch's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """A seed, 0..2³², from several numbers; nearby ones give seeds that have nothing in common."""
    state = 0
    for number in numbers:
        # splitmix64 (Steele et al. 2014): one addition, two rounds of shift and multiply
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 32


def randomness() -> dict[str, Any]:
    """The state of every generator, as what torch.save can write and weights_only can read."""
    version, numbers, gauss = random.getstate()
    state: Any = np.random.get_state()
    name, keys, *rest = state
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_randomness(state: dict[str, Any]) -> None:
    """Undoes everything that was drawn since `randomness()` gave this."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def keeping_cpu_randomness() -> Iterator[None]:
    """Restores the CPU's generators at the end, whatever was drawn inside. Those of accelerators are not touched:
    reading or seeding one for every image would wait for the device.
    """
    python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(ours)

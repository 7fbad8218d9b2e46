"""A disk that is full while a build writes: one error that says so, and what was there stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from test_checkpoints import SETTINGS, STEPS, stream, supernet
from torch import nn

from klas_zoo.tensors import write_tensors
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.tuner import Tuner


def test_weights_that_do_not_fit_say_so(small_disk: Path) -> None:
    with pytest.raises(OSError) as full:
        write_tensors(nn.Linear(512, 512), small_disk / "weights.safetensors")
    assert full.value.errno == errno.ENOSPC


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk: Path) -> None:
    tuner = Tuner(supernet(), STEPS, SETTINGS)
    checkpoints = Checkpoints(small_disk, every_s=1e9)
    with tuner.running():
        tuner.step(stream(0))
        checkpoints.save(tuner)
        before = checkpoints.file.read_bytes()
        tuner.step(stream(1))
        (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
        with pytest.raises(OSError) as full:
            checkpoints.save(tuner)
    assert full.value.errno == errno.ENOSPC
    assert checkpoints.file.read_bytes() == before
    assert torch.load(checkpoints.file, weights_only=True)["tuner"]["done"] == 1
    assert [path.name for path in small_disk.iterdir() if path.name.startswith(".")] == []

"""A disk that is full while a build writes: one error that says so, and what was there stays."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_checkpoints import SETTINGS, STEPS, stream, supernet
from torch import nn

from klas_zoo.building.keeping import write_tensors
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.tuner import Tuner


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


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

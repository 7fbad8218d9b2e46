"""Safetensors files are like any other new file of their folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from klas_zoo.tensors import write_tensors


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_the_umask_says_who_may_read_a_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_file_that_is_there_is_replaced_and_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"before")
    file.chmod(0o640)
    write_tensors({"x": torch.ones(2)}, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert load_file(file)["x"].tolist() == [1, 1]


def test_a_module_is_written_whole_in_whatever_layout_and_with_a_header(tmp_path: Path) -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    write_tensors(module, tmp_path / "x.safetensors", {"of": "a test"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {"weight", "bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"of": "a test"}


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error:
        write_tensors({"x": torch.ones(2)}, tmp_path / "none" / "x.safetensors")
    assert str(tmp_path / "none") in str(error.value)

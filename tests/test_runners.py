"""Open engines that are ready to be timed; on a GPU only where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engines import means
from torch import nn

from klas_zoo.errors import ExportError
from klas_zoo.profiles.runners import OutOfMemory, SessionRunner, images_of, is_out_of_memory
from klas_zoo.runtimes import CUDA_PROVIDER, open_engine


def test_images_are_the_same_every_time_and_not_zero() -> None:
    first, again = images_of(4, (3, 8, 8)), images_of(4, (3, 8, 8))
    assert first.shape == (4, 3, 8, 8) and first.dtype == np.float32
    assert (first == again).all() and 0.8 < first.std() < 1.2


def test_an_engine_is_timed_as_often_as_it_is_asked(tmp_path: Path) -> None:
    with open_engine(means(tmp_path), threads=1) as session:
        host_ms, device_ms = SessionRunner(session, images_of(2, (3, 8, 8)), device_clock=True).time(5)
    assert len(host_ms) == 5 and min(host_ms) > 0
    assert device_ms is None


def test_an_engine_that_does_not_run_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"onnxruntime cannot run .*means\.onnx on \(1, 4, 8, 8\)"):
        SessionRunner(open_engine(means(tmp_path), threads=1), images_of(1, (4, 8, 8)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (RuntimeError("RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"), True),
        (RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_told_apart(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected

    class Fails(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    session = open_engine(Fails(), runtime="torch", threads=torch.get_num_threads())
    with pytest.raises(OutOfMemory if expected else ExportError):
        SessionRunner(session, images_of(1, (3, 8, 8)))


def test_memory_that_runs_out_between_runs_is_told_too() -> None:
    calls = 0

    class Fails(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise RuntimeError("CUDA out of memory")
            return images.flatten(1)

    session = open_engine(Fails(), runtime="torch", threads=torch.get_num_threads())
    runner = SessionRunner(session, images_of(1, (3, 8, 8)))
    with pytest.raises(OutOfMemory, match=r"torch is out of memory: .*CUDA out of memory"):
        runner.time(9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
@pytest.mark.parametrize("graph", ["0", "1"])
def test_a_gpu_has_its_own_clock_beside_the_hosts(graph: str, tmp_path: Path) -> None:
    images = images_of(8, (3, 8, 8))
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    opened = (
        open_engine(module, runtime="torch", provider="cuda", options={"precision": "fp16", "cuda_graph": graph}),
        open_engine(means(tmp_path), provider=CUDA_PROVIDER, options={"enable_cuda_graph": graph}),
    )
    for session in opened:
        with session:
            host_ms, device_ms = SessionRunner(session, images, device_clock=True).time(5)
        assert device_ms is not None and len(device_ms) == len(host_ms) == 5
        assert min(device_ms) > 0

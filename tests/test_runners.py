"""Networks that are ready to be timed; on a GPU only where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from klas_zoo.errors import ExportError
from klas_zoo.profiles.runners import (
    OnnxCpuRunner,
    OutOfMemory,
    TorchCpuRunner,
    images_of,
    is_out_of_memory,
    onnx_cuda_runner,
    torch_cuda_runner,
)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """(B, 3, 8, 8) → (B, 3), the mean of every channel."""
    text = """<ir_version: 10, opset_import: ["": 20]>
    means (float[batch, 3, 8, 8] pictures) => (float[batch, 3] logits) {
        pooled = GlobalAveragePool(pictures)
        logits = Flatten(pooled)
    }"""
    file = tmp_path / "means.onnx"
    onnx.save(onnx.parser.parse_model(text), file)
    return file


def test_images_are_the_same_every_time_and_not_zero() -> None:
    first, again = images_of(4, (3, 8, 8)), images_of(4, (3, 8, 8))
    assert first.shape == (4, 3, 8, 8) and first.dtype == np.float32
    assert (first == again).all() and 0.8 < first.std() < 1.2


def test_an_engine_is_timed_as_often_as_it_is_asked(engine: Path) -> None:
    runner = OnnxCpuRunner(engine, images_of(2, (3, 8, 8)), 1)
    times, host = runner.time(5)
    assert len(times) == 5 and min(times) > 0 and host is None
    options = runner.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_module_is_timed_in_its_precision_and_without_gradients() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append((images.dtype, torch.is_inference_mode_enabled(), self.training))
            return images.mean((2, 3))

    runner = TorchCpuRunner(Spy(), images_of(2, (3, 8, 8)), "bf16")
    assert len(runner.time(3)[0]) == 3
    assert seen == [(torch.bfloat16, True, False)] * 4


def test_an_engine_that_does_not_run_is_an_export_error(engine: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime cannot run the network"):
        OnnxCpuRunner(engine, images_of(1, (4, 8, 8)), 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), True),
        (RuntimeError("RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_told_apart(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected

    class Fails(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    with pytest.raises(OutOfMemory if expected else ExportError):
        TorchCpuRunner(Fails(), images_of(1, (3, 8, 8)), "fp32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
@pytest.mark.parametrize("graph", [False, True])
def test_a_gpu_gives_its_own_time_and_the_hosts(graph: bool, engine: Path) -> None:
    images = images_of(8, (3, 8, 8))
    modules = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    made = (torch_cuda_runner(modules, images, "fp16", graph=graph), onnx_cuda_runner(engine, images, graph=graph))
    for runner in made:
        runner.run()
        device_ms, host_ms = runner.time(5)
        assert len(device_ms) == len(host_ms) == 5
        assert all(0 < device <= host for device, host in zip(device_ms, host_ms, strict=True))


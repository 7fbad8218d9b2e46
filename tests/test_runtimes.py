"""Opening and running engines in every runtime."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_networks
import onnxruntime
import pytest
import torch
from small_models import SHAPE, small_chain
from tiny_engines import means, written
from torch import nn

from klas_zoo.errors import CannotRunHere, ExportError, KlasZooError, UnknownName, UsageError
from klas_zoo.exporters.to_onnx import export
from klas_zoo.hardware import physical_cores
from klas_zoo.runtimes import CPU_PROVIDER, CUDA_PROVIDER, RUNTIMES, Session, canonical_options, open_engine
from klas_zoo.runtimes.base import parse_options
from klas_zoo.runtimes.ov import OpenVino

ONNX_RUNTIMES = ["onnxruntime", "openvino"]


@pytest.fixture(params=ONNX_RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    pytest.importorskip(name)
    return name


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return means(tmp_path)


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 3, 8, 8), dtype=np.float32)


def test_an_engine_answers_any_batch_in_every_onnx_runtime(runtime: str, engine: Path) -> None:
    with open_engine(engine, runtime=runtime, threads=1) as session:
        for batch in (1, 5, 2):
            given = images(batch)
            logits = session.run(given)
            assert logits.dtype == np.float32
            np.testing.assert_allclose(logits, given.mean((2, 3)), atol=1e-6)
        assert (session.runtime, session.threads, session.options) == (runtime, 1, "")
        assert session.input_shape == (3, 8, 8)
        assert (session.smallest_batch, session.largest_batch) == (1, None)
        assert session.runtime_version == RUNTIMES[runtime].version()
        assert session.device_times(given, 3) == []


@pytest.mark.parametrize("architecture", ["deit", "resnet"])
def test_an_exported_network_is_the_same_function_in_every_onnx_runtime(
    architecture: str, runtime: str, tmp_path: Path
) -> None:
    chain, given = small_chain(architecture), torch.randn(3, *SHAPE)
    file = tmp_path / "network.onnx"
    export(chain, SHAPE, file, metadata={})
    with torch.inference_mode():
        expected = chain(given).numpy()
    with open_engine(file, runtime=runtime, threads=1) as session:
        np.testing.assert_allclose(session.run(given.numpy()), expected, atol=1e-4)


def test_logits_of_one_run_are_not_overwritten_by_the_next(runtime: str, engine: Path) -> None:
    session = open_engine(engine, runtime=runtime, threads=1)
    first = session.run(images())
    kept = first.copy()
    session.run(-images())
    assert (first == kept).all()


def test_a_session_can_be_used_from_several_threads(runtime: str, engine: Path) -> None:
    session = open_engine(engine, runtime=runtime, threads=1)
    wrong: list[float] = []

    def call(scale: int) -> None:
        given = np.full((scale, 3, 8, 8), scale, dtype=np.float32)
        for _ in range(50):
            found = session.run(given)
            if found.shape != (scale, 3) or not np.allclose(found, scale):
                wrong.append(scale)

    callers = [threading.Thread(target=call, args=(scale,)) for scale in range(1, 5)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert wrong == []


def test_an_engine_of_a_fixed_batch_states_it(runtime: str, tmp_path: Path) -> None:
    session = open_engine(means(tmp_path, batch="4"), runtime=runtime, threads=1)
    assert (session.smallest_batch, session.largest_batch) == (4, 4)
    assert session.run(images(4)).shape == (4, 3)
    with pytest.raises(ExportError, match=r"cannot run .*means\.onnx on \(3, 3, 8, 8\)"):
        session.run(images(3))


def test_an_engine_can_be_opened_from_its_content_too(runtime: str, engine: Path) -> None:
    assert open_engine(engine.read_bytes(), runtime=runtime, threads=1).run(images()).shape == (2, 3)


def test_the_number_of_threads_reaches_the_runtime(engine: Path) -> None:
    assert open_engine(engine, threads=1).raw.get_session_options().intra_op_num_threads == 1
    default = open_engine(engine)
    assert default.threads == default.raw.get_session_options().intra_op_num_threads == physical_cores()
    pytest.importorskip("openvino")
    assert open_engine(engine, runtime="openvino", threads=1).raw.get_property("INFERENCE_NUM_THREADS") == 1


def test_openvino_computes_a_graph_of_bf16_in_bf16(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    onnx_ir = pytest.importorskip("onnx_ir")
    from klas_zoo.exporters.reduced_precision import Half
    from klas_zoo.exporters.to_onnx import finish

    whole = onnx.shape_inference.infer_shapes(onnx_networks.classifier())
    narrow = Half(onnx_ir.DataType.BFLOAT16)(onnx_ir.from_proto(whole), "narrow")
    (tmp_path / "narrow.onnx").write_bytes(finish(narrow, {}).SerializeToString())
    session = open_engine(tmp_path / "narrow.onnx", runtime="openvino", threads=1)
    assert session.raw.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
    assert session.run(images) == pytest.approx(onnx_networks.logits(onnx_networks.classifier(), images), abs=0.1)


def test_openvino_computes_fp32_in_fp32(engine: Path) -> None:
    openvino = pytest.importorskip("openvino")
    session = open_engine(engine, runtime="openvino", threads=1)
    assert session.raw.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.mark.parametrize(
    ("spinning", "entries", "options"),
    [
        (None, {"session.force_spinning_stop": "1"}, ""),
        (False, {"session.intra_op.allow_spinning": "0"}, '{"session.intra_op.allow_spinning":"0"}'),
        (True, {"session.force_spinning_stop": "0"}, '{"session.force_spinning_stop":"0"}'),
    ],
)
def test_spinning_is_a_setting_and_part_of_the_conditions(
    spinning: bool | None, entries: dict[str, str], options: str, engine: Path
) -> None:
    session = open_engine(engine, threads=1, spinning=spinning)
    found = session.raw.get_session_options()
    assert {key: found.get_session_config_entry(key) for key in entries} == entries
    assert session.options == options
    again = open_engine(engine, threads=1, options=parse_options(session.options))
    assert again.options == session.options


def test_options_that_are_the_defaults_are_no_conditions() -> None:
    assert canonical_options({"b": "2", "a": "1"}) == '{"a":"1","b":"2"}'
    assert canonical_options({"a": "1"}, {"a": "1"}) == ""
    assert parse_options(canonical_options({"b": "2"})) == {"b": "2"}
    assert parse_options("") == {}


def test_a_file_that_is_no_engine_is_an_error_that_names_it(runtime: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    with pytest.raises(ExportError, match=r"cannot load .*broken\.onnx: "):
        open_engine(broken, runtime=runtime, threads=1)
    with pytest.raises(ExportError, match=r"cannot load .*gone\.onnx: "):
        open_engine(tmp_path / "gone.onnx", runtime=runtime, threads=1)


BAD_GRAPHS = {
    "two inputs": ("(float[b,3,8,8] x, float[b,3,8,8] z) => (float[b,3,8,8] y) { y = Add(x, z) }", "2 inputs and 1"),
    "two outputs": (
        "(float[b,3,8,8] x) => (float[b,3,8,8] y, float[b,3,8,8] z) { y = Neg(x) z = Abs(x) }", "1 inputs and 2"
    ),
    "no images": ("(float[b,8] x) => (float[b,8] y) { y = Neg(x) }", r"shape \(any, 8\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_a_graph_that_is_no_classifier_of_images_is_refused(case: str, runtime: str, tmp_path: Path) -> None:
    graph, said = BAD_GRAPHS[case]
    file = written(tmp_path / "odd.onnx", f'<ir_version: 10, opset_import: ["": 20]> odd {graph}')
    with pytest.raises(ExportError, match=rf"odd\.onnx .*{said}"):
        open_engine(file, runtime=runtime, threads=1)


def test_pixels_that_are_not_normalised_are_refused(tmp_path: Path) -> None:
    graph = "(uint8[b,3,8,8] x) => (float[b,3,8,8] y) { y = Cast<to = 1>(x) }"
    file = written(tmp_path / "bytes.onnx", f'<ir_version: 10, opset_import: ["": 20]> bytes {graph}')
    with pytest.raises(ExportError, match=r"bytes\.onnx takes tensor\(uint8\): an engine takes normalised images"):
        open_engine(file, threads=1)


def test_half_precision_inputs_and_outputs_are_converted(tmp_path: Path) -> None:
    graph = "(float16[b,3,8,8] x) => (float16[b,3,8,8] y) { y = Neg(x) }"
    file = written(tmp_path / "half.onnx", f'<ir_version: 10, opset_import: ["": 20]> half {graph}')
    found = open_engine(file, threads=1).run(images())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, -images(), atol=1e-2)


def test_what_the_provider_has_no_kernels_for_cannot_run_here(tmp_path: Path) -> None:
    graph = "(float[b,3,8,8] x) => (float[b,3,8,8] y) { z = Cast<to = 16>(x) w = MatMul(z, z) y = Cast<to = 1>(w) }"
    file = written(tmp_path / "brain.onnx", f'<ir_version: 10, opset_import: ["": 20]> brain {graph}')
    with pytest.raises(CannotRunHere, match=r"CPUExecutionProvider cannot compute .*brain\.onnx: .*NOT_IMPLEMENTED"):
        open_engine(file, threads=1)


@pytest.mark.parametrize("provider", ["CoreMLExecutionProvider", "OpenVINOExecutionProvider", "abacus"])
def test_a_provider_that_is_not_installed_is_named_with_those_that_are(provider: str, engine: Path) -> None:
    with pytest.raises(KlasZooError, match=rf"has no {provider} here, only .*CPUExecutionProvider"):
        open_engine(engine, provider=provider)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("provider", [CUDA_PROVIDER, "TensorrtExecutionProvider"])
def test_a_provider_that_does_not_start_is_an_error_that_names_the_cause(provider: str, engine: Path) -> None:
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {provider}")
    cause = "there is no NVIDIA driver: libcuda.so.1 is not found"
    with pytest.raises(KlasZooError, match=rf"onnxruntime's {provider} does not start here: {cause}") as caught:
        open_engine(engine, provider=provider)
    assert not isinstance(caught.value, ExportError)


def test_openvinos_devices_are_named_where_one_is_missing(engine: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(KlasZooError, match=r"OpenVINO finds no device NPU here, only .*CPU"):
        open_engine(engine, runtime="openvino", provider="NPU")


@pytest.mark.parametrize(("name", "install"), [("onnxruntime", "onnxruntime"), ("openvino", r"klas-zoo\[openvino\]")])
def test_a_runtime_that_is_not_installed_is_named_with_the_command_that_brings_it(
    name: str, install: str, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert not RUNTIMES[name].available()
    with pytest.raises(KlasZooError, match=rf"pip install '?{install}"):
        open_engine(engine, runtime=name)


def test_an_unknown_runtime_is_answered_with_the_nearest(engine: Path) -> None:
    with pytest.raises(UnknownName, match="Unknown runtime 'openvin': did you mean openvino"):
        open_engine(engine, runtime="openvin")


def test_every_runtime_has_what_the_protocol_asks_for() -> None:
    assert next(iter(RUNTIMES)) == "onnxruntime"
    for name, one in RUNTIMES.items():
        assert one.name == name and one.formats and one.precisions
        assert set(one.providers) <= {"cpu", "cuda"} and set(one.providers.values()) <= set(one.precisions)
        if one.available():
            assert one.version()[0].isdigit()


def test_torch_runs_modules_in_a_precision_and_leaves_the_callers_weights_alone() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).train()
    before, threads = [one.clone() for one in module.parameters()], torch.get_num_threads()
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            seen.append((given.dtype, torch.is_inference_mode_enabled(), self.training))
            return self.inner(given)

    session: Session = open_engine(Spy(), runtime="torch", threads=1, options={"precision": "bf16"})
    assert session.run(images()).dtype == np.float32
    assert seen == [(torch.bfloat16, True, False)]
    assert session.threads == torch.get_num_threads() == 1
    session.close()
    assert torch.get_num_threads() == threads
    after = list(module.parameters())
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_torch_refuses_what_it_cannot_do(engine: Path) -> None:
    with pytest.raises(UsageError, match="torch runs modules, not PosixPath"):
        open_engine(engine, runtime="torch")
    with pytest.raises(UsageError, match="does not compute in int8"):
        open_engine(nn.Identity(), runtime="torch", options={"precision": "int8"})
    with pytest.raises(UsageError, match="A CUDA graph needs a CUDA device"):
        open_engine(nn.Identity(), runtime="torch", options={"cuda_graph": "1"})


def test_importing_and_choosing_runtimes_imports_nothing_heavy() -> None:
    program = (
        "import sys; from klas_zoo.runtimes import RUNTIMES; [one.precisions for one in RUNTIMES.values()];"
        "sys.exit(bool({'torch', 'onnxruntime', 'openvino', 'numpy', 'onnx'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver")
@pytest.mark.parametrize("graph", ["0", "1"])
def test_cuda_computes_the_same_in_fp32_with_and_without_a_graph(graph: str, tmp_path: Path) -> None:
    chain = small_chain("deit")
    file = tmp_path / "network.onnx"
    export(chain, SHAPE, file, metadata={})
    with open_engine(file, provider=CUDA_PROVIDER, options={"enable_cuda_graph": graph}) as session:
        assert (session.threads, session.provider) == (0, CUDA_PROVIDER)
        for batch in (1, 4, 1, 2):
            given = torch.randn(batch, *SHAPE)
            with torch.inference_mode():
                expected = chain(given).numpy()
            np.testing.assert_allclose(session.run(given.numpy()), expected, atol=1e-4)
            assert len(session.device_times(given.numpy(), 3)) == 3


def test_the_cpu_is_the_default_provider_of_every_onnx_runtime(engine: Path) -> None:
    assert open_engine(engine, threads=1).provider == CPU_PROVIDER
    pytest.importorskip("openvino")
    assert open_engine(engine, runtime="openvino", threads=1).provider == "CPU"
    assert OpenVino().version().count(".") == 2


def processor_ms(session: Session, given: np.ndarray, calls: int) -> float:
    """Processor time, of all threads of this process, for some calls with pauses of 60 ms between them."""
    for _ in range(3):
        session.run(given)
    time.sleep(0.1)
    started = time.process_time()
    for _ in range(calls):
        session.run(given)
        time.sleep(0.06)
    return 1e3 * (time.process_time() - started)


def test_a_slow_caller_costs_processor_time_only_where_spinning_is_asked_for(tmp_path: Path) -> None:
    """onnxruntime's own default burns some 30 ms of a core after every call, whatever the call takes."""
    file, given = tmp_path / "network.onnx", np.zeros((1, *SHAPE), dtype=np.float32)
    export(small_chain("deit"), SHAPE, file, metadata={})
    spent = {}
    for spinning in (True, None, False):
        with open_engine(file, threads=2, spinning=spinning) as session:
            spent[spinning] = processor_ms(session, given, 10)
    assert spent[None] < spent[True] / 2
    assert spent[False] < spent[True] / 2


@pytest.mark.parametrize("spinning", [None, False])
def test_an_idle_session_uses_no_processor_time(spinning: bool | None, runtime: str, engine: Path) -> None:
    with open_engine(engine, runtime=runtime, threads=2, spinning=spinning) as session:
        session.run(images())
        time.sleep(0.1)
        spent = []
        for _ in range(3):  # other threads of this process may be busy once
            started = time.process_time()
            time.sleep(0.3)
            spent.append(time.process_time() - started)
        assert min(spent) < 0.03, spent

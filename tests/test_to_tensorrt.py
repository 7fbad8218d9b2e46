"""Engines of TensorRT for RTX are really built here, without a GPU; running one needs a GPU."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from small_models import SHAPE, small_chain

from klas_zoo.errors import CannotRunHere, ExportError, KlasZooError, UnknownName, UsageError
from klas_zoo.exporters import to_tensorrt
from klas_zoo.exporters.gpu_targets import ComputeCapability, present_capability
from klas_zoo.exporters.to_onnx import export
from klas_zoo.exporters.to_tensorrt import PlanSettings, build_plan
from klas_zoo.files import sha256_of
from klas_zoo.runtimes import NOT_RUN, trt
from klas_zoo.runtimes.plans import (
    BatchRange,
    PlanRecord,
    checked,
    read_record,
    record_path,
    write_record,
)
from klas_zoo.runtimes.trt import PlanSession

A100 = ComputeCapability.parse("a100")
RTX = PlanSettings(runtime="tensorrt-rtx", capabilities=(A100,), profiles=(BatchRange(smallest=1, usual=2, largest=4),))
VERSION = "1.7.1.116"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("graph") / "deit.onnx"
    export(small_chain("deit"), SHAPE, file, metadata={})
    return file


@pytest.fixture(scope="module")
def built(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for compute capability 8.0."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'klas-zoo[tensorrt-rtx]' brings the builder")
    engine = tmp_path_factory.mktemp("engine") / "deit.sm80.engine"
    build_plan(graph, engine, RTX)
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A file that says of itself what a built engine does; nothing here runs it."""
    file = tmp_path / "small.engine"
    file.write_bytes(b"vtrt" + bytes(range(200)))
    _describe(file)
    return file


def _describe(file: Path) -> PlanRecord:
    record = PlanRecord(
        runtime="tensorrt-rtx", runtime_version=VERSION, capabilities=("8.0", "8.6"), precision="fp16",
        profiles=(BatchRange(smallest=1, usual=8, largest=32),), input_shape=(3, 64, 64), classes=7, weights="inside",
        graph_sha256="0" * 64, sha256=sha256_of(file), size_bytes=file.stat().st_size,
    )  # fmt: skip
    write_record(file, record)
    return record


def test_two_builds_for_an_a100_give_the_same_bytes(built: Path, graph: Path, tmp_path: Path) -> None:
    again = build_plan(graph, tmp_path / "again.engine", RTX)
    assert (tmp_path / "again.engine").read_bytes() == built.read_bytes()
    assert again == read_record(built)


def test_a_built_engine_says_what_it_is_and_that_it_was_not_run(built: Path, graph: Path) -> None:
    import tensorrt_rtx

    found = read_record(built)
    assert found.state == NOT_RUN == "built, not run"
    assert found.runtime_version == tensorrt_rtx.__version__
    assert found.capabilities == ("8.0",)
    assert (found.input_shape, found.classes, found.weights) == (SHAPE, 7, "inside")
    assert found.profiles == RTX.profiles
    assert (found.graph_sha256, found.sha256) == (sha256_of(graph), sha256_of(built))


def test_every_optimisation_profile_and_capability_is_built_in(built: Path, graph: Path, tmp_path: Path) -> None:
    two = replace(
        RTX,
        profiles=(BatchRange(smallest=1, usual=1, largest=1), *RTX.profiles),
        capabilities=(A100, ComputeCapability(8, 9)),
    )
    found = build_plan(graph, tmp_path / "two.engine", two)
    assert found.profiles == two.profiles
    assert found.capabilities == ("8.0", "8.9")
    assert found.size_bytes > 1.3 * built.stat().st_size  # kernels of a profile are its own


def test_a_graph_that_is_none_fails_to_parse(built: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph at all")
    with pytest.raises(ExportError, match=r"broken\.onnx: it failed to prepare for TensorRT"):
        build_plan(broken, tmp_path / "broken.engine", RTX)
    text = '<ir_version: 10, opset_import: ["": 20, "own": 1]> g (float[n] x) => (float[n] y) { y = own.Nothing(x) }'
    broken.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(ExportError, match=r"broken\.onnx: tensorrt-rtx failed to parse it"):
        build_plan(broken, tmp_path / "broken.engine", RTX)
    assert not (tmp_path / "broken.engine").exists()


@pytest.mark.skipif(present_capability() is not None, reason="with a GPU stripped engines can be built")
def test_a_stripped_engine_without_a_gpu_is_refused_with_the_reason(built: Path, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="can be built only on a machine with a GPU"):
        build_plan(graph, tmp_path / "stripped.engine", replace(RTX, strip=True))


def test_a_capability_the_library_does_not_know_is_refused(built: Path, graph: Path, tmp_path: Path) -> None:
    hopper = replace(RTX, capabilities=(ComputeCapability.parse("h100"),))
    with pytest.raises(UsageError, match=r"cannot build for compute capability 9\.0 here: it builds for 7\.5, 8\.0"):
        build_plan(graph, tmp_path / "hopper.engine", hopper)


def test_rtx_takes_no_timing_cache(built: Path, graph: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no timing cache"):
        build_plan(graph, tmp_path / "x.engine", replace(RTX, timing_cache=tmp_path / "cache"))


@pytest.mark.skipif(present_capability() is not None, reason="this machine has a GPU")
def test_an_engine_is_not_opened_where_there_is_no_gpu(built: Path) -> None:
    with pytest.raises(ExportError, match=r"runs on a GPU of compute capability 8\.0; this machine has no GPU"):
        PlanSession(built)


@pytest.mark.gpu
@pytest.mark.skipif(present_capability() is None, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_for_this_gpu_computes_what_torch_computes(runtime: str, graph: Path, tmp_path: Path) -> None:
    pytest.importorskip(runtime.replace("-", "_"))
    file = tmp_path / "here.engine"
    build_plan(graph, file, PlanSettings(runtime=runtime))
    session, images = PlanSession(file), torch.randn(3, *SHAPE)
    with torch.inference_mode():
        expected = small_chain("deit")(images)
    torch.testing.assert_close(torch.from_numpy(session.run(images.numpy())), expected, atol=1e-4, rtol=0)


def test_a_library_that_is_not_installed_is_named_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(KlasZooError, match=r"pip install 'klas-zoo\[tensorrt\]'"):
        trt.find_library("tensorrt")
    with pytest.raises(UnknownName, match="did you mean tensorrt"):
        trt.find_library("tensort")


def test_an_engine_that_fits_library_and_gpu_is_accepted(engine: Path) -> None:
    assert checked(engine, installed=VERSION, present=str(A100)) == read_record(engine)


@pytest.mark.parametrize(
    ("installed", "present", "said"),
    [
        (None, "8.0", r"which is not installed: pip install 'klas-zoo\[tensorrt-rtx\]'"),
        ("1.6.0.4", "8.0", r"by tensorrt-rtx 1\.7\.1\.116 and runs with no other version; 1\.6\.0\.4 is"),
        (VERSION, None, "this machine has no GPU"),
        (VERSION, "9.0", r"built for compute capability 8\.0, 8\.6; this machine's GPU has 9\.0: .*--device 9\.0"),
    ],
)
def test_a_mismatch_is_explained(engine: Path, installed: str | None, present: str | None, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        checked(engine, installed=installed, present=present)


def test_a_flipped_bit_a_truncated_file_and_a_missing_one_are_refused(engine: Path) -> None:
    content = bytearray(engine.read_bytes())
    content[100] ^= 1
    engine.write_bytes(content)
    with pytest.raises(ExportError, match=r"small\.engine is damaged"):
        checked(engine, installed=VERSION, present=str(A100))
    engine.write_bytes(content[:50])
    with pytest.raises(ExportError, match=r"small\.engine has 50 bytes, not 204"):
        checked(engine, installed=VERSION, present=str(A100))
    engine.unlink()
    with pytest.raises(ExportError, match=r"There is no engine .*small\.engine"):
        checked(engine, installed=VERSION, present=str(A100))


def test_a_pickle_that_calls_itself_an_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(pickle.dumps({"weights": [1.0]}))
    _describe(engine)
    with pytest.raises(ExportError, match="is no engine of tensorrt-rtx: it begins with"):
        checked(engine, installed=VERSION, present=str(A100))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields: fields.update(schema_version=3), "its schema is 3, this one knows up to 2"),
        (lambda fields: fields.pop("capabilities"), "missing required field capabilities"),
        (lambda fields: fields.update(runtime="tvm"), "no runtime is called tvm"),
        (
            lambda fields: fields.update(profiles=[{"smallest": 0, "usual": 1, "largest": 2}]),
            r"profiles\[0\] is not valid: a batch range goes up from 1",
        ),
    ],
)
def test_a_record_from_elsewhere_is_refused(engine: Path, change: object, said: str) -> None:
    file = record_path(engine)
    fields = json.loads(file.read_text())
    change(fields)  # type: ignore[operator]
    file.write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=said):
        read_record(engine)


def test_an_engine_without_a_record_is_refused(engine: Path) -> None:
    record_path(engine).unlink()
    with pytest.raises(ExportError, match=r"has no small\.engine\.json beside it"):
        read_record(engine)


@pytest.mark.parametrize("text", ["a100", "A100", "8.0", "sm80", "SM_80"])
def test_a_gpu_is_named_by_name_or_capability(text: str) -> None:
    assert ComputeCapability.parse(text) == ComputeCapability(8, 0) == A100


def test_capabilities_of_two_digits_are_read() -> None:
    assert ComputeCapability.parse("sm120") == ComputeCapability(12, 0)
    assert ComputeCapability(12, 0).sm == "SM120"


def test_an_unknown_gpu_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean a100"):
        ComputeCapability.parse("a1000")


@pytest.mark.parametrize("here", ["NVIDIA A10", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", None])
def test_an_engine_whose_kernels_were_timed_on_another_card_is_refused(engine: Path, here: str | None) -> None:
    card = "NVIDIA A100-SXM4-80GB"
    write_record(engine, replace(read_record(engine), gpu=card))
    assert checked(engine, installed=VERSION, present=str(A100), gpu=card).gpu == card
    said = rf"was built on {card}, and this machine's GPU is {here or 'unknown'}: .*build it again with klas-zoo export"
    with pytest.raises(CannotRunHere, match=said):
        checked(engine, installed=VERSION, present=str(A100), gpu=here)


def test_engines_recorded_before_cards_were_are_bound_to_capability_and_version_alone(engine: Path) -> None:
    file = record_path(engine)
    former = json.loads(file.read_text()) | {"schema_version": 1}
    del former["gpu"]
    file.write_text(json.dumps(former))
    assert checked(engine, installed=VERSION, present=str(A100), gpu="NVIDIA A10").gpu is None


class _Timings:
    """The part of a TensorRT builder's configuration that keeps timings: there is no TensorRT on this machine."""

    def __init__(self, refuses: bool, has_none: bool = False) -> None:
        self.refuses, self.has_none, self.content = refuses, has_none, b"unset"

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache and self.refuses:
            return False
        self.content = cache
        return True

    def get_timing_cache(self) -> _Timings | None:
        return None if self.has_none else self

    def serialize(self) -> bytes:
        return self.content + b" and more"


@pytest.mark.parametrize(("refuses", "has_none"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("before", [None, b"timings of another build"])
def test_a_timing_cache_that_is_missing_refused_or_absent_never_costs_an_engine(
    before: bytes | None, refuses: bool, has_none: bool, tmp_path: Path
) -> None:
    cache, config = tmp_path / "timings", _Timings(refuses, has_none)
    if before is not None:
        cache.write_bytes(before)
    settings = PlanSettings(runtime="tensorrt", timing_cache=cache)
    flags = SimpleNamespace(__members__={})
    module = SimpleNamespace(BuilderFlag=flags, __version__="10.14")
    library = trt.Library(runtime="tensorrt", module=module, log=None)
    to_tensorrt._configuration(library, SimpleNamespace(create_builder_config=lambda: config), settings, ())
    assert config.content == (before if before is not None and not refuses else b"")
    to_tensorrt._keep_timings(config, settings)
    kept = cache.read_bytes() if cache.is_file() else None
    assert kept == (before if has_none else config.content + b" and more")

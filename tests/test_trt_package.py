"""A family as a package of TensorRT engines, and what `klas-zoo export` takes for formats like it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import packages
import pytest
from click.testing import CliRunner

from klas_zoo.cli import main
from klas_zoo.errors import CannotRunHere, DamagedPackage, PackageError
from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.gpu_targets import ComputeCapability, present_capability
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.trt_graph import for_tensorrt
from klas_zoo.exporters.trt_package import derive, open_plan
from klas_zoo.runtimes import NOT_RUN, open_engine
from klas_zoo.runtimes.plans import BatchRange, read_record

A100 = ComputeCapability.parse("a100")
SMALL = (BatchRange(smallest=1, usual=2, largest=4),)
OPTIONS = {"format": "tensorrt-rtx", "capabilities": (A100,), "profiles": SMALL}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("packages") / "package")


def test_engines_of_a_family_are_a_package_of_their_own(package: Package, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'klas-zoo[tensorrt-rtx]' brings the builder")
    if present_capability() == A100:
        pytest.skip("an A100 runs these engines")
    verdicts = derive(package, tmp_path, OPTIONS)
    assert {one.status for one in verdicts} == {NOT_RUN}
    assert all("8.0" in one.reason and "GPU" in one.reason for one in verdicts)
    opened = Package.open(tmp_path)
    assert opened.manifest.format == "tensorrt-rtx"
    assert [one.status for one in opened.routes] == [NOT_RUN] * 3
    assert opened.references().logits.keys() == {one.name for one in package.routes}
    for one in opened.routes:
        record = read_record(opened.engine(one))
        assert (record.state, record.profiles, record.precision) == (NOT_RUN, SMALL, "fp32")
        assert one.file == f"{one.name}.sm80.engine"
    with pytest.raises(PackageError, match="has no weights file"):
        _ = opened.weights
    with pytest.raises(CannotRunHere):
        open_plan(replace(verdicts[0].artifact, path=opened.engine(opened.routes[0])))
    assert {one.status for one in verify_package(tmp_path)} == {NOT_RUN}
    engine = opened.engine(opened.routes[0])
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    with pytest.raises(DamagedPackage, match=engine.name.replace("+", r"\+")):
        Package.open(tmp_path)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("packages") / "half", precision="fp16")


def test_attention_written_out_for_tensorrt_is_the_same_function(half: Package) -> None:
    graph = half.engine(half.routes[1])
    written_out = graph.with_name("written-out.onnx")
    try:
        written_out.write_bytes(for_tensorrt(graph))
        operators = {node.op_type for node in onnx.load(written_out, load_external_data=False).graph.node}
        assert "Attention" not in operators and "Softmax" in operators
        images = half.references().images
        before, after = (
            open_engine(file, threads=1).run(images) for file in (graph, written_out)
        )
    finally:
        written_out.unlink(missing_ok=True)
    assert before.std() > 0.1
    np.testing.assert_allclose(after, before, atol=2e-2 * float(before.std()))


def test_engines_of_halves_are_built_with_their_softmax_in_fp32(half: Package, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'klas-zoo[tensorrt-rtx]' brings the builder")
    derive(half, tmp_path, OPTIONS)
    assert {read_record(path).precision for path in tmp_path.glob("*.engine")} == {"fp16"}


def _export(*arguments: object) -> tuple[int, str, str]:
    some = ["--family", "deit-micro", "--random-weights", "--routes", "tiny", "--images", "8", "--threads", "1"]
    result = CliRunner().invoke(main, ["export", *some, *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_builds_engines_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'klas-zoo[tensorrt-rtx]' brings the builder")
    arguments = ("--format", "tensorrt-rtx", "--device", "rtx-4090", "--batches", "1:1:2", "--precision", "fp32")
    code, out, _ = _export(*arguments, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["routes"][0]["status"] == (NOT_RUN if present_capability() is None else "verified")
    record = read_record(tmp_path / "out" / "tiny.sm89.engine")
    assert (record.capabilities, str(record.profiles[0])) == (("8.9",), "1:1:2")


def test_the_command_writes_a_model_repository(tmp_path: Path) -> None:
    code, _, _ = _export("--format", "triton", "--copy", "--out", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out/models/deit-micro_tiny/1/tiny.onnx").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--format", "onnx", "--copy"), 2, "--copy belongs to --format triton, not to onnx"),
        (("--format", "triton", "--strip"), 2, "--strip belongs to --format tensorrt or tensorrt-rtx, not to triton"),
        (("--format", "tensorrt-rtx", "--timing-cache", "x"), 2, "--timing-cache belongs to --format tensorrt, not to"),
        (("--format", "tensorrt-rtx", "--device", "a1000"), 2, "did you mean a100"),
        (("--format", "tensorrt-rtx", "--device", "a100", "--batches", "8:1:2"), 2, "is not SMALLEST:USUAL:LARGEST"),
        (("--format", "tensorrt-rtx", "--device", "a100", "--precision", "int8"), 2, "takes --precision fp32"),
    ],
)
def test_options_that_make_no_sense_are_refused_and_nothing_is_written(
    arguments: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    found, _, error = _export(*arguments, "--out", tmp_path / "out")
    assert (found, said in error) == (code, True), error
    assert not list(tmp_path.iterdir())

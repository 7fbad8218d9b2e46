"""Calls and packages that would never end: stopped at a limit, in one sentence."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import onnx
import packages
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from klas_zoo.cli import main
from klas_zoo.errors import DamagedPackage, ProcessDied, TimeLimitExceeded, UnknownName
from klas_zoo.exporters.package import LARGEST_BYTES, Package
from klas_zoo.limited import within


def add(one: int, other: int = 1) -> int:
    return one + other


def unknown() -> None:
    raise UnknownName("route", "smal", ["small"])


def busy() -> None:
    """Compiled code that never gives another thread its turn."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def dies(how: signal.Signals) -> None:
    Path(tempfile.mkdtemp(), "left").write_text("behind")
    os.kill(os.getpid(), how)


def place() -> str:
    return tempfile.mkdtemp()


def test_a_call_returns_and_raises_as_without_a_limit() -> None:
    assert within(60, "Adding", add, 1, other=2) == 3
    with pytest.raises(UnknownName, match="Unknown route 'smal': did you mean small") as error:
        within(60, "Looking", unknown)
    assert error.value.nearest == ["small"]


def test_what_never_ends_is_stopped() -> None:
    with pytest.raises(TimeLimitExceeded, match=r"Matching took longer than 3 s and was stopped: raise --timeout"):
        within(3, "Matching", busy)


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_the_system_ends_is_one_sentence(how: signal.Signals) -> None:
    with pytest.raises(ProcessDied, match=rf"Reading ended its process \({how.name}\), which a sound one does not"):
        within(60, "Reading", dies, how)


def test_nothing_is_left_in_the_folder_of_temporary_files() -> None:
    assert not Path(within(60, "Placing", place)).parent.exists()


# packages that somebody made to keep others busy


def replaced(folder: Path, name: str, size_bytes: int | None = None) -> None:
    """Makes the manifest say that a file is as it should be."""
    if size_bytes is None:
        packages.rehash(folder, name)
    else:
        packages.edit(folder, lambda manifest: manifest["files"][name].update(size_bytes=size_bytes))


def looping(graph: Path, turns: int) -> None:
    """An engine that adds to its logits for as many turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"]), helper.make_node("Add", ["sum", "sum"], ["next"])],
        "body",
        [helper.make_tensor_value_info("turn", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 5])],
        [helper.make_tensor_value_info("again", TensorProto.BOOL, []),
         helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", 5])],
    )  # fmt: skip
    constants = [helper.make_tensor("turns", TensorProto.INT64, [], [turns]),
                 helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
                 helper.make_tensor("columns", TensorProto.FLOAT, [768, 5], [0.0] * 3840)]  # fmt: skip
    before = onnx.load(str(graph), load_external_data=False)
    nodes = [
        helper.make_node("Flatten", [before.graph.input[0].name], ["flat"]),
        helper.make_node("MatMul", ["flat", "columns"], ["start"]),
        helper.make_node("Loop", ["turns", "yes", "start"], [before.graph.output[0].name], body=body),
    ]
    made = helper.make_graph(nodes, "g", list(before.graph.input), list(before.graph.output), constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    graph.write_bytes(model.SerializeToString())


def verified(folder: Path, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["verify", str(folder), *options], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_verify_is_the_same_with_and_without_a_limit(tmp_path: Path) -> None:
    packages.write_package(tmp_path / "p")
    code, limited, errors = verified(tmp_path / "p", "--json")
    assert (code, errors) == (0, "3 verified, 0 not runnable here, 0 failed.\n")
    assert verified(tmp_path / "p", "--json", "--timeout", "0") == (0, limited, errors)
    assert verified(tmp_path / "p", "--timeout", "-1")[0] == 2


@pytest.mark.slow
def test_an_engine_that_loops_for_years_is_stopped(tmp_path: Path) -> None:
    packages.write_package(tmp_path / "p")
    looping(tmp_path / "p" / "slim.onnx", 10**12)
    replaced(tmp_path / "p", "slim.onnx")
    code, out, errors = verified(tmp_path / "p", "--timeout", "8")
    assert (code, out) == (1, "")
    assert f"Verifying {tmp_path / 'p'} took longer than 8 s and was stopped: raise --timeout" in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_package_that_claims_more_than_the_limit_is_not_read(tmp_path: Path) -> None:
    packages.write_package(tmp_path / "p")
    with (tmp_path / "p" / "weights.bin").open("r+b") as weights:
        weights.truncate(2 * 10**12)  # holes, which take no space
    replaced(tmp_path / "p", "weights.bin", 2 * 10**12)
    with pytest.raises(DamagedPackage, match=r"names \d files of 2000\.00 GB: packages have at most 100000 and 256"):
        Package.open(tmp_path / "p")
    assert LARGEST_BYTES == 256 * 10**9


@pytest.mark.parametrize(
    ("argument", "value"),
    [("depth", 10**7), ("depths", [2, 10**7]), ("num_layers", -(10**9)), ("embed_dim", 10**12), ("mlp_ratio", 1e300)],
)
def test_an_anchor_that_is_larger_than_its_weights_is_refused_before_it_is_built(
    argument: str, value: object, tmp_path: Path
) -> None:
    from klas_zoo.exporters.checking import verify_package
    from klas_zoo.exporters.family import VerificationImages
    from klas_zoo.exporters.torch_package import export_torch

    images = VerificationImages(test=packages.batches, calibration=packages.batches)
    export_torch(packages.source(), tmp_path / "p", precision="fp32", images=images)

    def change(manifest: dict[str, Any]) -> None:
        for anchor in manifest["family"]["anchors"]:
            anchor |= {"model": "vit_tiny_patch16_224", "arguments": {argument: value}}

    packages.edit(tmp_path / "p", change)
    with pytest.raises(DamagedPackage, match=rf"gives the anchor slim {argument} .*, more than the weights have"):
        verify_package(tmp_path / "p")

"""Profiles measured for real, on networks small enough for seconds; how long anything took is not tested."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY_FAMILY
from onnx import TensorProto
from toys import same_state, snapshot

from klas_zoo.cli import main
from klas_zoo.costs import profiling, runtimes
from klas_zoo.costs.profiling import all_stitches, profile_family
from klas_zoo.costs.runtimes import ProfileSettings, check_settings
from klas_zoo.errors import ExportError, UsageError
from klas_zoo.families.anchors import Family
from klas_zoo.families.specs import FamilySpec
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.files import from_text, to_text
from klas_zoo.profiles.macs import count_parameters
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.shapes import architecture_sha256
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.profiles.timing import Method
from klas_zoo.routes import Route
from klas_zoo.runtimes import Session, open_engine
from klas_zoo.runtimes.pytorch import TorchSession
from klas_zoo.supernet import Supernet

QUICK = Method(warmup_ms=0, min_runs=4, min_ms=0, rounds=2)


class Silent:
    """Listens and remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        yield lambda work, remark: None

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    def cached(self, name: str, seconds: float) -> None: ...

    def scalars(self, step: int, values: dict[str, float]) -> None: ...


def measure(family: Family, listener: Silent | None = None, **changes: Any) -> list[Profile]:
    settings = ProfileSettings(**{"threads": 1, "stitches": 2, "method": QUICK} | changes)
    return profile_family(family, resolve_device("cpu"), settings, listener=listener or Silent())


def test_a_profile_holds_anchors_chosen_stitches_and_a_model_of_the_rest(tiny_family: Family) -> None:
    (found,) = measure(tiny_family, checks=2)
    chains = tiny_family.chains
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    routes = [one.route for one in found.networks]
    assert routes[:3] == anchors
    assert len(routes) == 3 + 2 + 2
    assert found.family_sha256 == architecture_sha256(chains, tiny_family.input_shape)
    assert (found.device, found.kind, found.threads, found.batch) == ("cpu", "cpu", 1, 1)
    supernet = Supernet(chains, routes)
    assert found.model is not None and found.model.error.checked == 2
    for one in found.networks:
        assert one.parameters == count_parameters(supernet.network(one.route))
        assert one.macs == found.model.macs(one.route)
        assert one.latency.runs == 4
        assert one.device is None
    assert all(found.model.predict_ms(route) > 0 for route in all_stitches(chains))
    assert from_text(to_text([found]), "here") and to_text(from_text(to_text([found]), "here")) == to_text([found])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_is_measured_too(precision: str, tiny_family: Family) -> None:
    threads = torch.get_num_threads()
    (found,) = measure(tiny_family, runtime="torch", precision=precision, batches=(2,))
    assert (found.runtime, found.provider, found.precision, found.batch) == ("torch", "cpu", precision, 2)
    assert found.runtime_version == torch.__version__
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("changes", [{"runtime": "torch", "precision": "bf16"}, {"precision": "int8"}], ids=str)
def test_measuring_changes_no_weight_of_the_callers_family(changes: dict[str, Any], tiny_family: Family) -> None:
    before = {name: snapshot(chain) for name, chain in tiny_family.chains.items()}
    measure(tiny_family, stitches=1, **changes)
    assert all(same_state(chain, before[name]) for name, chain in tiny_family.chains.items())


def test_int8_is_measured_on_quantised_networks_and_interpolated(
    tiny_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []

    def watched(engine: Path, **options: Any) -> Session:
        types = [tensor.data_type for tensor in onnx.load(engine).graph.initializer if len(tensor.dims) == 2]
        weights.append(types.count(TensorProto.INT8) / len(types))
        return open_engine(engine, **options)

    monkeypatch.setattr(runtimes, "open_engine", watched)
    (found,) = measure(tiny_family, precision="int8", checks=2)
    assert (found.runtime, found.precision) == ("onnxruntime", "int8")
    assert found.method["calibrated_on"] == "4 made-up images"
    assert len(weights) == 3 + 2 + 2 and min(weights) > 0.9  # all matrices but the last product's
    assert found.model is not None and found.model.error.checked == 2
    assert all(found.model.predict_ms(route) > 0 for route in all_stitches(tiny_family.chains))
    assert to_text(from_text(to_text([found]), "here")) == to_text([found])


def test_a_batch_that_does_not_fit_is_recorded_and_the_next_one_measured(
    tiny_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "free_memory_bytes", lambda: 10**6)
    listener = Silent()
    large, small = measure(tiny_family, listener, runtime="torch", batches=(512, 1))
    assert large.failure.startswith("a batch of 512 needs") and large.networks == () and large.model is None
    assert "Batch 512: a batch of 512 needs" in listener.said[0]
    assert small.networks and not small.failure
    assert from_text(to_text([large]), "here") == [large]


def test_memory_that_runs_out_while_running_is_recorded_too(
    tiny_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(session: TorchSession, images: np.ndarray) -> None:
        if len(images) > 1:
            raise ExportError("torch cannot run the network: DefaultCPUAllocator: can't allocate memory: bad_alloc")

    monkeypatch.setattr(TorchSession, "run", run)
    large, small = measure(tiny_family, runtime="torch", batches=(2, 1))
    assert "torch is out of memory" in large.failure
    assert small.networks


def test_stitches_are_those_of_neighbours(tiny_family: Family) -> None:
    found = all_stitches(tiny_family.chains)
    pairs = {(one.segments[0].anchor, one.segments[1].anchor) for one in found}
    assert pairs == {("half", "train"), ("train", "float")}
    assert len(found) == 3 * 3 + 3 * 4


@pytest.mark.parametrize(
    ("changes", "torch_device", "says"),
    [
        ({"precision": "fp16"}, "cpu", "onnxruntime is not measured in fp16 on cpu: it computes in fp32, int8"),
        ({"precision": "int8"}, "cuda", "it computes in fp32, fp16, bf16."),
        ({"runtime": "torch", "precision": "int8"}, "cpu", "bf16; int8 there is for --runtime onnxruntime or openvino"),
        ({"runtime": "tensorrt"}, "cpu", "tensorrt does not run on cpu"),
        ({"runtime": "torch", "precision": "int8"}, "cuda", "it computes in fp32, fp16, bf16"),
        ({"compiled": True}, "cpu", "--compile is torch's"),
        ({"graph": True, "runtime": "torch"}, "cpu", "needs a CUDA device"),
        ({"graph": True, "runtime": "tensorrt"}, "cuda", "needs a CUDA device"),
    ],
)
def test_what_no_runtime_can_do_is_refused(changes: dict[str, Any], torch_device: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        check_settings(ProfileSettings(**changes), torch_device)


# the command


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["profile", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def measured(tiny_spec: FamilySpec, tmp_path: Path) -> Path:
    """A registry with one profile of the tiny family."""
    quick = ("--min-runs", 2, "--min-ms", 0, "--warmup-ms", 0, "--rounds", 1, "--stitches", 1, "--threads", 1)
    code, out, _ = run("--family", family_file(tmp_path), *quick, "--runtime", "torch", "--registry", tmp_path / "a")
    assert code == 0
    assert "tiny-vits on cpu (torch, fp32, batch 1)" in out and "Written:" in out
    return tmp_path / "a"


def family_file(tmp_path: Path) -> Path:
    return tmp_path / "tiny-vits.toml"


def test_a_profile_travels_from_one_registry_into_another(measured: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "carried.json", tmp_path / "b"
    code, out, _ = run("export", file, "--registry", measured)
    assert (code, "1 profile: tiny-vits on cpu" in out) == (0, True)
    family = ("--family", family_file(tmp_path))
    for _ in range(2):  # twice is once
        code, out, error = run("import", file, *family, "--registry", other)
        assert code == 0, error
    (path,) = (other / "profiles").rglob("*.json")
    assert path.read_text() == file.read_text()
    code, out, _ = run("import", file, *family, "--as", "fleet-xeon", "--registry", other)
    assert code == 0 and "tiny-vits on fleet-xeon" in out
    listed = CliRunner().invoke(main, ["devices", "--registry", str(other), "--json"])
    held = {one["name"]: len(one["profiles"]) for one in json.loads(listed.stdout)}
    assert (held["cpu"], held["fleet-xeon"], held["a100"]) == (1, 1, 0)


def test_a_name_that_no_device_can_have_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    file = family_file(tmp_path)
    file.write_text(TINY_FAMILY)
    code, out, error = run("--family", file, "--as", "my machine", "--registry", tmp_path / "registry")
    assert (code, out) == (1, "")
    assert error == "Error: 'my machine' cannot name a folder: letters, digits, '.', '-' and '_' can.\n"


def test_a_profile_that_is_measured_or_imported_reaches_the_engines_of_the_registry(
    measured: Path, tmp_path: Path
) -> None:
    (profile,) = ProfileStore.of(measured).profiles()
    network = next(one for one in profile.networks if one.route.is_anchor)
    facts = {"macs": network.macs, "parameters": network.parameters, "input_shape": profile.input_shape}
    engine = made_up.planned(
        1, str(network.route), route=network.route, family="tiny-vits", runtime="torch", latencies=(), **facts
    )
    registry = made_up.holding(tmp_path / "b", engine)
    assert registry.engines()[0].latencies == ()
    assert run("export", tmp_path / "carried.json", "--registry", measured)[0] == 0
    code, _, error = run(
        "import", tmp_path / "carried.json", "--family", family_file(tmp_path), "--registry", registry.root
    )
    assert code == 0, error
    (imported,) = registry.engines()[0].latencies
    assert imported.p50_ms == network.latency.p50_ms
    quick = ("--min-runs", 2, "--min-ms", 0, "--warmup-ms", 0, "--rounds", 1, "--stitches", 1)
    options = ("--family", family_file(tmp_path), *quick, "--runtime", "torch", "--threads", 2)
    assert run(*options, "--registry", registry.root)[0] == 0
    assert {one.threads for one in registry.engines()[0].latencies} == {1, 2}


def test_a_profile_with_an_earlier_version_s_hash_of_the_same_networks_is_used(measured: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "carried.json", tmp_path / "b"
    assert run("export", file, "--registry", measured)[0] == 0
    now = from_text(file.read_text(), "it")[0].family_sha256
    edited(file, family_sha256="0" * 64)  # which tensors' names went into
    assert run("import", file, "--registry", other, "--family", family_file(tmp_path))[0] == 0
    (found,) = ProfileStore.of(other).profiles()
    assert found.family_sha256 == now


def test_the_hash_of_an_architecture_does_not_depend_on_names_of_tensors(tiny_family: Family) -> None:
    shape = tiny_family.input_shape
    before = architecture_sha256(tiny_family.chains, shape)
    chains = copy.deepcopy(tiny_family.chains)
    for chain in chains.values():
        for module in [*chain.modules()]:
            for name, child in [*module.named_children()]:
                if isinstance(child, torch.nn.Linear):
                    module.renamed = child  # the same tensors again, under another name
                    del module._modules[name]
                    break
    assert all({*chain.state_dict()} != {*tiny_family.chains[name].state_dict()} for name, chain in chains.items())
    assert architecture_sha256(chains, shape) == before
    wider = dict(reversed(chains.items()))
    assert architecture_sha256(wider, shape) != before
    assert architecture_sha256(chains, (3, shape[1] * 2, shape[2])) != before


def test_what_was_measured_is_kept_when_a_later_batch_fails(tiny_family: Family) -> None:
    kept: list[Profile] = []

    class Stopped(Exception):
        pass

    def keep(one: Profile) -> None:
        if kept:
            raise Stopped
        kept.append(one)

    settings = ProfileSettings(threads=1, stitches=2, method=QUICK, batches=(1, 2, 4))
    with pytest.raises(Stopped):
        profile_family(tiny_family, resolve_device("cpu"), settings, listener=Silent(), on_profile=keep)
    assert [one.batch for one in kept] == [1]


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"family_sha256": "0" * 64, "input_shape": [3, 8, 8]},
            "of other networks that are called tiny-vits too",
        ),
        ({"family": "deit-mikro"}, "did you mean deit-micro or"),
        ({"hardware": "another CPU"}, "give it a name of its own with --as NAME"),
        ({"device": "a100", "kind": "cpu"}, "a100 is a gpu, and the profile is of a cpu"),
        ({"device": "a100", "kind": "gpu", "compute_capability": "7.5"}, "a100 has compute capability 8.0"),
        (
            {"device": "a100", "kind": "gpu", "compute_capability": "8.0", "hardware": "NVIDIA A100-SXM4-80GB, x"},
            "called a100, and the profile was measured on a100-80",
        ),
        ({"batch": -1}, "batch is not valid: expected int >= 1, not -1"),
        ({"schema_version": 7}, "written by a newer klas-zoo"),
        ({"device": "../../up"}, "cannot name a folder"),
    ],
)
def test_a_profile_that_cannot_be_believed_is_not_imported(
    changes: dict[str, Any], says: str, measured: Path, tmp_path: Path
) -> None:
    file, other = tmp_path / "carried.json", tmp_path / "b"
    assert run("export", file, "--registry", measured)[0] == 0
    edited(file, **changes)
    code, out, error = run("import", file, "--family", family_file(tmp_path), "--registry", other)
    assert (code > 0, out) == (True, "")
    assert says in error and len(error.strip().splitlines()) == 1
    assert not other.exists()


def test_blocks_are_counted_without_measuring(tmp_path: Path) -> None:
    code, out, _ = run("--family", "deit-micro", "--count", "--json", "--registry", tmp_path / "none")
    rows = json.loads(out)
    base = [row for row in rows if row["anchor"] == "base"]
    assert code == 0 and [row["part"] for row in base] == ["stem", *map(str, range(1, 9)), "head", "whole"]
    for field in ("macs", "parameters", "bytes_moved"):
        assert sum(row[field] for row in base[:-1]) == base[-1][field]
    assert base[-1]["peak_activation_bytes"] == max(row["peak_activation_bytes"] for row in base[:-1])
    assert "peak activations" in run("--family", "deit-micro", "--count")[1]
    assert not (tmp_path / "none").exists()


BAD: dict[str, tuple[list[str], int, str]] = {
    "no family": ([], 2, "Which family?"),
    "an unknown family": (["--family", "deit-mikro"], 2, "did you mean deit-micro"),
    "an unknown device": (["--family", "deit", "--device", "a101"], 2, "Unknown device 'a101': did you mean"),
    "a device that is not there": (
        ["--family", "deit", "--device", "a100"], 1,
        "and so no a100: import a profile of a100 (klas-zoo profile import FILE) or add --predict",
    ),
    "no CUDA device at all": (["--family", "deit", "--device", "cuda"], 1, "has no CUDA device"),
    "a precision the runtime lacks": (["--family", "deit", "--precision", "bf16"], 2, "it computes in fp32, int8"),
    "int8 in torch": (
        ["--family", "deit", "--runtime", "torch", "--precision", "int8"],
        2,
        "int8 there is for --runtime onnxruntime or openvino",
    ),
    "batch sizes that are none": (["--family", "deit", "--batch", "1,x"], 2, "no list of batch sizes such as 1,8,32"),
    "a batch of zero": (["--family", "deit", "--batch", "0"], 2, "no list of batch sizes"),
    "options before a subcommand": (["--family", "deit", "export", "out.json"], 2, "stand after that word"),
    "nothing to export": (["export", "out.json"], 1, "There are no measured profiles in"),
    "a file that is not there": (["import", "none.json"], 1, "none.json cannot be read"),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize(("arguments", "code", "says"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    arguments: list[str], code: int, says: str, tmp_path: Path
) -> None:
    found, out, error = run(*arguments, "--registry", tmp_path / "registry")
    assert (found, out) == (code, "")
    assert says in error and "Traceback" not in error
    assert not (tmp_path / "registry").exists()


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "no.json"
    file.write_bytes(b"\xff")
    assert "it is no text" in run("import", file, "--registry", tmp_path)[2]

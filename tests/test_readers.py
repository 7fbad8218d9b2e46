"""Graphs in every program that is meant to read them: onnxruntime old and new, ONNX's reference, OpenVINO.

`sh scripts/test` puts versions of onnxruntime into folders beside the environment's packages. Engines are opened there
by `klas_zoo.runtimes`, as everywhere, so that this project's own use of onnxruntime is tested with them too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from engine_comparison import compare_network
from small_models import SHAPE, small_chain, small_model

from klas_zoo.data.arrays import open_sample
from klas_zoo.exporters.int8 import quantised
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.opset import FUSED
from klas_zoo.exporters.to_onnx import RouteExporter, export
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import builtin_families
from klas_zoo.preprocess import Preprocess
from klas_zoo.routes import Route
from klas_zoo.runtimes import open_engine
from klas_zoo.supernet import Supernet

pytestmark = pytest.mark.slow  # ten graphs are exported first
VERSIONS = ("1.19", "1.22", "1.32")
"""Of onnxruntime: of two years ago, the last before attention was one operator, and the first with model packages."""
# an anchor of every architecture, a stitch into it and one out of it, behind these blocks: all have features of 4×4
POSITIONS = {"resnet": 4, "swin": 4, "swinv2": 4, "levit": 1, "convnext": 4, "mobilenetv3": 4, "deit": 2, "deit3": 1}
PAIRS = [*pairwise([name for name in POSITIONS if "deit" not in name]), ("mobilenetv3", "resnet"), ("deit", "deit3")]
ARCHITECTURES = tuple(POSITIONS)
GRAPHS = ("deit-micro", "deit-micro int8", *ARCHITECTURES)
ALLOWED = 1e-4
"""Of the largest logit: rounding of fp32 in another order."""
_RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import onnxruntime
from klas_zoo.errors import KlasZooError
from klas_zoo.runtimes import open_engine
images, found, refused = np.load(sys.argv[2]), {}, {}
for name, file in json.loads(sys.argv[4]).items():
    try:
        found[name] = open_engine(file, threads=1).run(images[name.split()[0]])
    except KlasZooError as error:
        refused[name] = f"{type(error).__name__}: {error}"
np.savez(sys.argv[3], **found)
print(json.dumps({"version": onnxruntime.__version__, "refused": refused}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """Real images for every network, (8, C, H, W)."""
    spec = builtin_families()["deit-micro"]
    assert spec.sample is not None
    family, source = load_family(spec), open_sample(spec.sample)[1]
    facts = json.loads(json.dumps(dict(family.data_config)))
    made = {}
    for shape in (family.input_shape, SHAPE):
        preprocess = Preprocess.from_json({**facts, "input_size": shape})
        made[shape] = np.stack([preprocess(source.image(number)) for number in range(8)])
    return {"deit-micro": made[family.input_shape], **dict.fromkeys(ARCHITECTURES, made[SHAPE])}


@pytest.fixture(scope="module")
def expected(images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """torch's logits."""
    with torch.inference_mode():
        return {name: network(name)(torch.from_numpy(batch)).numpy() for name, batch in images.items()}


@pytest.fixture(scope="module")
def stitched() -> tuple[Supernet, RouteExporter]:
    """All architectures in one graph, of which routes are cut: translating them is what takes time."""
    chains = {name: small_chain(name) for name in ARCHITECTURES}
    routes = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    for source, target in PAIRS:
        routes.append(Route.stitch(source, POSITIONS[source], target, POSITIONS[target], chains[target].depth))
    torch.manual_seed(0)
    supernet = Supernet(chains, routes)
    return supernet, RouteExporter(supernet, SHAPE)


@pytest.fixture(scope="module")
def graphs(folder: Path, images: dict[str, np.ndarray], stitched: tuple[Supernet, RouteExporter]) -> dict[str, Path]:
    supernet, exporter = stitched
    anchors = {route.segments[0].anchor: route for route in supernet.routes if route.is_anchor}
    made = {}
    for name in GRAPHS:
        made[name] = folder / f"{name}.onnx"
        if name.endswith(" int8"):
            whole = onnx.shape_inference.infer_shapes(onnx.load(made[name.split()[0]]))
            batches = [(torch.from_numpy(images[name.split()[0]]), None)]
            ir.save(quantised(ir.from_proto(whole), name, lambda found=batches: found), made[name])  # type: ignore[misc]
        elif name in anchors:
            exporter.export(anchors[name], made[name], metadata={})
        else:
            export(network(name), images[name].shape[1:], made[name], metadata={})
    return made


def network(name: str) -> torch.nn.Module:
    if name == "deit-micro":
        return load_family(builtin_families()[name]).chains["tiny"].eval()
    return small_model(name)


def check(name: str, found: np.ndarray, expected: dict[str, np.ndarray]) -> None:
    wanted = expected[name.split()[0]][: len(found)]
    if name.endswith(" int8"):
        cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosines.min() >= (limits_for("int8", "pretrained").min_cosine or 0), name
    else:
        assert np.abs(found - wanted).max() <= ALLOWED * np.abs(wanted).max(), name


def test_graphs_are_as_old_as_they_can_be_and_hold_nothing_that_computes_nothing(graphs: dict[str, Path]) -> None:
    for name, file in graphs.items():
        model = onnx.load(file)
        assert (model.opset_import[0].domain, model.opset_import[0].version, model.ir_version) == ("", 18, 8), name
        operators = {node.op_type for node in model.graph.node}
        assert not operators & {"BatchNormalization", "Identity", "Constant", "Dropout"}, name
        used = {value for node in model.graph.node for value in node.input}
        assert {one.name for one in model.graph.initializer} <= used, name


def test_routes_of_every_architecture_are_the_same_functions_as_files(
    stitched: tuple[Supernet, RouteExporter], tmp_path: Path
) -> None:
    supernet, exporter = stitched
    batches = [torch.randn(size, *SHAPE) for size in (1, 3)]
    assert len(supernet.routes) == len(POSITIONS) + len(PAIRS)
    for number, route in enumerate(supernet.routes):
        file = tmp_path / f"{number}.onnx"
        exporter.export(route, file, metadata={})
        found = compare_network(file, supernet.network(route), batches)
        assert found.passed, (route, found)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_installed_runtimes_answer_like_torch(
    name: str, graphs: dict[str, Path], images: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    for runtime in ("onnxruntime", "openvino"):
        if runtime == "openvino":
            pytest.importorskip("openvino")
        with open_engine(graphs[name], runtime=runtime, threads=1) as session:
            check(name, session.run(images[name.split()[0]]), expected)


# it knows DequantizeLinear from opset 19 on
@pytest.mark.parametrize("name", [name for name in GRAPHS if not name.endswith(" int8")])
def test_onnx_reference_answers_like_torch(
    name: str, graphs: dict[str, Path], images: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    from onnx.reference import ReferenceEvaluator

    (found,) = ReferenceEvaluator(str(graphs[name])).run(None, {"images": images[name.split()[0]][:2]})
    check(name, found, expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_another_onnxruntime_answers_like_torch(
    version: str, graphs: dict[str, Path], images: dict[str, np.ndarray], expected: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:  # fmt: skip
    told, found = in_version(version, graphs, images, tmp_path)
    assert told["refused"] == {} and found.keys() == graphs.keys()
    for name, logits in found.items():
        check(name, logits, expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_attention_as_one_operator_is_read_or_refused_with_what_to_do(
    version: str, folder: Path, images: dict[str, np.ndarray], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    file = folder / "fused.onnx"
    if not file.exists():
        export(network("deit-micro"), images["deit-micro"].shape[1:], file, metadata={}, opset=FUSED)
    told, found = in_version(version, {"deit-micro": file}, images, tmp_path)
    if found:
        check("deit-micro", found["deit-micro"], expected)
    else:
        assert told["refused"]["deit-micro"] == (
            f"CannotRunHere: onnxruntime {told['version']} does not read {file}, a graph of IR version 11: install a "
            "newer onnxruntime, or export with --opset 18."
        )
    assert bool(found) == (version == "1.32")


def in_version(
    version: str, graphs: dict[str, Path], images: dict[str, np.ndarray], place: Path
) -> tuple[dict[str, dict[str, str]], dict[str, np.ndarray]]:
    beside = Path(sys.prefix) / f"onnxruntime-{version}"
    if not beside.is_dir():
        pytest.skip(f"needs onnxruntime {version}: pip install --no-deps --target {beside} 'onnxruntime=={version}.*'")
    np.savez(place / "images.npz", **images)  # type: ignore[arg-type]
    named = json.dumps({name: str(file) for name, file in graphs.items()})
    done = subprocess.run(
        [sys.executable, "-c", _RUN, beside, place / "images.npz", place / "logits.npz", named],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    assert str(told["version"]).startswith(version)
    with np.load(place / "logits.npz") as found:
        return told, dict(found)

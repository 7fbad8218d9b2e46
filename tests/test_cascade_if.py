"""Cascades as one ONNX graph with If: the answers and exits of the stages, one image at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import packages
import pytest

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import ExportError, UsageError, VerificationError
from klas_zoo.exporters import cascade_if
from klas_zoo.exporters.cascade_if import one_graph, write_one_graph
from klas_zoo.exporters.cascade_runner import CascadeRunner
from klas_zoo.exporters.cascade_session import contents
from klas_zoo.exporters.package import Package
from klas_zoo.runtimes.ort import OnnxGraph

IMAGES = np.random.default_rng(0).standard_normal((40, *packages.SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("if") / "package")


def _cascade(package: Package, form: str) -> Cascade:
    """With a threshold in the widest gap of the middle confidences of `IMAGES`."""

    def parsed(threshold: float) -> Cascade:
        return Cascade.parse(form.format(f"{threshold:.6f}"), lambda name: package.route(name).route)

    trial = parsed(0.5)
    runner = CascadeRunner(trial, contents(package, trial), package.folder, threads=1)
    sure = np.sort(confidence(runner.path(IMAGES, 1), trial.measure, trial.stages[0].temperature))[10:30]
    gap = int(np.argmax(np.diff(sure)))
    return parsed(float(sure[gap] + sure[gap + 1]) / 2)


@pytest.mark.parametrize(
    "form",
    ["slim ?p<{} | wide", "slim ?p(T=2)<{} -> slim.1-2+wide.2-3", "slim ?m(T=1.5)<{} | wide", "slim ?e<{} | wide"],
)
def test_the_graph_answers_as_the_stages_by_the_same_exits(package: Package, form: str) -> None:
    cascade = _cascade(package, form)
    engines = contents(package, cascade)
    model = one_graph(cascade, engines)
    graph = OnnxGraph(model.SerializeToString(), package.folder, threads=1)
    runner = CascadeRunner(cascade, engines, package.folder, threads=1)
    exits = []
    for image in IMAGES:
        logits, number = graph.run([image[None]])
        expected, wanted = runner.run(image[None])
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert number.tolist() == wanted.tolist()
        exits += number.tolist()
    assert 0 < sum(exits) < 40
    # what is shared is computed before the If, not in it
    (decision,) = (node for node in model.graph.node if node.op_type == "If")
    whole = len(onnx.load_model_from_string(engines[str(cascade.routes[1])]).graph.node)
    (branch,) = (one.g for one in decision.attribute if one.name == "else_branch")
    assert (len(branch.node) < 0.6 * whole) == bool(cascade.stages[1].shared)


def test_a_graph_is_written_beside_the_weights_it_reads(package: Package, tmp_path: Path) -> None:
    cascade = _cascade(package, "slim ?p<{} -> slim.1-2+wide.2-3")
    path = write_one_graph(package, cascade, package.folder, "cascade-1.onnx", 1)
    onnx.checker.check_model(str(path), full_check=True)
    path.unlink()


def test_a_graph_that_decides_otherwise_is_refused_and_not_written(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = _cascade(package, "slim ?p<{} | wide")
    other = Cascade.parse("slim ?p<0 | wide", lambda name: package.route(name).route)
    real = one_graph
    monkeypatch.setattr(cascade_if, "one_graph", lambda _, engines: real(other, engines))
    with pytest.raises(VerificationError, match="takes another exit than its stages on image"):
        write_one_graph(package, cascade, package.folder, "cascade-2.onnx", 1)
    assert not (package.folder / "cascade-2.onnx").exists()


def test_three_stages_are_no_graph_with_one_if(package: Package) -> None:
    text = "slim ?p<0.5 | slim.1-2+wide.2-3 ?p<0.5 | wide"
    cascade = Cascade.parse(text, lambda name: package.route(name).route)
    with pytest.raises(UsageError, match="has 3 stages: one graph with If is made of two"):
        one_graph(cascade, contents(package, cascade))


def test_a_continuation_of_another_package_is_refused(package: Package, tmp_path: Path) -> None:
    other = packages.write_package(tmp_path / "other", load=lambda routes: packages.supernet(seed=1))
    cascade = Cascade.parse("slim ?p<0.5 -> slim.1-2+wide.2-3", lambda name: package.route(name).route)
    engines = contents(package, cascade) | {"slim.1-2+wide.2-3": contents(other, cascade)["slim.1-2+wide.2-3"]}
    with pytest.raises(ExportError, match="cannot continue from slim: they have no computation in common"):
        one_graph(cascade, engines)

"""Cascades of a package's engines: the answers and exits of torch, computed once where stages share, and counted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import packages
import pytest
import torch

from klas_zoo.cascades import execution
from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import DamagedPackage, ExportError, UnknownName, UsageError
from klas_zoo.exporters.cascade_graphs import cascade_graphs, common_values
from klas_zoo.exporters.cascade_runner import CascadeRunner, DriftWarning
from klas_zoo.routes import Route
from klas_zoo.runtime import ElasticSession

IMAGES = np.random.default_rng(0).standard_normal((60, *packages.SHAPE), dtype=np.float32)
FORMS = {
    "anew": "slim ?p<{} | wide",
    "continued": "slim ?p<{} -> slim.1-2+wide.2-3",
    "anew behind continued": "slim ?p<{} -> slim.1-2+wide.2-3 ?p<0.9 | wide",
    "margin": "slim ?m(T=1.5)<{} | slim.1-2+wide.2-3 ?m<0.5 | wide",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascades") / "package"
    packages.write_package(folder)
    return folder


@pytest.fixture
def session(folder: Path) -> ElasticSession:
    return ElasticSession(folder, threads=1)


def _route(name: str) -> Route:
    return {str(route): route for route in packages.ROUTES}[name]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(route): (folder / f"{route}.onnx").read_bytes() for route in packages.ROUTES}


def _cascade(form: str, session: ElasticSession) -> Cascade:
    """With a first threshold between two confidences, so that rounding decides nothing, and about half goes on."""
    trial = Cascade.parse(FORMS[form].format(0.5), _route)
    first = session.run(IMAGES, route="slim")
    sure = np.sort(confidence(first, trial.measure, trial.stages[0].temperature))
    gap = int(np.argmax(np.diff(sure[20:40]))) + 20
    return Cascade.parse(FORMS[form].format(f"{(sure[gap] + sure[gap + 1]) / 2:.6f}"), _route)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 7, 60])
def test_a_cascade_answers_as_torch_and_takes_the_same_exits(session: ElasticSession, form: str, batch: int) -> None:
    cascade = _cascade(form, session)
    name = session.add_cascade(cascade)
    found = np.concatenate([session.run(IMAGES[k : k + batch], route=name) for k in range(0, 60, batch)])
    expected, exits = execution.run(packages.supernet(), cascade, torch.from_numpy(IMAGES))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    counted = session.counters().cascades[name]
    assert counted.images == tuple(np.bincount(exits, minlength=len(cascade.stages)))
    assert 0 < counted.images[0] < 60
    assert counted.escalated[0] == pytest.approx(1 - counted.images[0] / 60)
    assert session.counters().calls[name] == -(-60 // batch)


def test_what_stages_share_is_computed_once(folder: Path) -> None:
    cascade = Cascade.parse("slim ?p<0.5 -> slim.1-2+wide.2-3", _route)
    engines = _contents(folder)
    first, second = cascade_graphs(cascade, engines)
    whole = {name: len(onnx.load_model_from_string(content).graph.node) for name, content in engines.items()}
    assert (first.continues, second.continues) == (False, True)
    assert len(first.model.graph.node) == whole["slim"] + 1
    assert len(second.model.graph.node) < 0.5 * whole["slim.1-2+wide.2-3"]
    assert not any("stem" in one.name for one in second.model.graph.initializer)


def test_engines_that_quantise_dynamically_are_cut_at_features(tmp_path: Path) -> None:
    """Scales of a batch are no features: they are computed again behind the cut."""
    package = packages.write_package(tmp_path / "int8", precision="int8")
    cascade = Cascade.parse("slim ?p<1 -> slim.1-2+wide.2-3", _route)
    engines = {str(route): package.engine(package.route(str(route))).read_bytes() for route in packages.ROUTES}
    first, second = cascade_graphs(cascade, engines)
    kinds = {node.op_type for node in onnx.load_model_from_string(engines["slim"]).graph.node}
    assert kinds & {"DynamicQuantizeLinear", "QuantizeLinear"}
    assert second.continues and len(second.inputs) == len(first.outputs) - 1
    for one in second.model.graph.input:
        kind = one.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.FLOAT and kind.shape.dim and not kind.shape.dim[0].dim_value
    session = ElasticSession(package, threads=1)
    name = session.add_cascade(cascade)
    for image in IMAGES[:8]:
        expected = session.run(image[None], route="slim.1-2+wide.2-3")
        np.testing.assert_allclose(session.run(image[None], route=name), expected, atol=1e-4)


def test_stages_that_start_anew_are_the_engines_themselves(folder: Path) -> None:
    engines = _contents(folder)
    for graph, name in zip(cascade_graphs(Cascade.parse("slim ?p<0.5 | wide", _route), engines), ("slim", "wide"),
                           strict=True):  # fmt: skip
        assert len(graph.model.graph.node) == len(onnx.load_model_from_string(engines[name]).graph.node)
        assert not graph.continues


@pytest.mark.slow
def test_a_continuation_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    packages.write_package(other, load=lambda routes: packages.supernet(seed=1))
    engines = _contents(folder)
    engines["slim.1-2+wide.2-3"] = _contents(other)["slim.1-2+wide.2-3"]
    # weights in a file are told apart by their place there; the small ones are part of the graphs
    with pytest.raises(ExportError, match="cannot continue from slim: they have no computation in common"):
        cascade_graphs(Cascade.parse("slim ?p<0.5 -> slim.1-2+wide.2-3", _route), engines)


def test_engines_of_different_anchors_have_nothing_in_common(folder: Path) -> None:
    models = {name: onnx.load_model_from_string(content) for name, content in _contents(folder).items()}
    assert common_values(models["slim"], models["wide"]) == []
    assert len(common_values(models["slim"], models["slim.1-2+wide.2-3"])) == 1


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("slim ?p<1.5 | wide", UsageError, "a threshold is a confidence from 0 to 1, not 1.5"),
        ("slim ?p<0.5 -> wide", UsageError, "wide shares no blocks with slim"),
        ("slim ?p<0.5 | vide", UnknownName, "Unknown route 'vide': did you mean wide"),
    ],
)
def test_a_cascade_that_cannot_be_is_refused_in_one_sentence(
    session: ElasticSession, text: str, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as refused:
        session.add_cascade(text)
    assert sentence in str(refused.value)
    assert session.cascades == ()


@pytest.mark.parametrize(
    ("expected", "sentence"),
    [
        ([], "1 stage that images go on from, and 0 expected shares were given"),
        ([(0.1, 0.2)] * 2, "2 expected shares"),
        ([(0.5, 0.2)], "not 0.5 to 0.2"),
        ([(0.5, 1.2)], "not 0.5 to 1.2"),
    ],
)
def test_expected_shares_that_cannot_be_are_refused(session: ElasticSession, expected: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        session.add_cascade("slim ?p<0.5 | wide", expected=expected)


def test_a_name_is_given_once(session: ElasticSession) -> None:
    assert session.add_cascade("slim ?p<0.5 | wide", name="quick") == "quick"
    for name in ("quick", "slim"):
        with pytest.raises(UsageError, match=f"The name {name} is taken"):
            session.add_cascade("slim ?p<0.4 | wide", name=name)
    with pytest.raises(UnknownName, match="did you mean quick"):
        session.run(IMAGES, route="quik")


@pytest.mark.parametrize(("expected", "drifts"), [((0.9, 1.0), True), ((0.0, 0.02), True), ((0.4, 0.6), False)])
def test_shares_outside_of_what_was_expected_warn_once(
    session: ElasticSession, expected: tuple[float, float], drifts: bool
) -> None:
    name = session.add_cascade(_cascade("anew", session), expected=[expected])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            session.run(IMAGES, route=name)
    said = [one for one in caught if one.category is DriftWarning]
    assert len(said) == drifts
    assert session.counters().cascades[name].drifted == ((0,) if drifts else ())
    if drifts:
        assert "of the last 240 images behind slim, where" in str(said[0].message)


def test_few_images_say_nothing_about_drift(session: ElasticSession) -> None:
    name = session.add_cascade(_cascade("anew", session), expected=[(0.99, 1.0)])
    session.run(IMAGES, route=name)
    assert session.counters().cascades[name].drifted == ()


def test_a_path_executes_every_stage_and_counts_nothing(session: ElasticSession, folder: Path) -> None:
    cascade = _cascade("continued", session)
    runner = CascadeRunner(cascade, _contents(folder), folder, threads=1)
    for number, route in enumerate(cascade.routes, start=1):
        np.testing.assert_allclose(
            runner.path(IMAGES, number), session.run(IMAGES, route=str(route)), atol=1e-5
        )
    assert runner.counters().images == (0, 0)


def test_weights_that_change_under_a_cascade_are_noticed(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    session = ElasticSession(copy, threads=1)
    (copy / "wide.onnx").write_bytes(b"no graph")
    with pytest.raises(DamagedPackage):
        session.add_cascade("slim ?p<0.5 | wide")


@pytest.mark.slow
def test_a_package_of_half_precision_runs_cascades_too(tmp_path: Path) -> None:
    packages.write_package(tmp_path / "half", precision="fp16")
    session = ElasticSession(tmp_path / "half", threads=1, routes=list(map(str, packages.ROUTES)))
    name = session.add_cascade("slim ?p<0.45 -> slim.1-2+wide.2-3")
    found = session.run(IMAGES, route=name)
    counted = session.counters().cascades[name].images
    assert found.dtype == np.float32
    assert all(counted)
    whole = {route: session.run(IMAGES, route=route) for route in ("slim", "slim.1-2+wide.2-3")}
    nearest = np.minimum(*(np.abs(found - one).max(axis=1) for one in whole.values()))
    assert nearest.max() < 1e-2

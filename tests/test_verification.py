"""Engines that are another function than their network have to be found out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from engine_comparison import artifact_of, compare_network, compare_with
from torch import Tensor, nn

from klas_zoo.confidence import lower_paired_difference, upper_share
from klas_zoo.errors import CannotRunHere, ExportError, KlasZooError, VerificationError
from klas_zoo.exporters.contract import Artifact, OpenedEngine
from klas_zoo.exporters.limits import FEW, LEVEL, VerificationLimits, limits_for
from klas_zoo.exporters.onnx_session import open_onnx
from klas_zoo.exporters.records import Verification, explain
from klas_zoo.exporters.reference_logits import DecodedImages, ReferenceLogits
from klas_zoo.exporters.to_onnx import export
from klas_zoo.exporters.verification import compare, verify_engines
from klas_zoo.runtimes import CPU_PROVIDER

SHAPE = (3, 8, 8)
CLASSES = 4
LAX = VerificationLimits(relative=0.0, tolerance=1e9)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(), nn.Flatten(), nn.Linear(216, 4)
    )


@pytest.fixture(scope="module")
def engine(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("engine") / "network.onnx"
    export(network, SHAPE, file, metadata={})
    return file


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *SHAPE, generator=generator) for size in (16, 16, 5)]


def altered(engine: Path, file: Path, change: float) -> Path:
    """The engine with one number of its largest matrix changed by `change`."""
    model = onnx.load(engine)
    weights = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
    values = onnx.numpy_helper.to_array(weights).copy()
    values.flat[7] += change
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(model, file)
    return file


def test_an_engine_that_is_its_network_passes(engine: Path, network: nn.Module, batches: list[Tensor]) -> None:
    found = compare_network(engine, network, batches)
    assert found.passed
    assert (found.images, found.top1_agreement) == (37, 1.0)
    assert 0 <= found.max_abs_difference < 1e-5


@pytest.mark.parametrize("change", [0.01, -3.0])
def test_an_engine_with_one_altered_number_does_not_pass(
    change: float, engine: Path, network: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    found = compare_network(altered(engine, tmp_path / "altered.onnx", change), network, batches)
    assert not found.passed
    assert found.max_abs_difference > found.tolerance


def test_the_largest_difference_and_the_agreement_are_those_of_all_batches(
    engine: Path, network: nn.Module, batches: list[Tensor]
) -> None:
    batches = batches * 3  # enough images for shares to count
    with torch.no_grad():
        logits = [network.eval()(images) for images in batches]
    logits[1][3, 2] += 0.25  # the largest difference
    for first in logits[0], logits[3]:
        first[:] = -first * 1e-3 + first.mean()  # of another class
    limits = VerificationLimits(relative=0.0, tolerance=10, min_agreement=0.999)
    with_mistakes = compare_with(engine, batches, logits, limits)
    expected = np.concatenate([one.numpy() for one in logits])
    with torch.no_grad():
        truth = network(torch.cat(batches)).numpy()
    assert with_mistakes.max_abs_difference == pytest.approx(np.abs(expected - truth).max(), rel=1e-4)
    agreement = (expected.argmax(1) == truth.argmax(1)).mean()
    assert with_mistakes.top1_agreement == pytest.approx(agreement)
    assert agreement < 0.999
    assert not with_mistakes.passed


@pytest.mark.parametrize("where", ["torch", "engine", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(
    where: str, value: float, engine: Path, network: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    if where != "torch":
        engine = altered(engine, tmp_path / "altered.onnx", value)
    with torch.no_grad():
        logits = [network.eval()(images) for images in batches]
    if where != "engine":
        logits[0][:] = value  # not in the last batch: later ones must not make up for it
    found = compare_with(engine, batches, logits, LAX)
    assert not found.passed
    assert "not finite" in explain(found)


def of_logits(expected: np.ndarray, labels: np.ndarray | None = None) -> ReferenceLogits:
    """A reference for the engines below, which read logits out of the images they are given."""
    return ReferenceLogits.of_arrays(expected.reshape(len(expected), 1, 1, -1), {"route": expected}, labels)


def read_off(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)


def test_an_engine_of_any_batch_size_gets_batches_of_a_usual_size() -> None:
    expected = np.random.default_rng(0).normal(size=(200, CLASSES)).astype(np.float32)
    sizes = []

    def outputs(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return read_off(images)

    assert compare("route", OpenedEngine(outputs=outputs), of_logits(expected), LAX).images == 200
    assert sizes == [64, 64, 64, 8]


@pytest.mark.parametrize(
    ("allowed", "ran"),
    [((4,), [4] * 13), ((1, 16, 32), [1, 16, 32, 1]), ((64,), [64]), ((8,), [8] * 7), ((), [50])],
)
def test_an_engine_is_run_with_its_own_batch_sizes_by_turns_and_every_image_counts_once(
    allowed: tuple[int, ...], ran: list[int]
) -> None:
    expected = np.random.default_rng(0).normal(size=(50, CLASSES)).astype(np.float32)
    sizes = []

    def outputs(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return read_off(images)

    found = compare("route", OpenedEngine(outputs=outputs, batch_sizes=allowed), of_logits(expected), LAX)
    assert (found.images, found.max_abs_difference, found.top1_agreement) == (50, 0.0, 1.0)
    assert sizes == ran


def test_logits_of_another_shape_are_an_error_that_names_both(engine: Path, batches: list[Tensor]) -> None:
    with pytest.raises(
        VerificationError, match=r"^Cannot verify network\.onnx: .* 37 images .*shape \(37, 4\), torch's \(37, 7\)"
    ):
        compare_with(engine, batches, [images.flatten(1)[:, :7] for images in batches])


def test_without_images_nothing_is_verified(engine: Path) -> None:
    reference = ReferenceLogits(images=DecodedImages(), logits={engine.name: np.empty((0, CLASSES))})
    opened = OpenedEngine(outputs=read_off)
    with pytest.raises(VerificationError, match="no images"):
        compare(engine.name, opened, reference, LAX)
    with pytest.raises(VerificationError, match="no images"):
        verify_engines([artifact_of(engine)], lambda one: opened, reference, lambda one: LAX)


def test_images_that_the_engine_does_not_take_are_an_error(engine: Path) -> None:
    with pytest.raises(VerificationError, match=r"^Cannot verify network\.onnx: it failed to run \("):
        compare_with(engine, [torch.zeros(1, 3, 9, 9)], [torch.zeros(1, CLASSES)])


def test_a_file_that_is_no_engine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot load"):
        compare_with(tmp_path / "gone.onnx", [torch.zeros(1, *SHAPE)], [torch.zeros(1, CLASSES)])


def test_an_engine_of_a_fixed_batch_is_run_with_that_batch(engine: Path, network: nn.Module, tmp_path: Path) -> None:
    model = onnx.load(engine)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    onnx.save(model, tmp_path / "fixed.onnx")
    found = compare_network(tmp_path / "fixed.onnx", network, [torch.randn(12, *SHAPE)])
    assert found.passed and found.images == 12


def opener(**engines: Callable[[np.ndarray], np.ndarray] | KlasZooError) -> Callable[[Artifact], OpenedEngine]:
    def open_engine(artifact: Artifact) -> OpenedEngine:
        found = engines[artifact.route]
        if isinstance(found, KlasZooError):
            raise found
        return OpenedEngine(outputs=found)

    return open_engine


def artifacts(*names: str) -> list[Artifact]:
    return [Artifact(route=name, format="onnx", precision="fp16", path=Path(f"{name}.onnx")) for name in names]


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_engine_gets_a_verdict_whatever_became_of_the_others(parallel: int) -> None:
    expected = np.random.default_rng(0).normal(size=(150, CLASSES)).astype(np.float32)
    images = expected.reshape(150, 1, 1, -1)
    names = ("exact", "wrong", "elsewhere", "unloadable", "failing", "narrow")

    def fails(images: np.ndarray) -> np.ndarray:
        raise RuntimeError("no kernel\nand a page of advice")

    told = []
    verdicts = verify_engines(
        artifacts(*names),
        opener(
            exact=read_off,
            wrong=lambda images: -read_off(images),
            elsewhere=CannotRunHere("It is for an A100."),
            unloadable=ExportError("onnxruntime cannot load it."),
            failing=fails,
            narrow=lambda images: read_off(images)[:, :2],
        ),
        ReferenceLogits.of_arrays(images, dict.fromkeys(names, expected)),
        lambda one: limits_for(one.precision, "pretrained"),
        parallel=parallel,
        listener=lambda stage, route: told.append((stage, route)),
    )
    assert [one.artifact.route for one in verdicts] == list(names)
    assert [one.status for one in verdicts] == ["verified", "refused", "built, not run", *["refused"] * 3]
    reasons = [one.reason for one in verdicts]
    assert reasons[0] == "" and reasons[2:4] == ["It is for an A100.", "onnxruntime cannot load it."]
    assert "does not compute what torch computes" in reasons[1]
    assert reasons[4] == "Cannot verify failing: it failed to run (no kernel)."
    assert "(64, 2), torch's (64, 4)" in reasons[5]
    assert sorted(told) == sorted(("verify", name) for name in names)


def test_a_runtime_that_is_not_installed_is_no_verdict_on_its_engines() -> None:
    reference = of_logits(np.eye(CLASSES, dtype=np.float32))
    with pytest.raises(KlasZooError, match="does not start here"):
        verify_engines(
            artifacts("route"), opener(route=KlasZooError("CUDA does not start here.")), reference, lambda one: LAX
        )


def test_engines_run_at_once_only_where_that_is_asked_for() -> None:
    expected = np.random.default_rng(0).normal(size=(8, CLASSES)).astype(np.float32)
    names = ("a", "b")
    meeting = threading.Barrier(2, timeout=120)

    def waits(images: np.ndarray) -> np.ndarray:
        meeting.wait()  # for the other engine
        return read_off(images)

    reference = ReferenceLogits.of_arrays(expected.reshape(8, 1, 1, -1), dict.fromkeys(names, expected))
    verdicts = verify_engines(artifacts(*names), opener(a=waits, b=waits), reference, lambda one: LAX, parallel=2)
    assert [one.status for one in verdicts] == ["verified"] * 2
    alive: set[str] = set()

    def alone(name: str) -> Callable[[np.ndarray], np.ndarray]:
        def outputs(images: np.ndarray) -> np.ndarray:
            alive.add(name)
            assert alive == {name}
            alive.clear()
            return read_off(images)

        return outputs

    verdicts = verify_engines(artifacts(*names), opener(a=alone("a"), b=alone("b")), reference, lambda one: LAX)
    assert [one.status for one in verdicts] == ["verified"] * 2


def changed_classes(images: int, changed: int, labels: bool = False) -> Verification:
    """An engine in fp16 whose logits are as good as torch's, but for the top class of some images."""
    generator = np.random.default_rng(0)
    expected = generator.normal(size=(images, CLASSES)).astype(np.float32)
    order = np.argsort(expected, axis=1)
    rows = np.arange(images)
    expected[rows, order[:, -1]] = expected[rows, order[:, -2]] + 1e-3  # a margin below what fp16 may change
    found = expected.copy()
    found[rows[:changed], order[:changed, -2]] += 2e-3
    reference = of_logits(expected, order[:, -1] if labels else None)
    images_of = {expected[row].tobytes(): found[row] for row in rows}

    def outputs(batch: np.ndarray) -> np.ndarray:
        return np.stack([images_of[one.tobytes()] for one in read_off(batch)])

    return compare("route", OpenedEngine(outputs=outputs), reference, limits_for("fp16", "pretrained"))


@pytest.mark.parametrize(
    ("images", "changed", "passed"),
    [
        (16, 1, True),  # 93.8 %, of which 16 images say nothing
        (16, 16, True),
        (99, 99, True),
        (100, 4, True),
        (100, 5, False),
        (1000, 10, True),  # exactly the limit
        (1000, 18, True),
        (1000, 19, False),
        (10_000, 100, True),
        (10_000, 130, False),
    ],
)
def test_an_engine_is_refused_when_its_images_contradict_the_limit_on_shares(
    images: int, changed: int, passed: bool
) -> None:
    found = changed_classes(images, changed)
    assert found.max_abs_difference < found.tolerance
    assert found.top1_agreement == 1 - changed / images
    assert found.passed == passed
    bound = upper_share(images - changed, images, LEVEL)
    assert found.most_agreement == bound
    assert found.min_agreement == (0.99 if images >= FEW else 0.0)
    if not passed:
        share = f"the top class is the same for {100 * found.top1_agreement:.2f} % of them"
        assert f"on {images} images {share}" in explain(found)
        assert f"at most {100 * bound:.2f} % of all (99 % confidence), 99.00 % are required" in explain(found)


def test_a_loss_of_accuracy_is_refused_by_its_lower_bound() -> None:
    for changed, passed in ((5, True), (7, True), (12, False)):
        found = changed_classes(1000, changed, labels=True)
        assert (found.newly_wrong, found.newly_right, found.lost) == (changed, 0, pytest.approx(changed / 10))
        assert found.least_lost == 100 * lower_paired_difference(changed, 0, 1000, LEVEL)
        assert found.passed == passed
    sentence = "1.20 points of top-1 are lost and at least 0.62 on all images (99 % confidence), at most 0.2 may be"
    assert sentence in explain(found)


def test_limits_on_logits_hold_for_few_images_too() -> None:
    expected = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
    limits = limits_for("bf16", "pretrained")
    for noise, passed in ((0.05, True), (0.5, False)):
        engine = OpenedEngine(outputs=lambda images, noise=noise: read_off(images) + noise)
        found = compare("route", engine, of_logits(expected), limits)
        assert found.passed == passed
        assert found.tolerance == pytest.approx(0.2 * expected.std(), rel=1e-5)


def test_a_cosine_below_its_limit_is_named() -> None:
    expected = np.array([[10.0, 0.1, 0, 0], [0.1, 0.05, 0, 0]], np.float32)
    engine = OpenedEngine(outputs=lambda images: read_off(images) + np.float32([0, 0.04, 0, 0]))
    found = compare("route", engine, of_logits(expected), limits_for("fp16", "pretrained"))
    assert found.max_abs_difference < found.tolerance
    assert "the smallest cosine is" in explain(found)
    assert not found.passed


def found(difference: float, agreement: float) -> Verification:
    """As versions before confidence bounds wrote it."""
    return Verification(
        images=200,
        max_abs_difference=difference,
        top1_agreement=agreement,
        tolerance=1e-4,
        min_agreement=0.999,
    )


@pytest.mark.parametrize(
    ("verification", "sentence"),
    [
        (found(2e-6, 1.0), "The engine computes what torch computes: on 200 images logits differ by at most 2e-06."),
        (
            found(0.0025, 1.0),
            "The engine does not compute what torch computes: on 200 images logits differ by up to 0.0025, 25.0 times "
            "the 0.0001 that is allowed.",
        ),
        (
            found(2e-6, 0.98),
            "The engine does not compute what torch computes: on 200 images the top class is the same for 98.00 % of "
            "them, 99.90 % are required.",
        ),
        (
            found(0.5, 0.3),
            "The engine does not compute what torch computes: on 200 images logits differ by up to 0.5, 5000.0 "
            "times the 0.0001 that is allowed, and the top class is the same for 30.00 % of them, 99.90 % are "
            "required.",
        ),
        (
            found(float("nan"), 1.0),
            "The engine does not compute what torch computes: on 200 images some logits are not finite.",
        ),
    ],
)
def test_a_verification_is_explained_in_one_sentence(verification: Verification, sentence: str) -> None:
    assert explain(verification) == sentence
    assert verification.passed == ("does not" not in sentence)


def test_records_of_older_versions_are_read_and_judged_as_they_were() -> None:
    old = {
        "images": 16, "max_abs_difference": 0.01, "top1_agreement": 0.9375, "tolerance": 0.1, "min_agreement": 0.95,
        "cosine": 0.999, "min_cosine": 0.99, "top1": 80.0, "reference_top1": 80.5, "most_lost": 1.0,
    }  # fmt: skip
    read = Verification.from_json(old | {"of_a_later_version": 1})
    assert (read.level, read.most_agreement, read.least_lost) == (None, 0.9375, 0.5)
    assert not read.passed
    assert Verification.from_json(old | {"top1_agreement": 1.0}).passed
    assert not Verification.from_json(old | {"top1_agreement": 1.0, "top1": 79.0}).passed


def test_a_record_survives_json() -> None:
    written = changed_classes(150, 1, labels=True)
    assert Verification.from_json(vars(written)) == written


def test_onnxruntime_opens_what_it_is_given(engine: Path) -> None:
    opened = open_onnx(artifact_of(engine), provider=CPU_PROVIDER, threads=1)
    assert opened.batch_sizes == ()
    assert opened.outputs(np.zeros((3, *SHAPE), np.float32)).shape == (3, CLASSES)

"""Engines that are another function than their network have to be found out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from klas_zoo.errors import ExportError, VerificationError
from klas_zoo.exporters.records import Verification
from klas_zoo.exporters.to_onnx import export
from klas_zoo.exporters.verify import compare, explain, verify
from klas_zoo.profiles.devices import CPU_PROVIDER

SHAPE = (3, 8, 8)
CPU = {"provider": CPU_PROVIDER, "threads": 1}


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


def test_an_engine_that_is_its_network_passes_and_the_network_keeps_its_mode(
    engine: Path, network: nn.Module, batches: list[Tensor]
) -> None:
    network.train()
    found = verify(engine, network, batches, **CPU)
    assert found.passed
    assert (found.images, found.top1_agreement) == (37, 1.0)
    assert 0 <= found.max_abs_difference < 1e-5
    assert network.training


@pytest.mark.parametrize("change", [0.01, -3.0])
def test_an_engine_with_one_altered_number_does_not_pass(
    change: float, engine: Path, network: nn.Module, batches: list[Tensor], tmp_path: Path
) -> None:
    found = verify(altered(engine, tmp_path / "altered.onnx", change), network, batches, **CPU)
    assert not found.passed
    assert found.max_abs_difference > found.tolerance


def test_the_largest_difference_and_the_agreement_are_those_of_all_batches(
    engine: Path, network: nn.Module, batches: list[Tensor]
) -> None:
    with torch.no_grad():
        logits = [network.eval()(images) for images in batches]
    logits[1][3, 2] += 0.25  # the largest difference
    first = logits[0]
    first[:2] = -first[:2] * 1e-3 + first[:2].mean()  # two images of another class
    with_mistakes = compare(engine, zip(batches, logits, strict=True), tolerance=10, **CPU)
    expected = np.concatenate([(images_logits).numpy() for images_logits in logits])
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
    found = compare(engine, zip(batches, logits, strict=True), tolerance=1e9, min_agreement=0, **CPU)
    assert not found.passed
    assert "not finite" in explain(found)


def test_batches_are_taken_one_at_a_time(engine: Path, network: nn.Module) -> None:
    alive = []

    class Watched(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            alive.append(len(alive))
            return network.eval()(images)

    def stream() -> Iterator[Tensor]:
        for made in range(4):
            assert len(alive) == made  # the one before was used before the next is asked for
            yield torch.zeros(2, *SHAPE)

    assert verify(engine, Watched(), stream(), **CPU).images == 8


def test_answers_of_another_shape_are_an_error_that_names_both(engine: Path, batches: list[Tensor]) -> None:
    class Other(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :7]

    with pytest.raises(
        VerificationError, match=r"^Cannot verify network\.onnx: .*\(16, 3, 8, 8\) with \(16, 4\), torch with \(16, 7\)"
    ):
        verify(engine, Other(), batches, **CPU)


def test_without_images_nothing_is_verified(engine: Path, network: nn.Module) -> None:
    with pytest.raises(VerificationError, match="no images"):
        verify(engine, network, [], **CPU)


def test_images_that_the_engine_does_not_take_are_an_error(engine: Path) -> None:
    with pytest.raises(VerificationError, match=r"^Cannot verify network\.onnx: it failed to run \("):
        compare(engine, [(torch.zeros(1, 3, 9, 9), torch.zeros(1, 4))], **CPU)


def test_a_file_that_is_no_engine_is_an_error(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot load"):
        verify(tmp_path / "gone.onnx", network, [torch.zeros(1, *SHAPE)], **CPU)


def found(difference: float, agreement: float) -> Verification:
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

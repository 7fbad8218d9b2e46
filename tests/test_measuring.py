"""Measurements taken together: what is run, how often, and what bad images are answered with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from test_probes import separable
from torch import Tensor, nn
from toys import IMAGE, MeanHead, calls, forget_calls, random_batches, three_chains

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Route
from klas_zoo.selection import select
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.measurements import Measurements, SelectionWarning
from klas_zoo.selection.measuring import MeasurementImages, measure
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.selection.selectors import SELECTORS

PROBING = ProbeSettings(epochs=2)
PRICE = {"tiny": 1.0, "small": 3.0, "base": 10.0}
ALL = frozenset({"outputs", "probes", "cka", "residual", "accuracy", "output_kl"})


def cost(route: Route) -> float:
    return sum(PRICE[s.anchor] * (s.last - s.first + 1) for s in route.segments)


def streams(train: list[Batch], heldout: list[Batch]) -> MeasurementImages:
    def epochs() -> Iterable[Iterator[Batch]]:
        return (iter(train) for _ in range(PROBING.epochs))

    count = sum(len(labels) for _, labels in train)
    return MeasurementImages(
        epochs=epochs, fit=lambda: train, heldout=lambda: heldout, epochs_count=PROBING.epochs * count,
        fit_count=count, heldout_count=sum(len(labels) for _, labels in heldout),
    )  # fmt: skip


TRAIN, HELDOUT = random_batches((16, 16, 8)), random_batches((9, 8, 7), seed=1)


def taken(needs: frozenset[str], **settings: object) -> Measurements:
    wanted = SelectionSettings(**settings)  # type: ignore[arg-type]
    images, said = streams(TRAIN, HELDOUT), []
    return measure(three_chains(), needs, images, cost, wanted, probing=PROBING, warn=said.append)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def everything() -> Measurements:
    return taken(ALL)


@pytest.mark.parametrize("name", [name for name, one in SELECTORS.items() if one.cost == "macs"])
@pytest.mark.parametrize("most", [None, 1])
def test_every_selector_chooses_from_what_was_measured_together(
    name: str, most: int | None, everything: Measurements
) -> None:
    settings = SelectionSettings(selector=name, most=most, buckets=4)
    assert select(three_chains(), everything, cost, settings).chosen


@pytest.mark.parametrize("name", [name for name, one in SELECTORS.items() if one.cost == "macs"])
def test_what_a_selector_asks_for_is_measured_and_enough(name: str, everything: Measurements) -> None:
    settings = SelectionSettings(selector=name, buckets=4)
    measured = taken(SELECTORS[name].asks_for(settings), buckets=4)
    found, expected = (select(three_chains(), one, cost, settings) for one in (measured, everything))
    assert found.routes == expected.routes


def test_only_what_was_asked_for_is_measured() -> None:
    found = taken(frozenset({"cka"}))
    assert {need for need in ALL if getattr(found, need) is not None} == {"cka", "outputs"}
    assert {need for need in ALL if getattr(taken(frozenset()), need) is not None} == set()
    pairs = (("tiny", "base"),)
    assert taken(frozenset({"cka"}), pairs=pairs).outputs is None


def test_outputs_without_probes_are_those_beside_probes(everything: Measurements) -> None:
    assert taken(frozenset({"outputs"})).outputs == pytest.approx(everything.output_distances())


def test_stages_are_told_with_their_images() -> None:
    told: dict[str, list[int]] = {}

    @contextmanager
    def stage(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        told[name] = [total, 0]

        def advance(work: int, remark: str) -> None:
            told[name][1] += work

        yield advance

    measure(
        three_chains(), ALL, streams(TRAIN, HELDOUT), cost, SelectionSettings(), probing=PROBING, stage=stage,
        warn=lambda sentence: None,
    )  # fmt: skip
    assert list(told) == ["probes", "similarity", "CKA", "fit candidates", "run candidates"]
    assert all(total == done for total, done in told.values())


def test_probes_train_once_for_all_that_need_them() -> None:
    chains = three_chains()
    for chain in chains.values():
        forget_calls(chain)
    measure(
        chains, {"outputs", "probes"}, streams(TRAIN, HELDOUT), cost, SelectionSettings(), probing=PROBING,
        warn=lambda sentence: None,
    )  # fmt: skip
    # two epochs of three batches, and Θ once
    assert {count for chain in chains.values() for count in calls(chain)} == {2 * 3 + 3}


class Nothing(nn.Module):
    """Features that say nothing about the image."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)


def learnable(*, lost: bool) -> dict[str, Chain]:
    def chain() -> Chain:
        return Chain(nn.Identity(), [nn.Identity(), nn.Identity()], MeanHead(3, 3), input_shape=IMAGE).eval()

    chains = {"tiny": chain(), "small": chain()}
    if lost:
        chains["small"].blocks[0] = Nothing()
    return chains


SEPARABLE = streams([separable(32, seed=seed) for seed in range(6)], [separable(60, seed=99)])
QUICK = ProbeSettings(epochs=2, learning_rate=0.1)


def test_probes_at_chance_are_warned_of_with_their_block_and_anchor() -> None:
    pairs = (("tiny", "small"),)
    with pytest.warns(SelectionWarning, match="Probes of small after blocks 1, 2 are at chance on the held-out"):
        measure(
            learnable(lost=True), {"probes"}, SEPARABLE, cost, SelectionSettings(pairs=pairs), probing=QUICK
        )


def test_probes_that_learn_are_not_warned_of() -> None:
    measure(learnable(lost=False), {"probes"}, SEPARABLE, cost, SelectionSettings(), probing=QUICK)


def one_class(batches: list[Batch]) -> list[Batch]:
    return [(images, torch.zeros_like(labels)) for images, labels in batches]


@pytest.mark.parametrize(
    ("train", "heldout", "sentence"),
    [
        (one_class(TRAIN), HELDOUT, "The training images are of one class only; there is nothing to tell apart."),
        (TRAIN, one_class(HELDOUT), "The held-out images are of one class only; there is nothing to tell apart."),
        (
            random_batches((4,)), HELDOUT,
            "4 training images are fewer than the 5 classes: probes cannot learn a class they never see.",
        ),
        (TRAIN, [], "There are no held-out images to measure similarities on."),
    ],
    ids=["one class to learn", "one class held out", "fewer images than classes", "nothing held out"],
)  # fmt: skip
def test_images_that_say_nothing_are_refused(train: list[Batch], heldout: list[Batch], sentence: str) -> None:
    with pytest.raises(SelectionError) as caught:
        measure(
            three_chains(), {"probes"}, streams(train, heldout), cost, SelectionSettings(), probing=PROBING
        )
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("need", "named"),
    [
        ("probes", "after block 2 of base"), ("cka", "after block 2 of base"), ("residual", "after block 2 of base"),
        ("outputs", "Anchor base"),
    ],
)  # fmt: skip
def test_activations_that_are_not_finite_name_their_block(need: str, named: str) -> None:
    chains = three_chains()
    nn.init.constant_(chains["base"].blocks[1][0].bias, float("nan"))
    settings = SelectionSettings(pairs=(("tiny", "base"),))
    with pytest.raises(SelectionError, match=named):
        measure(chains, {need}, streams(TRAIN, HELDOUT), cost, settings, probing=PROBING)  # type: ignore[arg-type]

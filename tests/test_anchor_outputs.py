"""What stitches answer right after the closed-form T, against executing them one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import random_batches, same_state, snapshot, three_chains

from klas_zoo.errors import SelectionError
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route, Seam
from klas_zoo.selection.anchor_outputs import fit_stitches, measure_answers
from klas_zoo.supernet import Supernet

FIT, HELDOUT = random_batches((16, 16)), random_batches((7, 5), seed=1)
SEAMS = [Seam("tiny", 2, "small", 1), Seam("tiny", 3, "base", 4), Seam("small", 1, "base", 2)]


def test_stitches_are_those_a_build_would_start_with_and_no_random_number_is_used_up() -> None:
    chains = three_chains()
    before = {name: snapshot(chain) for name, chain in chains.items()}
    state = torch.get_rng_state()
    supernet, residual = fit_stitches(chains, SEAMS, FIT)
    assert torch.equal(torch.get_rng_state(), state)
    other = Supernet(chains, [Route.stitch(s.source, s.i, s.target, s.j, chains[s.target].depth) for s in SEAMS])
    assert residual == initialise_stitches(other, FIT)
    assert all(torch.equal(supernet.stitch(s).linear.weight, other.stitch(s).linear.weight) for s in SEAMS)
    assert all(same_state(chain, before[name]) for name, chain in chains.items())


def test_accuracy_and_divergence_are_those_of_each_stitch_on_its_own() -> None:
    chains = three_chains()
    supernet, _ = fit_stitches(chains, SEAMS, FIT)
    told: list[int] = []
    found = measure_answers(supernet, HELDOUT, on_batch=told.append)
    images = torch.cat([images for images, _ in HELDOUT])
    labels = torch.cat([labels for _, labels in HELDOUT])
    assert told == [7, 5]
    for seam in SEAMS:
        with torch.no_grad():
            features = list(chains[seam.source].walk(images))[seam.i]
            features = supernet.stitch(seam)(features)
            for block in chains[seam.target].blocks[seam.j :]:
                features = block(features)
            logits, wanted = chains[seam.target].head(features), chains[seam.target](images)
        assert found.accuracy[seam] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
        # torch: input is log Q, target is log P, the sum is KL(P ‖ Q) in nats
        logs = (one.double().log_softmax(1) for one in (logits, wanted))
        divergence = F.kl_div(*logs, log_target=True, reduction="batchmean")
        assert found.output_kl[seam] == pytest.approx(divergence.item(), rel=1e-4)


def test_a_stitch_whose_answers_are_not_finite_is_named() -> None:
    supernet, _ = fit_stitches(three_chains(), SEAMS[:1], FIT)
    nn.init.constant_(supernet.stitch(SEAMS[0]).linear.bias, float("nan"))
    with pytest.raises(SelectionError, match=r"^The stitch tiny\.1-2\+small\.2-4 gives answers that are not finite\.$"):
        measure_answers(supernet, HELDOUT)


def test_no_images_is_an_error() -> None:
    supernet, _ = fit_stitches(three_chains(), SEAMS[:1], FIT)
    with pytest.raises(SelectionError, match="There are no held-out images to execute stitches on"):
        measure_answers(supernet, [])

"""Heads for other classes: a linear classifier fitted to the features of a frozen anchor, read in one pass.

Softmax regression on standardised features with an L2 penalty, by L-BFGS on all images at once; the penalty is chosen
on the held-out images. Standardisation is folded into the weights, so the result is the anchor's own classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klas_zoo.chains import Chain, evaluating
from klas_zoo.data.loading import Batch
from klas_zoo.errors import FamilyError, SelectionError

_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
_STEPS = 60  # of L-BFGS at each penalty; each begins where the one before ended


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """How well a new head does: top-1 in per cent on the held-out images, and the penalty that was chosen."""

    top1: float
    penalty: float


@dataclass(frozen=True)
class _Features:
    """Inputs of every classifier, each (N, D), and labels (N,)."""

    inputs: list[Tensor]
    labels: Tensor


def fit_head(
    chain: Chain,
    train: Iterable[Batch],
    heldout: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] = lambda images: None,
) -> FittedHead:
    """Replaces the weights of a chain's classifiers, in place.

    Raises:
        FamilyError: the head does not end in linear classifiers.
        SelectionError: features are not finite, or there are no images.
    """
    classifiers = _classifiers(chain)
    learned, judged = (_collect(chain, classifiers, part, on_batch) for part in (train, heldout))
    found: FittedHead | None = None
    for number, classifier in enumerate(classifiers):
        best = _fit(learned.inputs[number], learned.labels, judged.inputs[number], judged.labels, chain.classes)
        weight, bias, head = best
        with torch.no_grad():
            classifier.weight.copy_(weight)
            if classifier.bias is not None:
                classifier.bias.copy_(bias)
        found = head if found is None or head.top1 > found.top1 else found
    assert found is not None
    return found


def _classifiers(chain: Chain) -> list[nn.Linear]:
    """The layers that give logits; distilled networks have two, whose logits are averaged."""
    found = [one for one in chain.head.modules() if isinstance(one, nn.Linear) and one.out_features == chain.classes]
    if not found:
        raise FamilyError(f"A new head needs a linear classifier for {chain.classes} classes at the network's end.")
    return found


def _collect(
    chain: Chain, classifiers: list[nn.Linear], images: Iterable[Batch], on_batch: Callable[[int], None]
) -> _Features:
    inputs: list[list[Tensor]] = [[] for _ in classifiers]
    labels = []
    with torch.inference_mode(), evaluating(chain), _recorded(classifiers, inputs):
        for pictures, truth in images:
            chain(pictures)
            labels.append(truth)
            on_batch(len(truth))
    if not labels:
        raise SelectionError("There are no images to fit a head to.")
    joined = [torch.cat(parts).flatten(1).float() for parts in inputs]
    if not all(torch.isfinite(one).all() for one in joined):
        raise SelectionError("Features before the head are not finite: the checkpoint is damaged or of other images.")
    # copies: what inference mode made cannot take part in gradients
    return _Features([one.clone() for one in joined], torch.cat(labels).clone())


@contextmanager
def _recorded(classifiers: list[nn.Linear], inputs: list[list[Tensor]]) -> Iterator[None]:
    def recorder(place: list[Tensor]) -> Callable[..., None]:
        return lambda module, arguments: place.append(arguments[0])

    hooks = [
        one.register_forward_pre_hook(recorder(place)) for one, place in zip(classifiers, inputs, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fit(
    features: Tensor, labels: Tensor, judged: Tensor, judged_labels: Tensor, classes: int
) -> tuple[Tensor, Tensor, FittedHead]:
    mean, scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    standard, others = (features - mean) / scale, (judged - mean) / scale
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    best: tuple[Tensor, Tensor, FittedHead] | None = None
    for penalty in _PENALTIES:
        _minimise(standard, labels, weight, bias, penalty)
        with torch.no_grad():
            right = (F.linear(others, weight, bias).argmax(1) == judged_labels).double().mean()
            if best is None or float(right) * 100 > best[2].top1:
                folded = weight / scale
                head = FittedHead(top1=float(right) * 100, penalty=penalty)
                best = folded.clone(), (bias - folded @ mean).clone(), head
    assert best is not None
    return best


def _minimise(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)

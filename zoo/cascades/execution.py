"""Cascades in a supernet: which blocks stages share there, and their answers by torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.chains import evaluating
from klas_zoo.routes import Route
from klas_zoo.supernet import RouteStep, Supernet


def shared_blocks(supernet: Supernet, before: Route, after: Route) -> int:
    """How many blocks two routes begin with alike, with the same weights: what a cascade computes once.

    An anchor that runs with its weights before tuning shares none with a stitch of the tuned one.
    """
    count = 0
    for one, other in zip(supernet.steps(before), supernet.steps(after), strict=False):
        if one != other:
            break
        count += one.kind == "block"
    return count


@torch.inference_mode()
def route_outputs(
    supernet: Supernet, routes: Sequence[Route], batches: Iterable[tuple[Tensor, Tensor]]
) -> RouteOutputs:
    """The logits of routes in one pass over labelled images; every prefix that routes share is computed once.

    Raises:
        DataError: there are no images.
    """
    found: dict[Route, list[np.ndarray]] = {route: [] for route in dict.fromkeys(routes)}
    labels: list[np.ndarray] = []
    with evaluating(supernet):
        for images, truth in batches:
            labels.append(truth.cpu().numpy())
            for route, logits in supernet.forward_all(images, list(found)):
                found[route].append(logits.float().cpu().numpy())
    return RouteOutputs(
        labels=np.concatenate(labels) if labels else np.zeros(0, np.int64),
        logits={route: np.concatenate(parts) if parts else np.zeros((0, 1)) for route, parts in found.items()},
    )


@torch.inference_mode()
def run(supernet: Supernet, cascade: Cascade, images: Tensor) -> tuple[Tensor, Tensor]:
    """A cascade stage by stage: only images that a stage is not sure of go on, with the features they have.

    Args:
        images: (B, C, H, W).

    Returns:
        Logits (B, classes) of the stage that answers each image, and the number of that stage (B,), from 0.
    """
    exits = torch.zeros(len(images), dtype=torch.long, device=images.device)
    logits: Tensor | None = None
    left = torch.arange(len(images), device=images.device)
    kept: Tensor = images  # features the stage before has in common with this one
    with evaluating(supernet):
        for number, stage in enumerate(cascade.stages):
            steps = supernet.steps(stage.route)
            after = cascade.stages[number + 1] if number + 1 < len(cascade.stages) else None
            features, to_keep = kept, images[left]
            done = _steps_until(steps, stage.shared)
            if not stage.shared:
                features = images[left]
            for index, step in enumerate(steps):
                if index >= done:
                    features = supernet.module(step)(features)
                if after is not None and after.shared and index + 1 == _steps_until(steps, after.shared):
                    to_keep = features if index >= done else kept
            logits = features if logits is None else logits.index_copy(0, left, features)
            exits[left] = number
            if stage.threshold is None:
                break
            sure = confidence(features.float().cpu().numpy(), cascade.measure, stage.temperature) >= stage.threshold
            unsure = torch.from_numpy(np.flatnonzero(~sure)).to(images.device)
            left, kept = left[unsure], to_keep[unsure]
            if not len(left):
                break
    assert logits is not None
    return logits, exits


def _steps_until(steps: Sequence[RouteStep], blocks: int) -> int:
    """How many steps it takes to execute the first `blocks` blocks; 0 for none."""
    count = 0
    for index, step in enumerate(steps):
        if count == blocks:
            return index if blocks else 0
        count += step.kind == "block"
    return len(steps)

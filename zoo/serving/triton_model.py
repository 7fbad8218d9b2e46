"""For Triton's python backend: all routes of a family as one model. Only Triton's own process can import this."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from klas_zoo.errors import KlasZooError
from klas_zoo.serving.answering import INPUT, OUTPUT, ROUTE, Answering, names_of


class TritonPythonModel:
    """`klas-zoo export --format triton` writes the model.py that names this class, and its config.pbtxt."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"], "family")
        self._answering = Answering(folder, threads=int(config["parameters"]["threads"]["string_value"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers what Triton's batcher put together; requests that take the same route are one batch."""
        images = [triton.get_input_tensor_by_name(one, INPUT).as_numpy() for one in requests]
        answers: list[Any] = [None] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, one in enumerate(requests):
            try:
                groups[self._answering.route_for(_parameters(one), len(images[index]))].append(index)
            except KlasZooError as error:
                answers[index] = _refusal(error)
        for route, members in groups.items():
            try:
                logits = self._answering.answer(np.concatenate([images[index] for index in members]), route)
            except KlasZooError as error:
                for index in members:
                    answers[index] = _refusal(error)
                continue
            parts = np.split(logits, np.cumsum([len(images[index]) for index in members])[:-1])
            for index, part in zip(members, parts, strict=True):
                tensors = [triton.Tensor(OUTPUT, part), triton.Tensor(ROUTE, names_of(route, len(part)))]
                answers[index] = triton.InferenceResponse(tensors)
        return answers


def _parameters(request: Any) -> dict[str, object]:
    found = json.loads(request.parameters() or "{}")
    return found if isinstance(found, dict) else {}


def _refusal(error: KlasZooError) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(str(error), triton.TritonError.INVALID_ARG))

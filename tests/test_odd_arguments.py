"""Arguments of Python's interface that are of another type than they should be, and places that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
import torch

from klas_zoo.errors import BadQuantity, UnknownName, UsageError
from klas_zoo.registry import Registry
from klas_zoo.registry.picking import pick


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return made_up.filled_registry(tmp_path_factory.mktemp("registry"))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"latency": None}, UsageError, "Pass a limit: latency, mean or worst"),
        ({"latency": True}, BadQuantity, "A latency of True ms is no budget"),
        ({"latency": [5]}, BadQuantity, "is no budget"),
        ({"percentile": 99}, UnknownName, "Unknown percentile '99': did you mean p99"),
        ({"min_accuracy": "80"}, UsageError, "top-1 in per cent, 0 to 100, not '80'"),
        ({"min_accuracy": 0.8}, UsageError, "for 80 % pass 80, not 0.8"),
        ({"max_size": True}, BadQuantity, "A size of True bytes is no limit"),
        ({"batch": "1"}, UsageError, "batch is a whole number from 0 on, not '1'"),
        ({"threads": "2"}, UsageError, "threads is a whole number from 0 on, not '2'"),
        ({"family": 3}, UnknownName, "Unknown family '3'"),
        ({"hardware": 98765}, UnknownName, "Unknown hardware '98765'"),
        ({"device": torch.device("cuda:0")}, UnknownName, "Unknown device 'cuda:0'"),
    ],
)
def test_each_is_one_sentence(registry: Registry, arguments: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        pick(**{"latency": "1s", "registry": registry, **arguments})


@pytest.mark.parametrize("latency", [np.float32(2.5), Decimal("2.5"), Fraction(5, 2), 2.5, "2.5e0ms", "2.5E-3s"])
def test_numbers_of_every_kind_are_budgets(registry: Registry, latency: Any) -> None:
    assert str(pick(latency, registry=registry, device=torch.device("cpu")).engine.route) == "small"  # type: ignore[arg-type]


def test_a_deleted_working_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from klas_zoo.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "pick", "--latency", "5ms", "--registry", "zoo"], cwd=tmp_path / "gone",
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "Error: The working directory was deleted: change to another one.\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_results_are_shown_on_terminals_of_any_encoding(tmp_path: Path, encoding: str) -> None:
    registry = made_up.holding(tmp_path, made_up.planned(4, "a", 70.0, 1.0, family="ゾウ Γ → |Δ|"))
    done = subprocess.run(
        [sys.executable, "-m", "klas_zoo", "list", "--registry", str(registry.root)], capture_output=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "ゾウ Γ → |Δ|".encode(encoding, "backslashreplace") in done.stdout

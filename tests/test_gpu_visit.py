"""scripts/gpu, for a GPU that is borrowed for minutes: every stage runs on the fake driver."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest

STAGES = {
    "device", "partition", "latency-onnxruntime", "profiles", "build", "latency-families", "elastic", "memory",
    "latency-torch", "latency-compiled", "tuning",
}  # fmt: skip


def numbers(value: Any) -> Iterator[object]:
    """Everything in a row that is neither a text nor a count."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers(one) if key != "seconds" else ()
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


@pytest.mark.slow
def test_every_stage_ends_without_a_failure_and_measures_nothing(driver: Path, tmp_path: Path) -> None:
    asked = ("scripts/gpu", "--out", str(tmp_path / "visit"), "--fake", "--quick", "--jobs", "4", "--minutes", "40")
    done = fake_cuda.run(driver, *asked)
    logs = "".join(path.read_text()[-1000:] for path in sorted((tmp_path / "visit").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    tables = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "visit").glob("*.json")}
    assert set(tables) == STAGES
    for name, table in tables.items():
        assert table and not [row for row in table.values() if "error" in row], name
        assert list(numbers(table)) == [], name
        if not all("skipped" in row for row in table.values()) and name != "memory":
            assert "not measured" in json.dumps(table), name
    refused = {key: row["refused"] for key, row in tables["partition"].items() if "refused" in row}
    assert refused and all(key.startswith("resnet bf16 ") for key in refused)
    assert all(row["copies"] == 0 for key, row in tables["partition"].items() if key not in refused)
    assert tables["memory"]["onnxruntime"]["recognised"] is True
    # again: nothing is left to do
    again = fake_cuda.run(driver, *asked, "--stages", "partition,memory")
    assert again.returncode == 0 and "failed" not in again.stdout


def test_a_stage_that_fails_is_named_and_makes_the_script_fail(driver: Path, tmp_path: Path) -> None:
    (tmp_path / "v-graphs").mkdir()
    (tmp_path / "v-graphs" / "process").write_text(str(os.getpid()))  # as if graphs were being exported
    done = fake_cuda.run(
        driver, "scripts/gpu", "--out", str(tmp_path / "v"), "--fake", "--quick", "--stages", "device",
        card=fake_cuda.Card(kernels=False),
    )  # fmt: skip
    assert done.returncode == 1
    assert "device: failed with 1, see device.log," in done.stdout
    row = json.loads((tmp_path / "v" / "device.json").read_text())["ceilings"]
    assert "no kernel image" in row["error"]

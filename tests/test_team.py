"""Several processes do what one would: two of gloo on this CPU against one, at the same batch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import team_job
import torch
from torch import Tensor

from klas_zoo.data.order import shuffled
from klas_zoo.errors import UsageError
from klas_zoo.processes.team import ALONE, Team, under_torchrun
from klas_zoo.routes import Route
from klas_zoo.tuning.objective import mixed_loss
from klas_zoo.tuning.tuner import Tuner

JOB = Path(team_job.__file__)


def torchrun(out: Path, what: str, *, restarts: int = 0) -> Any:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), "--monitor-interval", "0.1", str(JOB), str(out), what),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return torchrun(tmp_path_factory.mktemp("team") / "found.pt", "everything")


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return team_job.everything(ALONE)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("way", team_job.WAYS)
def test_two_processes_take_the_steps_of_one(way: str, pair: dict[str, Any], single: dict[str, Any]) -> None:
    (weights, losses), (expected, told) = pair["tuned"][way], single["tuned"][way]
    assert losses == pytest.approx(told, abs=1e-5)
    assert len(set(told)) == len(told)
    # Adam makes whole steps of tiny gradients: rounding shows in weights more than in losses
    assert largest_difference(weights, expected) < 1e-4


def test_accumulating_changes_rounding_only(single: dict[str, Any]) -> None:
    (_, plain), (_, parts) = single["tuned"].values()
    assert parts == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["probes", "probes of stored features"])
def test_two_processes_train_the_probes_of_one(of: str, pair: dict[str, Any], single: dict[str, Any]) -> None:
    assert largest_difference(pair[of], single[of]) < 1e-4


@pytest.mark.slow
def test_two_processes_count_the_hits_of_one(pair: dict[str, Any], single: dict[str, Any]) -> None:
    assert pair["top1"] == single["top1"]
    assert len(set(single["top1"])) > 1


@pytest.mark.slow
def test_another_route_on_every_process_takes_steps_of_their_mean_gradient(pair: dict[str, Any]) -> None:
    one, other = pair["each"]
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings, net, draw = team_job.SETTINGS, team_job.supernet(), random.Random(team_job.SETTINGS.seed)
    tuner = Tuner(net, team_job.STEPS, settings)
    orders = [shuffled(len(team_job.IMAGES), settings.batch, 5, True, 0, Team(rank, 2)) for rank in range(2)]
    drawn: set[Route] = set()
    with tuner.running():
        for draws in islice(zip(*orders, strict=True), team_job.STEPS):
            for share in draws:
                route = draw.choice(net.routes)
                drawn.add(route)
                images, labels = team_job.pick([one.position for one in share])
                loss = mixed_loss(net(images, route), labels, tuner.objective.taught(images), settings)
                (loss / 2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.clip)
            tuner.optimiser.step()
            tuner.optimiser.zero_grad()
            tuner.scheduler.step()
    assert len(drawn) == len(net.routes)
    assert largest_difference(one, net.state_dict()) < 1e-4


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_changes_nothing_in_the_end(
    tmp_path: Path, pair: dict[str, Any]
) -> None:
    weights, losses = torchrun(tmp_path / "found.pt", "killed", restarts=1)
    expected, told = pair["tuned"]["plain"]
    assert 0 < len(losses) < len(told)  # the second life went on from a checkpoint
    assert losses == told[-len(losses) :]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_processes_decide_together_whether_there_is_a_checkpoint(pair: dict[str, Any]) -> None:
    found = pair["restored"]
    assert found["all"] == [True, True]
    assert found["the second"] == [False, False]
    assert len(found["the first"]) == 2
    for sentence in found["the first"]:
        assert sentence.startswith("Process 1 cannot read the checkpoint of step 0 in")
        assert sentence.endswith("all machines of a build must see the registry's folder.")


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"12 images cannot be cut .* for 5 processes evenly: give a multiple of 5"):
        Tuner(team_job.supernet(), 1, team_job.SETTINGS, team=Team(0, 5))


def test_one_process_alone_is_a_team_too() -> None:
    assert ALONE.is_main
    assert ALONE.gather("mine") == ["mine"]
    assert ALONE.broadcast({"a": 1}) == {"a": 1}
    assert torch.equal(ALONE.all_reduce(torch.ones(2)), torch.ones(2))
    ALONE.barrier()
    assert not under_torchrun()

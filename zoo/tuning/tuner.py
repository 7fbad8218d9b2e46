"""Tuning: each step draws one route at random, so cost does not grow with their number.

The loss is a mix of cross-entropy and distillation from the largest anchor as it was before
tuning. Anchors learn along, or stay frozen; stitching layers and the tensors that stitches have for
themselves have a learning rate of their own. Several processes share
every batch, and take the steps that one would: after the backward pass they average the gradients
of the routes of that step. torch's DistributedDataParallel would send those of the whole supernet,
most of which a step leaves unused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError, UsageError
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.compiling import block_by_block
from klas_zoo.tuning.drawing import RouteDraw
from klas_zoo.tuning.objective import Objective
from klas_zoo.tuning.optimising import make_optimiser, rate_at
from klas_zoo.tuning.settings import TuningSettings

_Answered = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What tuning reports after every step.

    `loss` is a running mean, `last` this step's own, over all processes; `rate` the learning rate of
    the stitching layers; `images` those of the step, over all processes.
    """

    step: int
    steps: int
    loss: float
    last: float
    rate: float
    images: int


class Tuner:
    """A supernet on its way through `steps` steps; `done` of them are behind it.

    Args:
        teacher: images → logits, what routes learn from besides labels. Default: the largest anchor as it is now.

    Raises:
        UsageError: a batch cannot be shared out evenly.
    """

    def __init__(
        self, supernet: Supernet, steps: int, settings: TuningSettings, *, team: Team = ALONE,
        teacher: nn.Module | None = None,
    ) -> None:  # fmt: skip
        if settings.batch % (settings.accumulate * team.size):
            raise UsageError(
                f"A batch of {settings.batch} images cannot be cut into {settings.accumulate} parts for {team.size} "
                f"processes evenly: give a multiple of {settings.accumulate * team.size}."
            )
        self.supernet, self.steps, self.team, self.done = supernet, steps, team, 0
        self.device = next(supernet.parameters()).device.type
        self.settings = settings.on(self.device)
        self.memory_format = self.settings.format_of(supernet, self.device)
        if settings.own and not supernet.own:
            supernet.give_own(settings.own, seed=settings.seed)
        team.sync(supernet.state_dict().values())
        supernet.to(memory_format=self.memory_format)
        frozen = settings.anchors == "frozen"
        supernet.chains.requires_grad_(not frozen)
        self.objective = Objective(supernet, self.settings, self.memory_format, teacher)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = AveragedModel(supernet, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.optimiser = make_optimiser(supernet, settings, self.memory_format)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: rate_at(step, steps, settings.warmup)
        )
        self.loss = math.nan
        self._kept: list[_Answered] = []  # what the next step learns from too
        learning = [route for route in supernet.routes if not (frozen and route.is_anchor)]
        self._draw = RouteDraw(learning or supernet.routes, settings.sampling, settings.seed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Training mode, compiled where that is wanted, for as long as steps are taken."""
        self.supernet.train()
        self.supernet.freeze_statistics()
        with ExitStack() as stack:
            stack.enter_context(self.objective.fast_attention())
            if self.settings.compile:
                stack.enter_context(block_by_block(self.supernet, *self.objective.chains()))
            yield

    def step(self, batches: Iterator[Batch]) -> Progress:
        """Takes `settings.accumulate` batches, each this process's share, or those of the step before once more.

        Raises:
            SelectionError: the loss is not finite; names the route and the step.
        """
        routes = self._next_routes()
        route = routes[self.team.rank]
        total = torch.zeros((), device=self.device)
        count = 0
        for images, labels, taught in self._with_answers(batches):
            loss = self.objective(images, labels, taught, route) / self.settings.accumulate
            loss.backward()
            total += loss.detach()
            count += len(labels)
        last = self._share(total, routes)
        if not math.isfinite(last):
            raise SelectionError(
                f"Tuning diverged at step {self.done + 1} on route {self._guilty(total, route)}: lower the learning "
                "rates."
            )
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.supernet.parameters(), self.settings.clip)
        rate = self.optimiser.param_groups[-1]["lr"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.supernet)
        self._draw.learned(routes[0], last)
        self.done += 1
        self.loss = last if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * last
        return Progress(
            step=self.done, steps=self.steps, loss=self.loss, last=last, rate=rate, images=count * self.team.size
        )

    def finish(self) -> None:
        """Leaves the supernet with its final weights, in evaluation mode."""
        if self.average is not None and self.done:
            self.supernet.load_state_dict(self.average.module.state_dict())
        self.supernet.to(memory_format=torch.contiguous_format)
        self.supernet.requires_grad_().eval()

    def state(self) -> dict[str, Any]:
        """Everything the next step depends on, but the batches and the processes' own generators."""
        return {
            "done": self.done,
            "loss": self.loss,
            "supernet": self.supernet.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimiser": self.optimiser.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "draw": self._draw.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.done, self.loss, self._kept = state["done"], state["loss"], []
        self.supernet.load_state_dict(state["supernet"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._draw.restore(state["draw"])

    @property
    def batches_taken(self) -> int:
        """How many batches, each this process's share, the steps that are done have used up."""
        return self.done // self.settings.reuse * self.settings.accumulate

    def _with_answers(self, batches: Iterator[Batch]) -> Iterable[_Answered]:
        """What a step learns from, with the teacher's answers: one at a time, unless it is used again."""
        fresh = (self._answered(*next(batches)) for _ in range(self.settings.accumulate))
        if self.settings.reuse == 1:
            return fresh
        if self.done % self.settings.reuse == 0 or not self._kept:
            self._kept = list(fresh)
        return self._kept

    def _answered(self, images: Tensor, labels: Tensor) -> _Answered:
        return images, labels, self.objective.taught(images)

    def _next_routes(self) -> list[Route]:
        """One for each process. Everybody draws for everybody, so that generators stay alike."""
        if self.settings.routes == "same":
            return [self._draw.next()] * self.team.size
        return [self._draw.next() for _ in range(self.team.size)]

    def _share(self, loss: Tensor, routes: list[Route]) -> float:
        """The mean loss of the processes; their gradients become the mean in the same exchange."""
        if self.team.size == 1:
            return float(loss)
        mean, gradients = loss.clone(), []
        for parameter in self._parameters_of(routes):
            if parameter.grad is None:  # another process's route has it
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.team.average([mean, *gradients])
        return float(mean)

    def _parameters_of(self, routes: list[Route]) -> Iterator[nn.Parameter]:
        """What the routes are made of, each once and in the same order in every process."""
        modules = {step: self.supernet.module(step) for route in routes for step in self.supernet.steps(route)}
        return (one for module in modules.values() for one in module.parameters() if one.requires_grad)

    def _guilty(self, loss: Tensor, route: Route) -> str:
        mine = "" if torch.isfinite(loss) else str(route)
        return next(filter(None, self.team.gather(mine)), str(route))


def tune(
    supernet: Supernet,
    batches: Iterator[Batch],
    steps: int,
    settings: TuningSettings,
    *,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Tunes anchors and stitching layers together, in place, from the first step to the last.

    Args:
        batches: endless training batches.

    Raises:
        SelectionError: the loss is not finite; names the route and the step.
    """
    if steps == 0:
        return
    tuner = Tuner(supernet, steps, settings)
    with tuner.running():
        while tuner.done < steps:
            on_step(tuner.step(batches))
    tuner.finish()

"""Tuning: each step draws one route at random, so cost does not grow with their number.

The loss is a mix of cross-entropy and distillation from the largest anchor as it was before
tuning. Anchors learn along, or stay frozen; stitching layers and the tensors that stitches have for
themselves have a learning rate of their own. Several processes share
every batch, and take the steps that one would: after the backward pass they average the gradients
of the routes of that step. torch's DistributedDataParallel would send those of the whole supernet,
most of which a step leaves unused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.errors import SelectionError, UsageError
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.compiling import block_by_block
from klas_zoo.tuning.drawing import RouteDraw
from klas_zoo.tuning.optimising import make_optimiser, rate_at
from klas_zoo.tuning.settings import TuningSettings


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
        self.teacher = teacher or _frozen_copy(list(supernet.chains.values())[-1])
        self.targets: dict[str, nn.Module] = {}
        if settings.features:
            ends = {route.segments[-1].anchor for route in supernet.routes if not route.is_anchor}
            self.targets = {name: _frozen_copy(supernet.chain(name)) for name in sorted(ends)}
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = AveragedModel(supernet, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self.optimiser = make_optimiser(supernet, settings, self.memory_format)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: rate_at(step, steps, settings.warmup)
        )
        self.loss = math.nan
        learning = [route for route in supernet.routes if not (frozen and route.is_anchor)]
        self._draw = RouteDraw(learning or supernet.routes, settings.sampling, settings.seed)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Training mode, compiled where that is wanted, for as long as steps are taken."""
        self.supernet.train()
        self.supernet.freeze_statistics()
        chains = [one for one in (self.teacher, *self.targets.values()) if isinstance(one, Chain)]
        with ExitStack() as stack:
            if self.device == "cpu" and self.settings.precision == "bf16":
                stack.enter_context(_attention_in_parts(self.supernet, self.teacher, *self.targets.values()))
            if self.settings.compile:
                stack.enter_context(block_by_block(self.supernet, *chains))
            yield

    def step(self, batches: Iterator[Batch]) -> Progress:
        """Takes `settings.accumulate` batches, each this process's share.

        Raises:
            SelectionError: the loss is not finite; names the route and the step.
        """
        routes = self._next_routes()
        route = routes[self.team.rank]
        total = torch.zeros((), device=self.device)
        count = 0
        for _ in range(self.settings.accumulate):
            images, labels = next(batches)
            loss = self._loss(images, labels, route) / self.settings.accumulate
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
        self.done, self.loss = state["done"], state["loss"]
        self.supernet.load_state_dict(state["supernet"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._draw.restore(state["draw"])

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

    def _loss(self, images: Tensor, labels: Tensor, route: Route) -> Tensor:
        images = images.contiguous(memory_format=self.memory_format)
        with _arithmetic(self.device, self.settings):
            if self.settings.distillation == 0 and (not self.targets or route.is_anchor):
                return F.cross_entropy(self.supernet(images, route).float(), labels)  # without a teacher's pass
            with torch.no_grad():
                taught = self.teacher(images).float()
            if not self.targets or route.is_anchor:
                return mixed_loss(self.supernet(images, route).float(), labels, taught, self.settings)
            *before, head = self.supernet.steps(route)
            features = images
            for step in before:
                features = self.supernet.module(step)(features)
            logits = self.supernet.module(head)(features).float()
            distance = self._distance(features, images, route.segments[-1].anchor)
        return mixed_loss(logits, labels, taught, self.settings) + self.settings.features * distance

    def _distance(self, features: Tensor, images: Tensor, target: str) -> Tensor:
        """Of a stitch's last features, pooled, from those of its target before tuning, as a share of their variance."""
        chain = self.targets[target]
        assert isinstance(chain, Chain)
        with torch.no_grad():
            *_, wanted = chain.walk(images)
            wanted = chain.pool(wanted, chain.layouts[-1]).float()
        found = chain.pool(features, chain.layouts[-1]).float()
        return (found - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)

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


def mixed_loss(logits: Tensor, labels: Tensor, taught: Tensor, settings: TuningSettings) -> Tensor:
    """(1 − d) · cross-entropy + d · distillation, d = `settings.distillation`.

    Hard distillation is cross-entropy with the teacher's most likely class (DeiT, Eq. 3), soft
    is KL(teacher ‖ route) at temperature T, times T² (Hinton et al. 2015).
    """
    plain = F.cross_entropy(logits, labels)
    if settings.hard:
        distilled = F.cross_entropy(logits, taught.argmax(1))
    else:
        heat = settings.temperature
        distilled = heat**2 * F.kl_div(
            F.log_softmax(logits / heat, 1), F.log_softmax(taught / heat, 1), log_target=True, reduction="batchmean"
        )
    return (1 - settings.distillation) * plain + settings.distillation * distilled


def _frozen_copy(chain: nn.Module) -> nn.Module:
    return copy.deepcopy(chain).eval().requires_grad_(False)


@contextmanager
def _attention_in_parts(*networks: nn.Module) -> Iterator[None]:
    """timm's attention as two products and a softmax, a quarter off a step: torch's own parts look for masked rows."""
    fused: list[Any] = [m for one in networks for m in one.modules() if getattr(m, "fused_attn", False)]
    try:
        for attention in fused:
            attention.fused_attn = False
        yield
    finally:
        for attention in fused:
            attention.fused_attn = True


def _arithmetic(device: str, settings: TuningSettings) -> ExitStack:
    """bf16 autocast, or nothing."""
    stack = ExitStack()
    if settings.precision == "bf16":
        stack.enter_context(torch.autocast(device, torch.bfloat16))
        if device == "cpu":
            # the backward pass of the fused kernel is ten times slower in bf16
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack

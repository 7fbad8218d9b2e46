"""Steps of tuning as CUDA graphs: small networks are tuned many times faster than kernel by kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from klas_zoo.data.loading import Batch
from klas_zoo.routes import Route
from klas_zoo.tuning.tuner import Tuner


class GraphedSteps:
    """Takes a tuner's steps, for one process on a CUDA device; call `step` inside `tuner.running()`.

    The loss and the gradients of each route are captured once, into gradients that stay where they are. The optimiser
    sees those of the route of the step alone, as without graphs.
    """

    def __init__(self, tuner: Tuner, batches: Iterator[Batch]) -> None:
        torch.set_autocast_cache_enabled(False)  # casts belong to the graph that made them
        self.tuner, self.batches = tuner, batches
        images, targets = next(batches)
        self.images, self.targets = images.clone(), targets.clone()
        self.parameters = [p for p in tuner.supernet.parameters() if p.requires_grad]
        self.gradients = {p: torch.zeros_like(p) for p in self.parameters}
        self.graphs: dict[Route, tuple[torch.cuda.CUDAGraph, Tensor, set[nn.Parameter]]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self._ask_teacher()

    def capture(self, routes: Iterable[Route]) -> None:
        """Captures routes before their first step."""
        for route in routes:
            if route not in self.graphs:
                self.graphs[route] = self._capture(route)

    def step(self) -> None:
        """One step; reads the loss only where that matters, since it waits for the device."""
        tuner = self.tuner
        (route,) = tuner._next_routes()
        self.capture([route])
        graph, loss, learning = self.graphs[route]
        if tuner.done % tuner.settings.reuse == 0:
            images, targets = next(self.batches)
            self.images.copy_(images)
            self.targets.copy_(targets)
            self.asking.replay()
        self._expose(learning)
        graph.replay()
        if tuner.settings.clip is not None:
            nn.utils.clip_grad_norm_(list(learning), tuner.settings.clip)
        tuner.optimiser.step()
        tuner.scheduler.step()
        tuner.done += 1
        if tuner.settings.sampling == "gain" or tuner.done % 20 == 0:
            last = float(loss)
            if not math.isfinite(last):
                raise SystemExit(f"Tuning diverged at step {tuner.done} on route {route}.")
            tuner._draw.learned(route, last)
            tuner.loss = last if math.isnan(tuner.loss) else 0.8 * tuner.loss + 0.2 * last

    def _expose(self, learning: set[nn.Parameter]) -> None:
        for parameter in self.parameters:
            parameter.grad = self.gradients[parameter] if parameter in learning else None

    def _ask_teacher(self) -> None:
        """Captures the teacher's pass; `self.taught` then holds its answers to the images of now."""

        def ask() -> Tensor | None:
            return self.tuner.objective.taught(self.images)

        _twice_aside(ask)
        self.asking = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.asking):
            self.taught = ask()

    def _capture(self, route: Route) -> tuple[torch.cuda.CUDAGraph, Tensor, set[nn.Parameter]]:
        learning = set(self.tuner._parameters_of([route]))
        gradients = [self.gradients[p] for p in learning]
        self._expose(learning)

        def work() -> Tensor:
            torch._foreach_zero_(gradients)
            loss = self.tuner.objective(self.images, self.targets, self.taught, route)
            loss.backward()
            return loss.detach()

        _twice_aside(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            loss = work()
        return graph, loss, learning


def _twice_aside(work) -> None:  # type: ignore[no-untyped-def]
    """Warms up on a stream of its own, as captures want it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

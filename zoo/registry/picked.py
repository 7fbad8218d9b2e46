"""What was picked and why. Imports neither torch nor onnx nor numpy before an engine is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from klas_zoo.budget import Budget
from klas_zoo.hardware import describe_cpu, physical_cores
from klas_zoo.profiles.records import CascadeLatency, LatencyRecord, origin_of
from klas_zoo.registry.records import EngineRecord, Statistic, percentile_ms
from klas_zoo.registry.store import check_file
from klas_zoo.routes import Route
from klas_zoo.units import format_latency, format_macs, format_size

if TYPE_CHECKING:
    from klas_zoo.registry.loaded import Engine


@dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """A neighbour of the picked engine; differences are its numbers minus the picked one's.

    Attributes:
        latency_ms: at the pick's percentile and batch size.
        top1_difference: in percentage points.
        origin: of the latency, with its error where it was predicted.
    """

    engine: EngineRecord
    latency_ms: float
    latency_difference_ms: float
    top1_difference: float
    origin: str = "measured"

    def __str__(self) -> str:
        more = "more" if self.latency_difference_ms > 0 else "less"
        return (
            f"{described(self.engine)}: {format_latency(self.latency_ms)} "
            f"({format_latency(abs(self.latency_difference_ms))} {more}), "
            f"top-1 {self.engine.top1:.2f} % ({self.top1_difference:+.2f} points)"
            f"{'' if self.origin == 'measured' else f', {self.origin}'}"
        )


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The picked engine and the reasons for it.

    Attributes:
        latency: what was compared with the budget; a prediction where nothing was measured.
        percentile: of the latency that the budget limits; `mean` or `worst` where no percentile was limited.
        fitting: how many of `candidates` comparable engines are within every limit.
        runner_up_faster: the most accurate engine that keeps the limits and is faster; None if there is none.
        runner_up_slower: the fastest engine that is more accurate and misses nothing but the latency budget;
            None if there is none.
        left_out: what could not be compared and why, a clause each.
    """

    engine: EngineRecord
    latency: LatencyRecord
    budget: Budget
    percentile: Statistic
    fitting: int
    candidates: int
    runner_up_faster: RunnerUp | None
    runner_up_slower: RunnerUp | None
    left_out: tuple[str, ...] = ()

    @property
    def latency_ms(self) -> float:
        return percentile_ms(self.latency, self.percentile)

    @property
    def budget_ms(self) -> float:
        return self.budget.latency_ms

    @property
    def random_weights(self) -> bool:
        """Whether the engine's weights are untrained, so that its accuracy means nothing."""
        return self.engine.weights == "random"

    def load(
        self, *, threads: int | None = None, spinning: bool | None = None, options: Mapping[str, str] | None = None
    ) -> Engine:
        """Opens the engine as it was verified and timed: same runtime, provider, options and threads.

        `engine.predict("cat.jpg")` classifies an image file, `engine.run(images)` gives logits, `engine.raw` is the
        runtime's own session, of a cascade the list of those of its stages.

        Args:
            threads, options: other than those of the measurement; the latency may then be another one. Of a
                measurement on other hardware no more threads are taken than this machine has cores.
            spinning: whether idle threads poll for work, see docs/serving.md. None: as it was timed. False saves
                processor time in a service that calls a few times a second.

        Raises:
            DamagedRegistry: a file of the engine is missing or is not what was registered.
            KlasZooError: the runtime is missing, or cannot use that provider here.
        """
        from klas_zoo.registry.loaded import Engine
        from klas_zoo.runtimes import open_engine, parse_options

        check_file(self.engine, content=True)
        timed = self.latency
        elsewhere = threads is None and timed.hardware != describe_cpu()
        how: dict[str, Any] = {
            "provider": timed.provider, "spinning": spinning,
            "threads": min(timed.threads, physical_cores()) if elsewhere else threads or timed.threads,
            "options": {**parse_options(timed.options), **(options or {})},
        }  # fmt: skip
        if self.engine.cascade is not None and not isinstance(self.engine.route, Route):
            from klas_zoo.exporters.cascade_session import CascadeSession

            expected = self.engine.cascade.heldout.escalated_intervals
            folder = self.engine.path.parent
            return Engine(CascadeSession(self.engine.route, folder, expected=expected, **how), self.engine)
        return Engine(open_engine(self.engine.path, runtime=self.engine.runtime, **how), self.engine)

    def summary(self) -> list[str]:
        """What was picked and its numbers, one line each, for people."""
        engine, latency = self.engine, self.latency
        threads = {0: "", 1: "1 thread, "}.get(latency.threads, f"{latency.threads} threads, ")
        accuracy = f"claimed by {engine.accuracy_source}" if engine.claimed else f"on {engine.images} images"
        lines = [
            f"{engine.route} of {engine.family} on {engine.device} ({engine.runtime}, {engine.precision})",
            f"latency  {format_latency(self.latency_ms)} of {format_latency(self.budget_ms)} "
            f"({self.percentile}, batch {latency.batch}, {threads}{latency.hardware}), {origin_of(latency)}",
            f"top-1    {engine.top1:.2f} % {accuracy} of {engine.dataset}",
            f"size     {format_size(engine.size_bytes)}, {format_macs(engine.macs)} MACs",
        ]
        lines += self._escalation()[:1]
        if self.random_weights:
            lines.append("warning  its weights are random: the accuracy means nothing")
        return lines + [f"excluded {clause}" for clause in self.left_out]

    def explain(self) -> list[str]:
        """The summary, and the engines beside the picked one."""
        lines = [*self.summary(), *self._escalation()[1:], f"fitting  {self.fitting} of {self.candidates} engines"]
        if self.runner_up_faster:
            lines.append(f"faster   {self.runner_up_faster}")
        if self.runner_up_slower:
            lines.append(f"slower   {self.runner_up_slower}")
        return lines

    def _escalation(self) -> list[str]:
        """Of a cascade, how often it escalates, and what it would cost if every image did."""
        if self.engine.cascade is None or not isinstance(self.latency, CascadeLatency):
            return []
        seen = self.engine.cascade.heldout
        shares = ", then ".join(
            f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
            for share, (low, high) in zip(seen.escalated, seen.escalated_intervals, strict=True)
        )
        first, *_, last = (format_latency(ms) for ms in self.latency.paths_ms)
        mean = format_latency(self.latency.mean_ms)
        return [
            f"escalates {shares} of the images: {mean} each in the mean, {first} where the first stage answers",
            f"if all did {last} each in the median, {format_latency(self.latency.worst_ms)} in the 99th percentile",
        ]

    def to_json(self) -> dict[str, object]:
        """All of `explain` and more, as JSON types."""

        def runner_up(found: RunnerUp | None) -> dict[str, object] | None:
            return {**vars(found), "engine": found.engine.to_json()} if found else None

        limits = asdict(self.budget)
        limits |= {f"{name}_ms": bound for name, bound in limits.pop("also").items()}
        return {
            "schema_version": 2,
            "engine": self.engine.to_json(),
            "latency": self.latency.to_json(),
            "latency_ms": self.latency_ms,
            "limits": {**limits, "percentile": self.percentile, "batch": self.latency.batch},
            "fitting": self.fitting,
            "candidates": self.candidates,
            "left_out": list(self.left_out),
            "random_weights": self.random_weights,
            "runner_up_faster": runner_up(self.runner_up_faster),
            "runner_up_slower": runner_up(self.runner_up_slower),
        }


def described(engine: EngineRecord) -> str:
    """The route, with runtime and precision unless they are onnxruntime and fp32."""
    plain = (engine.runtime, engine.precision) == ("onnxruntime", "fp32")
    return str(engine.route) if plain else f"{engine.route} ({engine.runtime}, {engine.precision})"

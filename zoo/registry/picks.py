"""What a pick is: its limits, the engine, and the engines beside it. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from klas_zoo.costs.estimates import origin_of
from klas_zoo.errors import KlasZooError, UsageError
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry.records import EngineRecord, Percentile, percentile_ms
from klas_zoo.registry.store import check_file
from klas_zoo.units import format_latency, format_macs, format_size

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picked engine has to keep, each bound included; None means no bound.

    Attributes:
        budget_ms: the longest latency, milliseconds per batch, at `percentile` and `batch`.
        min_accuracy: the lowest top-1, per cent.
        max_size_bytes: the largest file.
    """

    budget_ms: float
    percentile: Percentile
    batch: int
    min_accuracy: float | None = None
    max_size_bytes: int | None = None

    def latency_ms(self, engine: EngineRecord) -> float:
        """The latency that is compared with the budget; endless where it was not measured."""
        latency_ms = engine.latency_ms(self.percentile, self.batch)
        return math.inf if latency_ms is None else latency_ms

    def misses(self, engine: EngineRecord) -> dict[str, float]:
        """By how much, relative to the bound, the engine misses each bound it misses; empty if it fits."""
        bounds = [("latency", self.latency_ms(engine) - self.budget_ms, self.budget_ms)]
        if self.min_accuracy is not None:
            bounds.append(("accuracy", self.min_accuracy - engine.top1, self.min_accuracy))
        if self.max_size_bytes is not None:
            bounds.append(("size", float(engine.size_bytes - self.max_size_bytes), self.max_size_bytes))
        return {name: miss / bound for name, miss, bound in bounds if miss > 0}

    def __str__(self) -> str:
        text = f"within {format_latency(self.budget_ms)} ({self.percentile}, batch {self.batch})"
        if self.min_accuracy is not None:
            text += f", at least {self.min_accuracy:g} % accurate"
        if self.max_size_bytes is not None:
            text += f", at most {format_size(self.max_size_bytes)}"
        return text


@dataclass(frozen=True, kw_only=True)
class RunnerUp:
    """A neighbour of the picked engine; differences are its numbers minus the picked one's.

    Attributes:
        latency_ms: at the pick's percentile and batch size.
        top1_difference: in points of per cent.
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
            f"{self.engine.route}: {format_latency(self.latency_ms)} "
            f"({format_latency(abs(self.latency_difference_ms))} {more}), "
            f"top-1 {self.engine.top1:.2f} % ({self.top1_difference:+.2f} points)"
            f"{'' if self.origin == 'measured' else f', {self.origin}'}"
        )


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The picked engine and why it is this one.

    Attributes:
        latency: the measurement that was compared with the budget, or a prediction that says so.
        fitting: how many of `candidates` registered engines are within every limit.
        runner_up_faster: the most accurate engine that keeps the limits and is faster; None if none is.
        runner_up_slower: the fastest engine that is more accurate and misses nothing but the
            latency budget; None if none is.
    """

    engine: EngineRecord
    latency: LatencyRecord
    limits: Limits
    fitting: int
    candidates: int
    runner_up_faster: RunnerUp | None
    runner_up_slower: RunnerUp | None

    @property
    def latency_ms(self) -> float:
        return percentile_ms(self.latency, self.percentile)

    @property
    def budget_ms(self) -> float:
        return self.limits.budget_ms

    @property
    def percentile(self) -> Percentile:
        return self.limits.percentile

    @property
    def random_weights(self) -> bool:
        """Whether nobody trained the engine, so that its accuracy means nothing."""
        return self.engine.weights == "random"

    def load(self, **session_options: object) -> onnxruntime.InferenceSession:
        """A new session, on the provider and with the threads the latency was measured with.

        Args:
            session_options: attributes of `onnxruntime.SessionOptions` to set, such as
                `intra_op_num_threads=2`; the latency may then be another one.

        Raises:
            DamagedRegistry: the engine's file is missing or is not what was registered.
            UsageError: onnxruntime has no such option, or not with such a value.
            KlasZooError: onnxruntime is missing, or cannot use that provider here.
        """
        check_file(self.engine, content=True)
        try:
            import onnxruntime
        except ImportError as error:
            raise KlasZooError("Loading an engine needs onnxruntime: pip install onnxruntime.") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.latency.threads
        for name, value in session_options.items():
            try:
                setattr(options, name, value)
            except (AttributeError, TypeError) as error:
                raise UsageError(f"onnxruntime.SessionOptions takes no {name}={value!r}.") from error
        provider = self.latency.provider
        # asking for a provider that is not there, onnxruntime warns and quietly runs on the CPU
        if provider in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(self.engine.path, options, providers=[provider])
            if provider in session.get_providers():
                return session
        raise KlasZooError(
            f"The engine {self.engine.route} was measured on {self.engine.device} with {provider}, which "
            f"onnxruntime cannot use here: pick for another device, or install the onnxruntime for this one."
        )

    def summary(self) -> list[str]:
        """What was picked and its numbers, one line each, for people."""
        engine, latency = self.engine, self.latency
        threads = {0: "", 1: "1 thread, "}.get(latency.threads, f"{latency.threads} threads, ")
        lines = [
            f"{engine.route} of {engine.family} on {engine.device} ({engine.runtime}, {engine.precision})",
            f"latency  {format_latency(self.latency_ms)} of {format_latency(self.budget_ms)} "
            f"({self.percentile}, batch {latency.batch}, {threads}{latency.hardware}), {origin_of(latency)}",
            f"top-1    {engine.top1:.2f} % on {engine.images} images of {engine.dataset}",
            f"size     {format_size(engine.size_bytes)}, {format_macs(engine.macs)} MACs",
        ]
        if self.random_weights:
            lines.append("warning  its weights are random: the accuracy means nothing")
        return lines

    def explain(self) -> list[str]:
        """The summary, and what lies beside the picked engine."""
        lines = [*self.summary(), f"fitting  {self.fitting} of {self.candidates} engines"]
        if self.runner_up_faster:
            lines.append(f"faster   {self.runner_up_faster}")
        if self.runner_up_slower:
            lines.append(f"slower   {self.runner_up_slower}")
        return lines

    def to_json(self) -> dict[str, object]:
        """Everything that `explain` says and more, of types that JSON has."""

        def runner_up(found: RunnerUp | None) -> dict[str, object] | None:
            return {**vars(found), "engine": found.engine.to_json()} if found else None

        return {
            "schema_version": 1,
            "engine": self.engine.to_json(),
            "latency": self.latency.to_json(),
            "latency_ms": self.latency_ms,
            "limits": asdict(self.limits),
            "fitting": self.fitting,
            "candidates": self.candidates,
            "random_weights": self.random_weights,
            "runner_up_faster": runner_up(self.runner_up_faster),
            "runner_up_slower": runner_up(self.runner_up_slower),
        }

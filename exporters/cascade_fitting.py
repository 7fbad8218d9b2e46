"""Cascades of a package's ONNX engines: which are worth having, what their paths take here, and whether they compute
what torch computes. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import perf_counter_ns

import numpy as np
import onnx

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.costs import Costs
from klas_zoo.cascades.definition import Cascade, Stage, common_blocks
from klas_zoo.cascades.fitting import FittedCascade, exits_of
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.cascades.records import CascadeFacts, Outcome
from klas_zoo.cascades.search import Found, SearchSettings, search
from klas_zoo.errors import VerificationError
from klas_zoo.exporters.cascade_graphs import NothingShared, cascade_graphs
from klas_zoo.exporters.cascade_runner import CascadeRunner
from klas_zoo.exporters.cascade_session import contents
from klas_zoo.exporters.contract import OpenedEngine
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.graphs import tensors_of
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.onnx_files import count_macs
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade
from klas_zoo.exporters.records import Verification, explain
from klas_zoo.exporters.verification import compare
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.records import CascadeLatency, Conditions
from klas_zoo.profiles.runners import images_of
from klas_zoo.profiles.timing import Method, statistics_of, time_in_turn
from klas_zoo.routes import Route
from klas_zoo.runtimes import open_engine, runtime_named

CASCADE_METHOD = Method(warmup_ms=50, min_runs=100, min_ms=200, max_ms=5_000)
"""What is spent on one path of a cascade; different cascades have many paths in common."""
_AT_ONCE = 8  # engines that are open at once
Batches = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Images (B, C, H, W), float32, and their classes (B,); called once for every few engines."""


def outputs_of(
    package: Package, names: Sequence[str], batches: Batches, *, provider: str, threads: int | None,
    on_images: Callable[[int], None] = lambda count: None,
) -> RouteOutputs:  # fmt: skip
    """What the engines of some routes answer to images.

    Args:
        on_images: called with how many an engine has answered.

    Raises:
        ExportError: an engine does not run here.
    """
    logits: dict[Route, np.ndarray] = {}
    labels = np.empty(0, np.int64)
    for start in range(0, len(names), _AT_ONCE):
        some = [package.route(name) for name in names[start : start + _AT_ONCE]]
        found: dict[Route, list[np.ndarray]] = {one.route: [] for one in some}
        classes: list[np.ndarray] = []
        with ExitStack() as stack:
            opened = [
                stack.enter_context(open_engine(package.engine(one), provider=provider, threads=threads))
                for one in some
            ]
            for images, true in batches():
                classes.append(true)
                for session, answers in zip(opened, found.values(), strict=True):
                    answers.append(session.run(images))
                    on_images(len(images))
        labels = np.concatenate(classes)
        logits |= {route: np.concatenate(answers) for route, answers in found.items()}
    return RouteOutputs(labels=labels, logits=logits)


def find_cascades(package: Package, heldout: RouteOutputs, settings: SearchSettings) -> tuple[Found, Costs]:
    """The cascades of a package's routes that are worth having, and what routes cost in multiply-adds.

    Only what the engines have in common is shared: an anchor may run with other weights than its stitches.

    Raises:
        DataError: there are too few held-out images to fit a threshold; says how many are needed.
    """
    routes = list(heldout.logits)
    engines = {str(route): package.engine(package.route(str(route))).read_bytes() for route in routes}
    suffix: dict[tuple[Route, int], float] = {}
    shared: dict[tuple[Route, Route], int] = {}
    for before in routes:
        for after in routes:
            blocks = 0 if before == after else common_blocks(before, after)
            if not blocks:
                continue
            pair = Cascade(stages=(Stage(route=before, threshold=0.5), Stage(route=after, shared=blocks)))
            try:
                graph = cascade_graphs(pair, engines)[1]
            except NothingShared:
                continue
            if (after, blocks) not in suffix:
                dims = graph.model.graph.input[0].type.tensor_type.shape.dim
                shape = tuple(one.dim_value for one in dims)[1:]
                suffix[after, blocks] = float(count_macs(graph.model, graph.inputs[0], shape))
            shared[before, after] = blocks
    costs = Costs(routes={route: float(package.route(str(route)).macs) for route in routes}, suffix=suffix)
    return search(heldout, costs, lambda a, b: shared.get((a, b), 0), settings), costs


def packaged(
    package: Package, one: FittedCascade, test: Outcome, verification: Verification, *latencies: CascadeLatency
) -> PackagedCascade:
    """A fitted cascade as a package carries it."""
    parameters, size = weights_of(package, one.cascade)
    return PackagedCascade(
        cascade=one.cascade, facts=CascadeFacts(heldout=one.heldout, test=test), macs=round(one.mean_cost),
        worst_macs=round(one.cost.worst), parameters=parameters, size_bytes=size, verification=verification,
        latencies=latencies,
    )  # fmt: skip


def weights_of(package: Package, cascade: Cascade) -> tuple[int, int]:
    """Elements of all weights that the stages read, and bytes of them and of the graphs; each weight counted once."""
    places: dict[str, tuple[int, int]] = {}
    size = inside = 0
    for content in contents(package, cascade).values():
        size += len(content)
        for tensor in tensors_of(onnx.load_model_from_string(content)):
            count = int(np.prod(tensor.dims))
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                places[place.get("offset", "0")] = count, int(place["length"])
            elif tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL):
                inside += count
    return inside + sum(count for count, _ in places.values()), size + sum(length for _, length in places.values())


class PathRunner:
    """One path through a cascade as a `timing.Runner`.

    Args:
        stages: that are executed.
        images: (B, C, H, W), all of which take the path.
    """

    def __init__(self, runner: CascadeRunner, stages: int, images: np.ndarray) -> None:
        self._runner, self._stages, self._images = runner, stages, images

    def run(self) -> None:
        self._runner.path(self._images, self._stages)

    def time(self, count: int) -> tuple[list[float], list[float] | None]:
        times = []
        for _ in range(count):
            before = perf_counter_ns()
            self.run()
            times.append((perf_counter_ns() - before) / 1e6)
        return times, None


_Shape = tuple[int, tuple[tuple[Route, int], ...]]


def _shape(cascade: Cascade, stages: int) -> _Shape:
    """What a path executes, whatever the thresholds: routes, behind how many shared blocks, and what it leaves."""
    done = tuple((one.route, one.shared) for one in cascade.stages[:stages])
    after = cascade.stages[stages] if stages < len(cascade.stages) else None
    return stages, (*done, (after.route, after.shared)) if after is not None and after.shared else done


@dataclass(frozen=True, kw_only=True)
class PathTimes:
    """Milliseconds of every run of each path of some cascades, and the conditions they were timed under."""

    runs: Mapping[Cascade, tuple[np.ndarray, ...]]
    conditions: Conditions

    def latency(self, cascade: Cascade, shares: Sequence[float], device: str) -> CascadeLatency:
        """The mixture of a cascade's paths by the shares of images that take them."""
        paths = self.runs[cascade]
        mixed = MixedLatency.of(paths, shares)
        every = statistics_of(np.concatenate(paths))
        return CascadeLatency(
            **vars(self.conditions), **vars(mixed), device=device, runs=every.runs, min_ms=every.min_ms,
            coefficient_of_variation=every.coefficient_of_variation, origin="measured",
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip


def time_paths(
    package: Package, cascades: Iterable[Cascade], *, device: Device, provider: str, threads: int | None,
    method: Method = CASCADE_METHOD, on_burst: Callable[[int, int], None] = lambda done, total: None,
) -> PathTimes:  # fmt: skip
    """Times every path of some cascades for one image, confidence included; a path that several have is timed once.

    Args:
        on_burst: called with how many bursts of how many are done.

    Raises:
        ExportError: an engine cannot be cut or does not run here.
    """
    cascades = list(cascades)
    image = images_of(1, package.manifest.family.input_shape)
    paths: dict[_Shape, PathRunner] = {}
    opened: dict[_Shape, CascadeRunner] = {}
    for one in cascades:
        whole = _shape(one, len(one.stages))
        if whole not in opened:
            opened[whole] = CascadeRunner(
                one, contents(package, one), package.folder, provider=provider, threads=threads
            )
        for stages in range(1, len(one.stages) + 1):
            paths.setdefault(_shape(one, stages), PathRunner(opened[whole], stages, image))
    total, done = len(paths) * method.rounds, iter(range(1, 10**9))
    times = time_in_turn(paths, method, on_burst=lambda key: on_burst(next(done), total))
    some = next(iter(opened.values()))
    conditions = Conditions(
        hardware=device.hardware, runtime="onnxruntime", runtime_version=runtime_named("onnxruntime").version(),
        provider=provider, options=some.options, precision=package.manifest.precision, threads=some.threads, batch=1,
        shape=tuple(image.shape), clock="host",
    )  # fmt: skip
    runs = {
        one: tuple(times[_shape(one, stages)].host_ms for stages in range(1, len(one.stages) + 1)) for one in cascades
    }
    return PathTimes(runs=runs, conditions=conditions)


def verify_cascade(package: Package, cascade: Cascade, *, provider: str, threads: int | None) -> Verification:
    """Compares a cascade's answers with torch's, by the references of its package: the same logits by the same exits.

    An exit may be another where torch's confidence lies so near to the threshold that the difference of logits which
    the package's engines are allowed explains it.

    Raises:
        DamagedPackage: the references cannot be read.
        VerificationError: it answers otherwise, or takes other exits.
    """
    stored = package.references()
    logits = {route: stored.logits[str(route)] for route in cascade.routes}
    runner = CascadeRunner(
        cascade, contents(package, cascade), package.folder, provider=provider, threads=threads
    )
    answers, exits = runner.run(stored.images)
    runner.close()
    wanted = exits_of(cascade, logits)
    known = [package.route(str(route)).verification for route in cascade.routes]
    tolerance = max((one.tolerance for one in known if one is not None), default=0.0)
    for image in np.flatnonzero(exits != wanted):
        stage = cascade.stages[min(exits[image], wanted[image])]
        sure = confidence(logits[stage.route][image : image + 1], cascade.measure, stage.temperature)[0]
        # no measure of confidence changes by more than the largest change of a logit over the temperature
        if abs(sure - (stage.threshold or 0.0)) > tolerance / stage.temperature:
            raise VerificationError(
                f"The cascade {cascade} takes another exit than torch on image {image} of the references: torch's "
                f"confidence behind {stage.route} is {sure:.4f}."
            )
    expected = np.stack([logits[route] for route in cascade.routes])[exits, np.arange(len(exits))]
    limits = replace(limits_for(package.manifest.precision, package.manifest.family.weights), tolerance=tolerance)
    reference = ReferenceLogits.of_arrays(np.arange(len(exits)), {str(cascade): expected})
    found = compare(str(cascade), OpenedEngine(outputs=lambda some: answers[some.astype(int)]), reference, limits)
    if not found.passed:
        raise VerificationError(f"The cascade {cascade} was refused. {explain(found)}")
    return found

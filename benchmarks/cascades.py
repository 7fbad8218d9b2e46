"""Do cascades that share their prefix pay? Accuracy over mean and over worst multiply-adds, on deit-micro.

    python benchmarks/cascades.py --data data/cifar10                  # half an hour on one core, less with --cache
    python benchmarks/cascades.py                                      # the 1,000 embedded test images, no download
    python benchmarks/cascades.py --latency 5000                       # measured latencies

Temperatures and thresholds are fitted, and cascades chosen, on images that no network has learned from and that are not
test images: three quarters of the 4,000 embedded training images, drawn anew for each seed. Everything reported is
measured on test images, of which none decides anything. Compared are, each by its frontier on held-out images:

    static             the routes of the supernet that ships
    plain anchors as they came    cascades of two anchors that were not tuned together with the others
    plain anchors      cascades of two anchors
    plain              cascades of two routes that start anew
    plain triples of anchors
    shared             cascades of two routes whose second stage continues
    all                pairs and triples, sharing what they can

and those with `worst` behind their name are the frontier over the worst cost. `shared` and `all` run small and base
with their tuned weights, which stitches share; the other sets as shipped. One pass over
the images gives the logits of all routes; everything else is computed from them.

`--latency N` exports the routes of three cascades with their tuned weights, times every path on test images, and then
sends others one at a time, N in all, over again where there are fewer, through each cascade and through base in turns:
what was predicted beside what a caller waits. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import record

from klas_zoo.cascades.costs import Costs, costs_of
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.execution import route_outputs, shared_blocks
from klas_zoo.cascades.fitting import (
    FittedCascade,
    Outcome,
    calibrations,
    outcome,
    outcome_of,
    temperatures_of,
)
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.cascades.search import SearchSettings, search
from klas_zoo.data.loading import Split, batches
from klas_zoo.data.sources import open_images
from klas_zoo.exporters.cascade_runner import CascadeRunner
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.exporters.weights import WeightsFile, write_graph
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import find_family
from klas_zoo.frontier import area, frontier
from klas_zoo.profiles.macs import prefix_costs, route_costs
from klas_zoo.routes import Route
from klas_zoo.runtimes import open_engine
from klas_zoo.runtimes.ort import WEIGHTS_FOLDER, OnnxGraph
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.shipped import ShippedSupernet

SHARE_FITTED = 0.75
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The family as it ships, with the tuned weights of all anchors, and its anchors as they came; logits of each."""

    costs: Costs
    heldout: dict[str, RouteOutputs]
    test: dict[str, RouteOutputs]
    shared: dict[str, Callable[[Route, Route], int]]

    @property
    def anchors(self) -> list[Route]:
        return [route for route in self.costs.routes if route.is_anchor]


def open_bench(data: Path | None, cache: Path | None) -> Bench:
    from timm.data import create_transform

    spec = find_family("deit-micro")
    family = load_family(spec)
    assert family.supernet is not None
    shipped = ShippedSupernet.read(family.supernet)
    nets = {"shipped": shipped.load(family.chains, family.anchor_fingerprints)}
    nets["tuned"] = shipped.load(family.chains, family.anchor_fingerprints)
    nets["tuned"].originals.clear()
    nets["as they came"] = Supernet(family.chains, [route for route in shipped.routes if route.is_anchor]).eval()
    plain = create_transform(**family.data_config, is_training=False)
    sample = open_images(None, spec.sample)
    test = sample.test if data is None else open_images(data, None).test
    splits = {
        "heldout": Split(sample.train, range(len(sample.train.labels)), plain),
        "test": Split(test, range(len(test.labels)), plain),
    }
    found = {
        kind: {name: outputs_of(net, split, name, cache / f"{kind}-{len(split)}" if cache else None)
               for name, net in nets.items()}
        for kind, split in splits.items()
    }  # fmt: skip
    return Bench(
        costs=costs_of(shipped.routes, macs_of(route_costs(family)), prefix_costs(family)), **found,
        shared={name: sharing(net) for name, net in nets.items()},
    )  # fmt: skip


def macs_of(cost: Callable[[Route], Any]) -> Callable[[Route], float]:
    return lambda route: float(cost(route).macs)


def sharing(net: Supernet) -> Callable[[Route, Route], int]:
    return lambda before, after: shared_blocks(net, before, after)


def outputs_of(
    net: Supernet, split: Split, name: str, cache: Path | None, routes: Iterable[Route] | None = None
) -> RouteOutputs:
    """Logits of all routes, or of some, from a file if they were computed before."""
    by_name = {str(route): route for route in routes or net.routes}
    file = cache.with_name(f"{cache.name}-{name}.npz") if cache else None
    if file and file.exists():
        with np.load(file) as found:
            if by_name.keys() <= set(found.files):  # else of other cascades
                return RouteOutputs(labels=found["labels"], logits={by_name[k]: found[k] for k in by_name})
    outputs = route_outputs(net, list(by_name.values()), batches(split, 100))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, labels=outputs.labels, **{str(route): one for route, one in outputs.logits.items()})
    return outputs


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cascade or a static route, judged on test images."""

    name: str
    mean: float
    worst: float
    heldout_top1: float
    seen: Outcome

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "mean_macs": round(self.mean), "worst_macs": round(self.worst),
            "heldout_top1": self.heldout_top1, "top1": self.seen.top1, "top1_interval": self.seen.top1_interval,
            "escalated": self.seen.escalated,
        }  # fmt: skip


def run_seed(bench: Bench, seed: int) -> dict[str, list[Row]]:
    count = len(bench.heldout["shipped"])
    numbers = np.sort(np.random.default_rng(seed).permutation(count)[: round(SHARE_FITTED * count)])
    fitted = {name: outputs.some(numbers) for name, outputs in bench.heldout.items()}

    def searched(
        name: str, routes: Sequence[Route], shares: bool, triples: bool, only_shared: bool = False
    ) -> list[list[Row]]:
        heldout = RouteOutputs(labels=fitted[name].labels, logits={r: fitted[name].logits[r] for r in routes})
        sharing = bench.shared[name] if shares else lambda before, after: 0
        found = search(heldout, bench.costs, sharing, SearchSettings(triples=triples, continuing=only_shared))
        return [[row_of(bench, name, one) for one in side] for side in (found.by_mean, found.by_worst)]

    everything = list(bench.costs.routes)
    shared = searched("tuned", everything, True, False, only_shared=True)
    mixed = searched("tuned", everything, True, True)
    return {
        "static": statics(bench, fitted["shipped"]),
        "plain anchors as they came": searched("as they came", bench.anchors, False, False)[0],
        "plain anchors": searched("shipped", bench.anchors, False, False)[0],
        "plain": searched("shipped", everything, False, False)[0],
        "plain triples of anchors": searched("shipped", bench.anchors, False, True)[0],
        "shared": shared[0],
        "shared worst": shared[1],
        "all": mixed[0],
        "all worst": mixed[1],
        "plain worst": searched("shipped", everything, False, True)[1],
    }


def row_of(bench: Bench, name: str, one: FittedCascade) -> Row:
    seen = outcome(one.cascade, bench.test[name])
    return Row(
        name=str(one.cascade), mean=one.cost.mean(seen.shares), worst=one.cost.worst, heldout_top1=one.heldout.top1,
        seen=seen,
    )  # fmt: skip


def statics(bench: Bench, heldout: RouteOutputs) -> list[Row]:
    """The frontier of static routes, by held-out images."""
    kept = frontier(list(heldout.logits), bench.costs.routes.__getitem__, heldout.top1)
    test = bench.test["shipped"]
    return [
        Row(
            name=str(route), mean=bench.costs.routes[route], worst=bench.costs.routes[route],
            heldout_top1=heldout.top1(route), seen=static_outcome(test, route),
        )
        for route in kept
    ]  # fmt: skip


def static_outcome(test: RouteOutputs, route: Route) -> Outcome:
    right = int((test.logits[route].argmax(1) == test.labels).sum())
    return outcome_of(np.zeros(len(test), dtype=np.int64), right, 1)


def area_of(bench: Bench, rows: Sequence[Row], cost: Callable[[Row], float]) -> float:
    anchors = sorted(bench.anchors, key=bench.costs.routes.__getitem__)
    ends = [(bench.costs.routes[r], bench.test["shipped"].top1(r)) for r in (anchors[0], anchors[-1])]
    return area([(cost(row), row.seen.top1) for row in rows], *ends)


def figures(bench: Bench, seeds: Sequence[dict[str, list[Row]]]) -> dict[str, Any]:
    """What the issue of shared prefixes turns on: cost at nearly the largest anchor's accuracy, and the worst case."""
    base = max(bench.anchors, key=bench.costs.routes.__getitem__)
    top1, macs = bench.test["shipped"].top1(base), bench.costs.routes[base]

    def cheapest(rows: Sequence[Row], most_worst: float) -> dict[str, Any] | None:
        # chosen by held-out accuracy; `within` says how far it is on test images
        good = [row for row in rows if row.worst <= most_worst * macs]
        near = [row for row in good if row.heldout_top1 >= bench.heldout["shipped"].top1(base) - 0.3]
        pool = min(near, key=lambda row: row.mean, default=None)
        pool = pool or max(good, key=lambda row: row.heldout_top1, default=None)
        if pool is None:
            return None
        return {
            "name": pool.name, "mean_over_base": pool.mean / macs, "worst_over_base": pool.worst / macs,
            "points_below_base": top1 - pool.seen.top1,
        }  # fmt: skip

    return {
        f"{name}, {limit}": [cheapest(found[name], most) for found in seeds]
        for name in seeds[0]
        for limit, most in (("any worst case", float("inf")), ("worst case up to 1.1 of base", 1.1))
    }


def print_table(bench: Bench, seeds: Sequence[dict[str, list[Row]]]) -> dict[str, Any]:
    table = {}
    for name in seeds[0]:
        means = [area_of(bench, found[name], lambda row: row.mean) for found in seeds]
        worsts = [area_of(bench, found[name], lambda row: row.worst) for found in seeds]
        table[name] = {"area_over_mean": means, "area_over_worst": worsts}
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        worst_spread = statistics.stdev(worsts) if len(worsts) > 1 else 0.0
        print(
            f"{name:26} area over mean MACs {statistics.mean(means):.3f} ± {spread:.3f}, "
            f"over worst MACs {statistics.mean(worsts):.3f} ± {worst_spread:.3f}"
        )
    return table


def plot(bench: Bench, found: dict[str, list[Row]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for side, cost, title in ((0, "mean", "mean over test images"), (1, "worst", "every stage executed")):
        for name, rows in found.items():
            if name.endswith("worst") != (side == 1) and name != "static":
                continue
            points = frontier(rows, lambda row, cost=cost: getattr(row, cost), lambda row: row.seen.top1)
            axes[side].plot(
                [getattr(row, cost) / 1e6 for row in points], [row.seen.top1 for row in points],
                marker=".", drawstyle="steps-post", label=name,
            )  # fmt: skip
        axes[side].plot(
            [bench.costs.routes[r] / 1e6 for r in bench.anchors],
            [bench.test["shipped"].top1(r) for r in bench.anchors],
            "k*", label="anchors",
        )  # fmt: skip
        axes[side].set_xlabel(f"million multiply-adds, {title}")
        axes[side].legend(fontsize=8)
    axes[0].set_ylabel("top-1, %")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="CIFAR-10, see prepare_cifar10.py; default: the embedded test images")
    parser.add_argument("--cache", type=Path, help="keep logits in this folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latency", type=int, metavar="N", help="measure latencies on N images instead")
    arguments = parser.parse_args()
    if arguments.latency:
        found = measure_latencies(arguments.data, arguments.cache, arguments.latency)
        record.write_part("cascades", "latency", found)
        return
    bench = open_bench(arguments.data, arguments.cache)
    seeds = [run_seed(bench, seed) for seed in arguments.seeds]
    areas = print_table(bench, seeds)
    summary = figures(bench, seeds)
    for name, found in summary.items():
        print(name, *(f"\n   {one}" for one in found))
    record.write_part(
        "cascades", "accuracy over MACs",
        {
            "test_images": len(bench.test["shipped"]), "heldout_images": len(bench.heldout["shipped"]),
            "share_fitted": SHARE_FITTED, "seeds": arguments.seeds, "areas": areas, "summary": summary,
            "calibration": calibration_of(bench),
            "rows": {n: [row.to_json() for row in rows] for n, rows in seeds[0].items()},
            "anchors": {str(r): [bench.costs.routes[r], bench.test["shipped"].top1(r)] for r in bench.anchors},
        },
    )  # fmt: skip
    plot(bench, seeds[0], record.RESULTS / "cascades.png")


CASCADES = {
    "plain": "small ?p<0.94 | base",
    "shared": "small ?p<0.93 -> small.1-3+base.4-8",
    "triple": "tiny ?p<0.98 | small ?p<0.9 | base",
}
"""That latencies are measured of, with temperatures fitted as everywhere."""


def measure_latencies(data: Path | None, cache: Path | None, count: int) -> dict[str, Any]:
    """Predicted and measured latencies of cascades of the tuned supernet, one image at a time and one thread."""
    with tempfile.TemporaryDirectory() as folder:
        few, images, test, heldout, net = stream_of(data, cache, count)
        by_name = {str(route): route for route in net.routes}
        fitted = temperatures_of(heldout)
        cascades = {name: with_temperatures(fitted, text, by_name) for name, text in CASCADES.items()}
        engines = export(net, {r for one in cascades.values() for r in one.routes}, Path(folder))
        runners = {name: CascadeRunner(one, engines, Path(folder), threads=1) for name, one in cascades.items()}
        base = open_engine(engines["base"], threads=1, options={WEIGHTS_FOLDER: folder})
        paths = {(name, k + 1): (lambda image, r=r, k=k: r.path(image, k + 1))
                 for name, r in runners.items() for k in range(len(r.cascade.stages))}  # fmt: skip
        paths["base", 1] = base.run
        timed = {key: [] for key in paths}
        for image in few:  # on other images than are streamed below
            for key, call in paths.items():
                timed[key].append(took_ms(call, image))
        streams: dict[str, list[float]] = {name: [] for name in (*runners, "base")}
        for image in images:  # in turns, so that whatever else runs hits all alike
            for name, runner in runners.items():
                streams[name].append(took_ms(runner.run, image))
            streams["base"].append(took_ms(base.run, image))
        escalated = {name: runner.counters().escalated for name, runner in runners.items()}
        overheads = {name: overheads_ms(runner, images[:1_000]) for name, runner in runners.items()}
    mean_base = statistics.mean(streams["base"])
    found: dict[str, Any] = {"images": len(images), "base_mean_ms": mean_base,
                             "base_p50_ms": statistics.median(streams["base"])}  # fmt: skip
    for name, runner in runners.items():
        seen = outcome(runner.cascade, heldout)
        expected = MixedLatency.of([np.asarray(timed[name, k + 1]) for k in range(len(seen.shares))], seen.shares)
        stream = np.asarray(streams[name])
        found[name] = {
            "cascade": str(runner.cascade), "escalated_heldout": seen.escalated,
            "escalated": escalated[name], "top1": outcome(runner.cascade, test).top1,
            "mean_ms": float(stream.mean()), "predicted_mean_ms": expected.mean_ms,
            "p99_ms": float(np.percentile(stream, 99)), "predicted_p99_ms": expected.p99_ms,
            "mean_over_base": float(stream.mean()) / mean_base,
            "worst_over_base": expected.paths_ms[-1] / statistics.median(timed["base", 1]),
            "overhead_ms": statistics.median(overheads[name]),
            "overhead_p99_ms": float(np.percentile(overheads[name], 99)),
        }  # fmt: skip
        print(name, *(f"{key} {value}" for key, value in found[name].items()), sep="\n   ")
    return found


def stream_of(
    data: Path | None, cache: Path | None, count: int
) -> tuple[list[np.ndarray], list[np.ndarray], RouteOutputs, RouteOutputs, Supernet]:
    """Test images to time paths on, a third of them, and `count` others, (1, 3, 32, 32) each; logits of the routes
    of `CASCADES` on test and on 1,000 held-out images; and the supernet of tuned weights.
    """
    from timm.data import create_transform

    spec = find_family("deit-micro")
    family = load_family(spec)
    assert family.supernet is not None
    net = ShippedSupernet.read(family.supernet).load(family.chains, family.anchor_fingerprints)
    net.originals.clear()
    by_name = {str(route): route for route in net.routes}
    used = {r for text in CASCADES.values() for r in Cascade.parse(text, by_name.__getitem__).routes}
    plain = create_transform(**family.data_config)
    sample = open_images(None, spec.sample)
    opened = sample.test if data is None else open_images(data, None).test
    test, heldout = (Split(one, range(len(one.labels)), plain) for one in (opened, sample.train))
    heldout = heldout.spread(1_000)
    single = [images.numpy() for images, _ in batches(test.spread(count + 1000), 1)]
    others = single[len(single) // 3 :]
    stream = [others[number % len(others)] for number in range(count)]
    seen = [
        outputs_of(net, split, "latency", cache / f"{kind}-{len(split)}" if cache else None, used)
        for kind, split in (("test", test), ("heldout", heldout))
    ]
    return single[: len(single) // 3], stream, seen[0], seen[1], net


def with_temperatures(fitted: Mapping[Route, float], text: str, routes: dict[str, Route]) -> Cascade:
    found = Cascade.parse(text, routes.__getitem__)
    return replace(found, stages=tuple(replace(one, temperature=fitted[one.route]) for one in found.stages))


def export(net: Supernet, routes: set[Route], folder: Path) -> dict[str, bytes]:
    exporter = RouteExporter(net, (3, 32, 32), routes=routes)
    with WeightsFile(folder / "weights.bin") as weights:
        for route in routes:
            write_graph(exporter.model(route), folder / f"{route}.onnx", weights, {})
    return {str(route): (folder / f"{route}.onnx").read_bytes() for route in routes}


def took_ms(call: Callable[[np.ndarray], Any], image: np.ndarray) -> float:
    before = time.perf_counter_ns()
    call(image)
    return (time.perf_counter_ns() - before) / 1e6


class TimedGraph:
    """A graph of a cascade that adds up how long its runs take."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph, self.ms = graph, 0.0

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        before = time.perf_counter_ns()
        found = self._graph.run(inputs)
        self.ms += (time.perf_counter_ns() - before) / 1e6
        return found


def overheads_ms(runner: CascadeRunner, images: list[np.ndarray]) -> list[float]:
    """Milliseconds of each call beyond the runs of its graphs, which are timed in the same call."""
    graphs = runner._graphs
    timed = [TimedGraph(graph) for graph in graphs]
    runner._graphs = timed  # type: ignore[assignment]
    found = []
    for image in images:
        for graph in timed:
            graph.ms = 0.0
        took = took_ms(runner.run, image)
        found.append(took - sum(graph.ms for graph in timed))
    runner._graphs = graphs
    return found


def calibration_of(bench: Bench) -> dict[str, dict[str, float]]:
    """Of all routes, with their expected calibration errors on test images."""
    found = calibrations(temperatures_of(bench.heldout["shipped"]), bench.test["shipped"])
    return {str(route): vars(one) for route, one in found.items()}


if __name__ == "__main__":
    main()

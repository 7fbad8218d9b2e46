"""Plain networks against stitches: where is a stitch worth it?

    python benchmarks/against_timm.py published             # from published tables, in seconds
    python benchmarks/against_timm.py measured [--rounds 5] # latencies of this machine, half an hour

`published` sets SN-Net's own results (data/snnet_points.csv) beside timm's (data/timm_results.csv). A
stitch's latency is interpolated over multiply-adds between the anchors of its family, which timm measured
with the same program as the plain networks. A stitch is dominated where a plain network is at least as
fast and at least as accurate; its margin is how much more accurate the best such network is, in points
(negative: how far it is ahead of all).

`measured` times 20 plain networks, and the anchors and ten stitches of four families, in one run with
onnxruntime on one thread, weights at random, accuracies as published. All engines take turns, each opened
anew in every round. On a machine that others use the thread's processor time is compared; it and the
load are in the record.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import timm
from record import write_part

from klas_zoo.chains import Chain
from klas_zoo.exporters.to_onnx import RouteExporter, export
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec, find_family
from klas_zoo.profiles.macs import route_costs
from klas_zoo.routes import Route
from klas_zoo.selection.snnet import window_seams
from klas_zoo.supernet import Supernet

DATA = Path(__file__).parent / "data"
ANCHORS = {
    "deit": ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
    "swin": ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
    "levit": ("levit_192", "levit_256"),
    "resnet": ("resnet18", "resnet50"),
    "resnet-swin": ("resnet18", "swin_tiny_patch4_window7_224"),
}
MEASURED = {"deit": ("tiny", "small", "base"), "levit": ("levit192", "levit256"), "resnet": (), "resnet-swin": ()}
PLAIN = (
    "levit_128s.fb_dist_in1k", "levit_128.fb_dist_in1k", "levit_384.fb_dist_in1k",
    "mobilenetv4_conv_small.e2400_r224_in1k", "mobilenetv4_conv_medium.e500_r224_in1k",
    "mobilenetv3_large_100.ra4_e3600_r224_in1k", "efficientnet_b0.ra4_e3600_r224_in1k",
    "repvit_m0_9.dist_450e_in1k", "repvit_m1_1.dist_450e_in1k", "repvit_m1_5.dist_450e_in1k",
    "efficientvit_b1.r224_in1k", "efficientvit_b2.r224_in1k", "efficientvit_b3.r224_in1k",
    "tiny_vit_5m_224.dist_in22k_ft_in1k", "tiny_vit_11m_224.dist_in22k_ft_in1k", "tiny_vit_21m_224.dist_in22k_ft_in1k",
    "caformer_s18.sail_in1k", "convnext_tiny.fb_in1k", "resnet50.a1_in1k", "efficientvit_l1.r224_in1k",
)  # fmt: skip
OTHER_DATA = re.compile(r"in2[12]k|in12k|laion|openai|lvd|ssl|ig|jft|webli|dfn|m38m|datacomp|ns_|_ns|pt")


class Point(NamedTuple):
    """A network or a stitch: latency in ms (or any other unit, the same for all), ImageNet-1k top-1 in per cent."""

    name: str
    latency: float
    top1: float


@dataclass(frozen=True)
class Verdict:
    """How the stitches of a family stand against plain networks.

    Attributes:
        margins: points by which the best plain network that is at least as fast is ahead, by stitch.
    """

    margins: dict[str, float]

    @property
    def dominated(self) -> int:
        return sum(margin >= 0 for margin in self.margins.values())

    def to_json(self) -> dict[str, Any]:
        found = sorted(self.margins.values())
        return {
            "stitches": len(found),
            "dominated": self.dominated,
            "median_margin": round(median(found), 2),
            "smallest_margin": round(found[0], 2),
            "largest_margin": round(found[-1], 2),
            "margins": {name: round(margin, 2) for name, margin in self.margins.items()},
        }


def judge(stitches: Iterable[Point], plain: Sequence[Point]) -> Verdict:
    """Each stitch against the most accurate plain network that is at least as fast; none as fast: no verdict."""
    margins = {}
    for one in stitches:
        faster = [other.top1 for other in plain if other.latency <= one.latency]
        if faster:
            margins[one.name] = max(faster) - one.top1
    return Verdict(margins)


def interpolated(macs: float, anchors: Sequence[tuple[float, float]]) -> float:
    """Latency at `macs` on the straight lines between anchors (macs, latency), and beyond the last on its line."""
    return float(
        np.interp(macs, *zip(*anchors, strict=True))
        if macs <= anchors[-1][0]
        else anchors[-1][1] * macs / anchors[-1][0]
    )


def read(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def published() -> dict[str, Any]:
    """By device, set of plain networks and family: how many stitches are dominated and by how much."""
    networks, stitches = read("timm_results.csv"), read("snnet_points.csv")
    found: dict[str, Any] = {}
    for device in ("i7_12700h_ms", "rtx4090_images_s"):
        everything = [p for row in networks if (p := _plain(row, device)) is not None]
        sets = {
            "any weights": everything,
            "trained on ImageNet-1k alone": [p for p in everything if not OTHER_DATA.search(p.name.partition(".")[2])],
        }
        by_name = {p.name.partition(".")[0]: p.latency for p in everything if p.name.endswith("@224")}
        for family, names in ANCHORS.items():
            rows = [row for row in stitches if row["family"] == family]
            anchors = [(float(row["macs"]), by_name[name]) for row, name in zip(rows, names, strict=False)]
            points = [
                Point(row["configuration"], interpolated(float(row["macs"]), anchors), float(row["top1"]))
                for row in rows[len(names) :]
            ]
            for kind, plain in sets.items():
                found.setdefault(device, {}).setdefault(kind, {})[family] = judge(points, plain).to_json()
    return found


def _plain(row: dict[str, str], device: str) -> Point | None:
    """A row of timm's table; of a GPU the time of one image, at the batch where it was fastest."""
    if not row[device]:
        return None
    latency = float(row[device]) if device.endswith("_ms") else 1000 / float(row[device])
    return Point(f"{row['model']}@{row['img_size']}", latency, float(row["top1"]))


def measured(rounds: int, runs: int) -> dict[str, Any]:
    """Latencies of this machine and the verdicts that follow."""
    with tempfile.TemporaryDirectory() as folder:
        files, top1 = _engines(Path(folder))
        loads = [os.getloadavg()[0]]
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
        for number in range(rounds):
            for name, file in files.items():
                timings[name].append(_time(file, runs))
            loads.append(os.getloadavg()[0])
            print(f"round {number + 1} of {rounds}, load {loads[-1]:.1f}", flush=True)
    engines = {
        name: {
            "cpu_ms": round(min(one[1] for one in each), 3),
            "wall_ms": round(min(one[0] for one in each), 3),
            "spread": round(max(one[1] for one in each) / min(one[1] for one in each) - 1, 3),
            "top1": top1[name],
        }
        for name, each in timings.items()
    }
    settings = {"load": [round(one, 1) for one in loads], "rounds": rounds, "runs": runs, "threads": 1, "batch": 1}
    return {"engines": engines, "verdicts": verdicts(engines), **settings}


def verdicts(engines: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """How stitches stand against the plain networks and the anchors, as SN-Net tuned them and as timm has them."""
    points = {name: Point(name, one["cpu_ms"], one["top1"]) for name, one in engines.items()}
    plain = [point for name, point in points.items() if "+" not in name]
    best: dict[str, float] = {}
    for row in read("timm_results.csv"):
        if row["img_size"] == "224":
            name = row["model"].partition(".")[0]
            best[name] = max(best.get(name, 0), float(row["top1"]))
    found = {}
    for family in MEASURED:
        own = [point for name, point in points.items() if name.startswith(f"{family}:")]
        anchors = [point for point in own if "+" not in point.name]
        plain += [point._replace(top1=best[name]) for point, name in zip(anchors, ANCHORS[family], strict=True)]
    for family in MEASURED:
        stitches = [one for name, one in points.items() if name.startswith(f"{family}:") and "+" in name]
        found[family] = judge(stitches, plain).to_json()
    return found


def _engines(folder: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """ONNX files of all engines, and their published top-1. Stitches are called family:route."""
    table = {(row["model"], row["img_size"]): float(row["top1"]) for row in read("timm_results.csv")}
    files: dict[str, Path] = {}
    top1: dict[str, float] = {}
    for name in PLAIN:
        model = timm.create_model(name.partition(".")[0]).eval()
        files[name] = folder / f"{name}.onnx"
        export(Chain.of(model, (3, 224, 224)), (3, 224, 224), files[name], metadata={})
        top1[name] = table[name, "224"]
        print("exported", name, flush=True)
    for family, names in MEASURED.items():
        loaded = load_family(_only(find_family(family), names), random_weights=True)
        routes = _routes(loaded)
        count = len(loaded.chains)
        chosen = [routes[k] for k in (*range(count), *_spread(range(count, len(routes)), 10))]
        net = Supernet(loaded.chains, [route for route, _ in chosen]).eval()
        exporter = RouteExporter(net, loaded.input_shape)
        for number, (route, accuracy) in enumerate(chosen):
            name = f"{family}:{route}"
            files[name], top1[name] = folder / f"{family}-{number}.onnx", accuracy
            exporter.export(route, files[name], metadata={})
        print("exported", family, len(chosen), flush=True)
        del net, exporter, loaded
        gc.collect()
    return files, top1


def _only(spec: FamilySpec, names: Sequence[str]) -> FamilySpec:
    """The anchors SN-Net published, of a family that has more."""
    return replace(spec, anchors=tuple(one for one in spec.anchors if one.name in names)) if names else spec


def _routes(family: Family) -> list[tuple[Route, float]]:
    """Anchors and SN-Net's stitches with their published top-1, which is found by their multiply-adds."""
    chains, cost = family.chains, route_costs(family)
    routes = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    for source, target in pairwise(chains):
        for i, j in window_seams(chains[source], chains[target]):
            routes.append(Route.stitch(source, i, target, j, chains[target].depth))
    rows = [
        (float(row["macs"]), float(row["top1"])) for row in read("snnet_points.csv") if row["family"] == family.name
    ]
    found = []
    for route in routes:
        macs = cost(route).macs
        published, top1 = min(rows, key=lambda row: abs(row[0] - macs))
        assert abs(published / macs - 1) < 1e-3, f"{route}: {macs} MACs, nearest published {published}"
        found.append((route, top1))
    return found


def _spread(of: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, evenly."""
    return [of[round(k)] for k in np.linspace(0, len(of) - 1, min(count, len(of)))]


def _time(file: Path, runs: int) -> tuple[float, float]:
    """Wall time and processor time of one inference on one thread, ms: the fastest of `runs`, after a warm-up."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = {session.get_inputs()[0].name: np.zeros((1, 3, 224, 224), np.float32)}
    session.run(None, images)
    wall, cpu = [], []
    for _ in range(runs):
        started = time.perf_counter(), time.thread_time()
        session.run(None, images)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.thread_time() - started[1])
    return 1000 * min(wall), 1000 * min(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("published", "measured"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=10)
    given = parser.parse_args()
    if given.part == "published":
        found = published()
        for device, sets in found.items():
            for kind, families in sets.items():
                for family, one in families.items():
                    print(
                        f"{device:18} {kind:29} {family:12} {one['dominated']:3} of {one['stitches']:3} "
                        f"dominated, margin {one['median_margin']:+.2f} "
                        f"({one['smallest_margin']:+.2f} … {one['largest_margin']:+.2f})"
                    )
    else:
        found = measured(given.rounds, given.runs)
        for name, one in found["engines"].items():
            print(f"{name:50} {one['cpu_ms']:8.2f} ms {one['top1']:.2f} %")
        for family, one in found["verdicts"].items():
            print(family, one["dominated"], "of", one["stitches"], "dominated, margin", one["median_margin"])
    print(write_part("against_timm", given.part, found))


if __name__ == "__main__":
    main()

"""The roofline of onnxruntime fitted to what was measured on a GPU, and how far it is off networks it has not seen.

    python benchmarks/gpu/calibrate.py [--write]

Reads results/gpu/*.json. Fitted are medians of whole runs by the host, images and logits in its memory: shares
of the card's peak and bandwidth, the least an operator takes, and the rate at which images are copied to the card.
Each network (an anchor, or a stitch of another family) is predicted from a fit to the others. `--write` changes the
runtime's entry in profiles/calibration.json; the other runtimes' come from benchmarks/public_figures.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import find_family
from klas_zoo.profiles import roofline
from klas_zoo.profiles.catalog import BYTES_OF, catalog
from klas_zoo.profiles.interpolation import summarise
from klas_zoo.profiles.shapes import Counted, count
from klas_zoo.routes import Route

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
PROFILED = "deit"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured median, and what the network does: (operators, 3) multiply-adds, activations and weights."""

    card: str
    network: str
    precision: str
    batch: int
    host_ms: float
    operators: np.ndarray
    image_numbers: int


def read(card: str) -> list[Figure]:
    """The figures of onnxruntime without CUDA graphs, as the package predicts it."""
    table = json.loads((RESULTS / f"{card}.json").read_text())["latency"]
    counted: dict[str, tuple[Family, Counted]] = {}
    found = []
    for key, row in table["onnxruntime"].items():
        _, label, precision, anchor = key.split()
        if label == "plain":
            found += _figures(card, PROFILED, anchor, precision, row, counted)
    for key, row in table["families"].items():
        family, precision, route = key.split()
        found += _figures(card, family, route, precision, row, counted)
    return found


def _figures(
    card: str, name: str, route: str, precision: str, row: dict[str, Any], counted: dict[str, tuple[Family, Counted]]
) -> list[Figure]:
    if name not in counted:
        family = load_family(find_family(name), random_weights=True)
        counted[name] = family, count(family.chains, family.input_shape)
    family, costs = counted[name]
    operators = _operators(family, costs, route)
    size = int(np.prod(family.input_shape))
    return [
        Figure(card=card, network=f"{name} {route}", precision=precision, batch=int(batch), host_ms=one["host_p50_ms"],
               operators=operators, image_numbers=size)
        for batch, one in row.items()
        if isinstance(one, dict)
    ]  # fmt: skip


def _operators(family: Family, counted: Counted, name: str) -> np.ndarray:
    route = Route.anchor(name, family.chains[name].depth) if name in family.chains else _route(name)
    parts = counted.traffic[route.segments[0].anchor].parts[:1]
    for segment in route.segments:
        parts = (*parts, *counted.traffic[segment.anchor].parts[segment.first : segment.last + 1])
    parts = (*parts, counted.traffic[route.segments[-1].anchor].parts[-1])
    rows = [(one.macs, one.activations, one.weights) for part in parts for one in part.operations]
    return np.array(rows, float)


def _route(name: str) -> Route:
    """`small.1-15+base.14-36`."""
    segments = [re.fullmatch(r"(.+)\.(\d+)-(\d+)", one) for one in name.split("+")]
    return Route.from_json([[one[1], int(one[2]), int(one[3])] for one in segments if one])


def predict_ms(one: Figure, shares: Sequence[float]) -> float:
    """By (share of the peak, share of the bandwidth, least microseconds of an operator, GB/s of copies)."""
    compute, memory, kernel_us, copy_gb_s = shares
    spec = catalog()[one.card]
    peak, bandwidth = spec.peak_tflops[one.precision] * 1e12, (spec.bandwidth_gb_s or 0) * 1e9
    macs, activations, weights = one.operators.T
    arithmetic = 2 * one.batch * macs / (peak * compute)
    transport = BYTES_OF[one.precision] * (one.batch * activations + weights) / (bandwidth * memory)
    device_s = np.maximum(np.maximum(arithmetic, transport), kernel_us * 1e-6).sum()
    return 1e3 * float(device_s + 4 * one.batch * one.image_numbers / (copy_gb_s * 1e9))


def fit(figures: Sequence[Figure]) -> tuple[float, ...]:
    """The shares with the smallest mean logarithmic error: coordinate by coordinate, in ever smaller steps."""

    def off(shares: Sequence[float]) -> float:
        return float(np.mean([abs(np.log(predict_ms(one, shares) / one.host_ms)) for one in figures]))

    best, step = (0.5, 0.6, 10.0, 9.0), 1.5
    while step > 1.005:
        moved = False
        for axis in range(len(best)):
            for factor in (step, 1 / step):
                tried = tuple(value * factor if n == axis else value for n, value in enumerate(best))
                if off(tried) < off(best) - 1e-9:
                    best, moved = tried, True
        if not moved:
            step = step**0.5
    return tuple(round(value, 3) for value in best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    cards = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem in catalog())
    figures = [one for card in cards for one in read(card)]
    whole = fit(figures)
    errors: dict[int, list[float]] = {}
    for network in sorted({one.network for one in figures}):
        shares = fit([one for one in figures if one.network != network])
        for one in figures:
            if one.network == network:
                percent = 100 * (predict_ms(one, shares) / one.host_ms - 1)
                errors.setdefault(one.batch, []).append(percent)
                print(
                    f"{one.network:36} {one.precision} batch {one.batch:2} {one.host_ms:7.2f} ms, "
                    f"predicted {percent:+6.1f} %"
                )
    for batch, found in sorted(errors.items()):
        sizes = np.abs(found)
        print(f"batch {batch}: median {np.median(sizes):.1f} %, largest {sizes.max():.1f} %")
    method = f"{' and '.join(cards)}, each network left out of the fit in turn, batch 1, 8 and 64"
    error = summarise([percent for found in errors.values() for percent in found], method)
    compute, memory, kernel_us, copy_gb_s = whole
    entry = {
        "based_on": "onnxruntime", "compute": compute, "memory": memory, "kernel_us": kernel_us, "host_us": 0.0,
        "copy_gb_s": copy_gb_s, "devices": cards, "smallest_batch": 1, "error": vars(error),
    }  # fmt: skip
    print(json.dumps(entry))
    if given.write:
        table = json.loads(roofline._FILE.read_text())
        table["runtimes"]["onnxruntime"] = entry
        roofline._FILE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

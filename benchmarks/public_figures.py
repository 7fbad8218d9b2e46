"""Our roofline against figures that others published, on devices that it was not fitted to.

    python benchmarks/public_figures.py                      # prints a table, writes results/public_figures.json
    python benchmarks/public_figures.py --write              # also profiles/calibration.json, which the package uses
    python benchmarks/public_figures.py --timm DIR           # with timm's own tables, benchmark-infer-*.csv in DIR

`data/public_latencies.csv` is a small excerpt. Its sources, milliseconds a batch, throughput turned around:

* timm: github.com/huggingface/pytorch-image-models (Apache-2.0), results/, commit aa4b5850c154; automatic mixed
  precision, torch 2.4 to 2.9
* nvidia-resnet50: github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md,
  "Inference performance results", torch of 2021, V100 and T4
* swin-readme: github.com/microsoft/Swin-Transformer, README.md, FPS on a V100, batch 64
* ft-swin, ft-vit: github.com/NVIDIA/FasterTransformer, docs/swin_guide.md and vit_guide.md, CUDA 11.4; the column torch
  is traced torch of 2021 without fused attention, tensorrt is "trt plugin"

Each device is predicted from a fit to all others of its runtime. Fitted are only figures of torch 2, and of
tensorrt all; older torch is predicted, too, and shown apart: it is other software.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from record import write_record

from klas_zoo.profiles import roofline
from klas_zoo.profiles.catalog import catalog
from klas_zoo.profiles.interpolation import summarise
from klas_zoo.profiles.profile import PredictionError
from klas_zoo.profiles.roofline import Calibration, operations_ms
from klas_zoo.profiles.traffic import Operation, observe

EXCERPT = Path(__file__).parent / "data" / "public_latencies.csv"
NOTHING = PredictionError(checked=0, median_percent=0, p90_percent=0, largest_percent=0, method="nothing was checked")
# which tables a runtime is fitted to
FITTED = {"torch": ("timm",), "torch-compiled": ("timm",), "tensorrt": ("ft-swin", "ft-vit")}
TIMM_FILES = {"rtx3090": "rtx-3090", "rtx4090": "rtx-4090", "4090": "rtx-4090", "5090": "rtx-5090",
              "pro6000maxq": "rtx-pro-6000-max-q"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure of somebody's table."""

    device: str
    runtime: str
    precision: str
    batch: int
    model: str
    latency_ms: float
    source: str


def read_excerpt() -> list[Published]:
    with EXCERPT.open(newline="") as file:
        return [
            Published(**{**row, "batch": int(row["batch"]), "latency_ms": float(row["latency_ms"])})
            for row in csv.DictReader(file)
        ]


def read_timm(folder: Path, models: set[str]) -> list[Published]:
    """timm's own tables of devices that the catalog knows, those models only, 224×224."""
    found = []
    for file in sorted(folder.glob("benchmark-infer-amp-nchw-*.csv")):
        name = file.stem.removesuffix("-dynamo")
        device = TIMM_FILES.get(name.rpartition("-")[2])
        if device is None:
            continue
        runtime = "torch-compiled" if file.stem.endswith("-dynamo") else "torch"
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                model, batch = row["model"].split(".")[0], int(float(row["infer_batch_size"]))
                if model in models and row["infer_img_size"] == "224":
                    ms = 1e3 * batch / float(row["infer_samples_per_sec"])
                    found.append(
                        Published(device=device, runtime=runtime, precision="fp16", batch=batch, model=model,
                                  latency_ms=ms, source=f"timm:{file.name}")
                    )  # fmt: skip
    return found


def count_operations(models: Iterable[str]) -> dict[str, tuple[Operation, ...]]:
    found = {}
    for model in sorted(set(models)):
        network = timm.create_model(model).eval()
        size = network.default_cfg["input_size"]
        with torch.no_grad():
            found[model] = observe(network, torch.zeros(1, *size))[0].operations
    return found


def predict(one: Published, operations: dict[str, tuple[Operation, ...]], calibration: Calibration) -> float:
    return max(
        operations_ms(
            operations[one.model], catalog()[one.device], calibration, precision=one.precision, batch=one.batch
        )
    )


def error_percent(one: Published, operations: Any, calibration: Calibration) -> float:
    return 100 * (predict(one, operations, calibration) / one.latency_ms - 1)


def fit(figures: Sequence[Published], operations: Any, host_us: float) -> Calibration:
    """The shares and the floor with the smallest mean logarithmic error: on a coarse grid, then on a finer one."""
    published = np.log([one.latency_ms for one in figures])

    def off(tried: Calibration) -> float:
        return float(np.mean(np.abs(np.log([predict(one, operations, tried) for one in figures]) - published)))

    def best(computes: Any, memories: Any, kernels: Any) -> Calibration:
        grid = (
            Calibration(compute=round(float(c), 4), memory=round(float(m), 4), kernel_us=float(k), host_us=host_us,
                        error=NOTHING, based_on="")
            for c, m, k in itertools.product(computes, memories, kernels)
        )  # fmt: skip
        return min(grid, key=off)

    near = best(np.arange(0.2, 1.3, 0.15), np.arange(0.2, 1.5, 0.15), (0, 3, 6))
    steps = np.array([-0.1, -0.05, 0, 0.05, 0.1])
    kernels = sorted({max(0.0, near.kernel_us + step) for step in (-1.5, 0, 1.5)})
    return best(near.compute + steps, near.memory + steps, kernels)


def host_overhead_us(figures: Sequence[Published], operations: Any) -> float:
    """What eager torch's host takes for an operator: at batch 1 nothing else counts. Of the fastest host."""
    return min(1e3 * one.latency_ms / len(operations[one.model]) for one in figures if one.batch == 1)


def leave_one_out(
    runtime: str, figures: Sequence[Published], operations: Any, host_us: float
) -> tuple[Calibration, list[dict[str, Any]]]:
    """A runtime's fit to all devices, and every figure predicted from a fit to the other devices."""
    inside = [one for one in figures if one.runtime == runtime and one.source.partition(":")[0] in FITTED[runtime]]
    rows = []
    for device in sorted({one.device for one in figures if one.runtime == runtime}):
        others = [one for one in inside if one.device != device]
        calibration = fit(others, operations, host_us)
        for one in figures:
            if (one.runtime, one.device) == (runtime, device):
                rows.append(
                    {**vars(one), "predicted_ms": predict(one, operations, calibration), "fitted": one in inside,
                     "error_percent": error_percent(one, operations, calibration)}
                )  # fmt: skip
    devices = sorted({one.device for one in inside})
    errors = [row["error_percent"] for row in rows if row["fitted"] and row["batch"] >= 8]
    method = f"public figures of {', '.join(devices)}, each device left out of the fit in turn, batch 8 or more"
    return replace(fit(inside, operations, host_us), error=summarise(errors, method), based_on=runtime), rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By runtime, source and device."""

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["runtime"], row["source"].partition(":")[0], row["device"]

    found = []
    for name, group in itertools.groupby(sorted(rows, key=key), key):
        large = [row["error_percent"] for row in group if row["batch"] >= 8]
        error = summarise(large, "")
        found.append(
            {"runtime": name[0], "source": name[1], "device": name[2], "figures": error.checked,
             "median_percent": error.median_percent, "largest_percent": error.largest_percent,
             "bias_percent": float(np.median(large)) if large else 0.0}
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--timm", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    figures = read_excerpt()
    if arguments.timm:
        models = {one.model for one in figures}
        figures = [one for one in figures if not one.source.startswith("timm")] + read_timm(arguments.timm, models)
    operations = count_operations(one.model for one in figures)
    fits, rows = {}, []
    for runtime in FITTED:
        old_torch = [one for one in figures if one.runtime == "torch" and not one.source.startswith("timm")]
        host_us = host_overhead_us(old_torch, operations) if runtime == "torch" else 0.0
        fits[runtime], found = leave_one_out(runtime, figures, operations, host_us)
        rows += found
    parts = summary(rows)
    for part in parts:
        print("{runtime:15} {source:16} {device:19} {figures:3} figures, median {median_percent:5.1f} %, largest "
              "{largest_percent:5.1f} %, bias {bias_percent:+6.1f} %".format(**part))  # fmt: skip
    whole = [row["error_percent"] for row in rows if row["batch"] >= 8]
    modern = [row["error_percent"] for row in rows if row["batch"] >= 8 and row["fitted"]]
    for label, errors in (("software the fit is for", modern), ("all, old software too", whole)):
        error = summarise(errors, "")
        print(f"{label}: median {error.median_percent:.1f} %, nine in ten within {error.p90_percent:.1f} %, "
              f"of {error.checked} figures at batch 8 or more")  # fmt: skip
    # of onnxruntime on GPUs there is no public table: benchmarks/gpu/calibrate.py fits it to measurements
    calibration = {runtime: {**vars(one), "error": vars(one.error)} for runtime, one in fits.items()}
    for one in calibration.values():
        del one["factor"]
    write_record("public_figures", {
        "summary": parts, "figures": rows, "calibration": calibration,
        "fitted_software": vars(summarise(modern, "batch 8 or more")), "all": vars(summarise(whole, "batch 8 or more")),
    })  # fmt: skip
    if arguments.write:
        table = json.loads(roofline._FILE.read_text())
        table["runtimes"] |= calibration
        roofline._FILE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

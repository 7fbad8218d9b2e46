"""Packages of DeiT Ti/S/B and 20 stitches, and of deit-micro, beside the plain way: a file and a session for each.

    python benchmarks/packages.py export --work data/packages
    python benchmarks/packages.py half --work data/packages
    python benchmarks/packages.py verify --work data/packages
    python benchmarks/packages.py runtime --work data/packages
    python benchmarks/packages.py speed --work data/packages
    python benchmarks/packages.py int8 --work data/packages --registry DIR --data data/cifar10
    python benchmarks/packages.py optimizer --work data/packages --data data/cifar10 --python VENV/bin/python

Each part writes into results/packages.json what it measured, and leaves the other parts' figures there.
Runs are timed by the processor time of one thread, which other programs on the machine hardly change; only
`speed --threads` with more than one takes wall time, and a quiet machine.
DeiT's weights are drawn at random: sizes, times and memory are those of trained ones, accuracies mean nothing.
`optimizer` comes after `int8`; its Python has `nvidia-modelopt[onnx]`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import verification_time
from record import write_part

from klas_zoo.exporters.package import Package

MB = 1e6
STITCHES = 20
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv")
THREADS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, *INNER])
    parser.add_argument("--work", type=Path, required=True, help="where packages are written")
    parser.add_argument("--threads", type=int, default=THREADS, help="speed: of onnxruntime and of torch")
    parser.add_argument("--registry", type=Path, help="int8: the registry with a build of deit-micro")
    parser.add_argument("--routes", default="tiny,small,base", help="int8: of deit-micro")
    parser.add_argument("--data", type=Path, help="int8, optimizer: the folder of CIFAR-10")
    parser.add_argument("--python", type=Path, help="optimizer: of an environment with NVIDIA's model optimizer")
    parser.add_argument("--name", help="in the result file, as for another processor. Default: the part's own")
    parser.add_argument("--packed", default="none", help="inner")
    verification_time.arguments_for(parser)
    arguments = parser.parse_args()
    if arguments.part in INNER:
        print(json.dumps(INNER[arguments.part](arguments)))
        return
    found = PARTS[arguments.part](arguments)
    write_part("packages", arguments.name or arguments.part, found)
    print(json.dumps(found, indent=1))


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Size, time and memory of the package, and of its parts as files of their own."""
    out = arguments.work / "deit-fp32"
    told = _export(out, "--family", "deit", "--random-weights", "--routes", ",".join(_routes()), "--images", "8")
    empty = _inner("empty", arguments)
    package = Package.open(out)
    anchors = [one.parameters * 4 for one in package.routes if one.route.is_anchor]
    size = sum(path.stat().st_size for path in out.iterdir())
    separate = sum(one.parameters * 4 for one in package.routes)
    return {
        **told,
        "routes": len(package.routes),
        "package_mb": size / MB,
        "anchors_mb": sum(anchors) / MB,
        "package_over_anchors": size / sum(anchors),
        "separate_files_over_anchors": separate / sum(anchors),
        "largest_anchor_mb": max(anchors) / MB,
        "peak_over_largest_anchor": told["peak_rss_mb"] * MB / max(anchors),
        "peak_rss_mb_of_exporting_a_network_of_one_layer": empty["peak_rss_mb"],
        "peak_beyond_that_over_largest_anchor": (told["peak_rss_mb"] - empty["peak_rss_mb"]) * MB / max(anchors),
        "largest_difference_over_allowed": max(
            one.verification.max_abs_difference / one.verification.tolerance for one in package.routes
        ),
    }


def half(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same in fp16, beside the package of `export`."""
    out = arguments.work / "deit-fp16"
    full = Package.open(arguments.work / "deit-fp32", content=False)
    names = [one.name for one in full.routes if one.route.is_anchor]
    names += [one.name for one in full.routes if not one.route.is_anchor][:: STITCHES // 4]
    options = ("--random-weights", "--routes", ",".join(names), "--images", "2", "--precision", "fp16")
    told = _export(out, "--family", "deit", *options)
    package = Package.open(out)
    return {
        **told,
        "routes": names,
        "weights_and_graphs_over_fp32": _held(package, names) / _held(full, names),
        "smallest_cosine": min(one.verification.cosine for one in package.routes),
        "largest_difference_over_allowed": max(
            one.verification.max_abs_difference / one.verification.tolerance for one in package.routes
        ),
    }


def verify(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoding, torch and comparing beside the engines' own run time; see `verification_time`."""
    names = verification_time.routes(arguments.engines, _listed())
    options = ("--random-weights", "--routes", ",".join(names), "--images", "8", "--threads", "1")
    told = _export(arguments.work / "deit-verify", "--family", "deit", *options)
    verification_time.make_jpegs(arguments.work / "jpegs", arguments.images)
    sizes = ("--images", str(arguments.images))
    return {
        "export_on_8_images": told,
        **_inner("verified", arguments, *sizes),
        "engines_at_once": _inner("at_once", arguments),
    }


def verified(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: what verifying takes."""
    package = Package.open(arguments.work / "deit-verify", content=False)
    return verification_time.measure(package, arguments.work / "jpegs", arguments.images)


def at_once(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: several engines at once beside one after the other."""
    return verification_time.at_once(Package.open(arguments.work / "deit-verify", content=False), threads=2)


def runtime(arguments: argparse.Namespace) -> dict[str, Any]:
    """Memory of ten routes in one process, latency of a route beside a session of its own, and switching."""
    found = {f"packed_{packed}": _inner("hold", arguments, "--packed", packed) for packed in ("none", "all")}
    anchors = found["packed_none"]["anchors_mb"]
    for one in found.values():
        one["uss_over_anchors"] = one["uss_mb"] / anchors
        one["pss_over_anchors"] = one["pss_mb"] / anchors
    return found


def hold(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: opens ten routes, runs each, and looks at what it holds."""
    from klas_zoo.runtime import ElasticSession
    from klas_zoo.runtimes import open_engine

    package = Package.open(arguments.work / "deit-fp32", content=False)
    stitches = [one.name for one in package.routes if not one.route.is_anchor]
    names = [one.name for one in package.routes if one.route.is_anchor] + stitches[:: len(stitches) // 7][:7]
    images = np.random.default_rng(0).standard_normal((1, *package.manifest.family.input_shape), dtype=np.float32)
    before = _memory()
    started = time.perf_counter()
    session = ElasticSession(package, threads=THREADS, routes=names, packed=arguments.packed)
    opened = time.perf_counter() - started
    for one in session.routes:
        session.run(images, route=one.name)
    after = _memory()
    ratios = {}
    for one in session.routes:
        # in turns of blocks: the threads of a session that was just used spin for a while
        blocks: dict[str, list[float]] = {"elastic": [], "alone": []}
        for _ in range(2):
            blocks["elastic"] += _block(partial(session.run, images, route=one.name))
            alone = open_engine(package.engine(one), threads=THREADS)
            blocks["alone"] += _block(partial(alone.run, images))
            del alone
        mine, own = (float(np.median(blocks[name])) for name in ("elastic", "alone"))
        ratios[one.name] = {"elastic_ms": mine, "own_session_ms": own, "ratio": mine / own}
    # what a switch costs: the same route again and again, and in turns with another
    small, other = session.routes[0].name, session.routes[1].name
    steady = np.median([_once(partial(session.run, images, route=small)) for _ in range(40)])
    turns = []
    for _ in range(40):
        session.run(images, route=other)
        turns.append(_once(partial(session.run, images, route=small)))
    anchors = sum(one.parameters * 4 for one in package.routes if one.route.is_anchor)
    return {
        "routes": len(session.routes),
        "anchors_mb": anchors / MB,
        "open_s": opened,
        **{f"{key}_mb": (after[key] - before[key]) / MB for key in after},
        "median_ratio": float(np.median([one["ratio"] for one in ratios.values()])),
        "largest_ratio": max(one["ratio"] for one in ratios.values()),
        "latencies": ratios,
        "switch_ms": float(np.median(turns) - steady),
    }


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Stitches in onnxruntime beside torch eager, and beside what their multiply-adds say; batch 1."""
    import torch

    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.runtimes import open_engine
    from klas_zoo.supernet import Supernet

    threads = arguments.threads
    # threads that wait for one another spin: their processor time says nothing, and they disturb who runs next
    clock, pause_s = (time.process_time, 0.0) if threads == 1 else (time.perf_counter, 0.1)
    torch.set_num_threads(threads)
    package = Package.open(arguments.work / "deit-fp32", content=False)
    stitches = [one for one in package.routes if not one.route.is_anchor][:: STITCHES // 6]
    timed = [one for one in package.routes if one.route.is_anchor or one in stitches]
    chains = load_family(find_family("deit"), random_weights=True).chains
    network = Supernet(chains, [one.route for one in timed]).eval()
    images = np.random.default_rng(0).standard_normal((1, *package.manifest.family.input_shape), dtype=np.float32)
    tensor = torch.from_numpy(images)
    found: dict[str, dict[str, float]] = {}
    taken: dict[str, list[list[float]]] = {one.name: [] for one in timed}
    for _ in range(4):  # rounds, so that a slow minute does not fall on one route
        for one in timed:
            session = open_engine(package.engine(one), threads=threads)
            with torch.inference_mode():
                runs = partial(session.run, images), partial(network, tensor, one.route)
                turns = [[_once(run, clock, pause_s) for run in runs] for _ in range(8)]
            taken[one.name] += turns[2:]
            del session
    for one in timed:
        ort_ms, torch_ms = np.median(taken[one.name], axis=0)
        found[one.name] = {"onnxruntime_ms": ort_ms, "torch_eager_ms": torch_ms, "speedup": torch_ms / ort_ms}
    by_name = {one.name: one for one in timed}
    for one in stitches:
        ends = [by_name[segment.anchor] for segment in one.route.segments]
        (m0, m1), (t0, t1) = zip(*((end.macs, found[end.name]["onnxruntime_ms"]) for end in ends), strict=True)
        expected = t0 + (one.macs - m0) / (m1 - m0) * (t1 - t0)
        found[one.name]["over_share_of_macs"] = found[one.name]["onnxruntime_ms"] / expected
    shares = [found[one.name]["over_share_of_macs"] for one in stitches]
    for one in timed:
        products = _products_ms(package.engine(one), images, threads)
        found[one.name] |= {
            "products_ms": products,
            "speedup_were_all_else_free": min(torch_ms for _, torch_ms in taken[one.name]) / products,
        }
    return {
        "threads": threads,
        "routes": found,
        "smallest_speedup_of_a_stitch": min(found[one.name]["speedup"] for one in stitches),
        "median_speedup_of_stitches": float(np.median([found[one.name]["speedup"] for one in stitches])),
        "over_share_of_macs": [min(shares), max(shares)],
    }


def int8(arguments: argparse.Namespace) -> dict[str, Any]:
    """deit-micro in int8 over a whole test split, and its latency beside fp32's."""
    from klas_zoo.runtimes import open_engine

    packages = {}
    for precision in ("fp32", "int8"):
        out = arguments.work / f"micro-{precision}"
        _export(
            out, "--family", "deit-micro", "--registry", str(arguments.registry), "--routes", arguments.routes,
            "--precision", precision, *(["--data", str(arguments.data)] if arguments.data else []),
            "--images", "10000" if precision == "int8" else "200",
        )  # fmt: skip
        packages[precision] = Package.open(out)
    found = {}
    for one in packages["int8"].routes:
        seen = one.verification
        row = {"images": seen.images, "top1_fp32": seen.reference_top1, "top1_int8": seen.top1, "lost": seen.lost}
        row |= {"cosine": seen.cosine, "agreement": seen.top1_agreement}
        for batch in (1, 32):
            shape = (batch, *packages["int8"].manifest.family.input_shape)
            images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            sessions = [
                open_engine(packages[p].engine(packages[p].route(one.name)), threads=1) for p in ("fp32", "int8")
            ]
            pairs = [[_once(partial(s.run, images)) for s in sessions] for _ in range(60)][10:]
            full, narrow = np.median(pairs, axis=0)
            row[f"speedup_batch_{batch}"] = full / narrow
        found[one.name] = row
    sizes = {p: sum(f.stat().st_size for f in package.folder.glob("*.bin")) for p, package in packages.items()}
    return {
        "routes": found,
        "left_out": [one.name for one in packages["fp32"].routes if one.name not in found],
        "most_lost": max(row["lost"] for row in found.values()),
        "weights_over_fp32": sizes["int8"] / sizes["fp32"],
    }


def optimizer(arguments: argparse.Namespace) -> dict[str, Any]:
    """The routes of `int8` quantised by NVIDIA's model optimizer instead, from the same calibration images."""
    import onnx

    from klas_zoo.building.exporting import images_for
    from klas_zoo.building.package_sources import random_source
    from klas_zoo.exporters.contract import Artifact
    from klas_zoo.exporters.limits import VerificationLimits
    from klas_zoo.exporters.onnx_session import open_onnx
    from klas_zoo.exporters.reference_logits import DecodedImages, ReferenceLogits
    from klas_zoo.exporters.verification import compare
    from klas_zoo.families.specs import find_family
    from klas_zoo.runtimes import CPU_PROVIDER

    def opened(file: Path) -> Any:
        artifact = Artifact(route=file.stem, format="onnx", precision="fp32", path=file)
        return open_onnx(artifact, provider=CPU_PROVIDER, threads=1)

    full, ours = (Package.open(arguments.work / f"micro-{one}", content=False) for one in ("fp32", "int8"))
    spec = find_family("deit-micro")
    images, _ = images_for(
        spec, random_source(spec, 0), arguments.data, precision="int8", count=10_000, seed=0
    )
    calibration = arguments.work / "calibration.npy"
    np.save(calibration, np.concatenate([batch.numpy() for batch, _ in images.calibration()]))
    held = DecodedImages(arguments.work)
    for batch, labels in images.test():
        held.append(batch.numpy(), labels.numpy())
    found: dict[str, Any] = {}
    for one in ours.routes:
        graph = full.engine(full.route(one.name))
        plain = opened(graph).outputs
        logits = [plain(held.read(start, start + 100)) for start in range(0, len(held), 100)]
        reference = ReferenceLogits(images=held, logits={one.name: np.concatenate(logits)})
        engines = {"ours": ours.engine(one)}
        whole = arguments.work / f"{one.name}.onnx"  # a copy: the optimizer writes into the file that it reads
        onnx.save(onnx.load(str(graph)), str(whole))
        for method in ("entropy", "max"):
            engines[method] = arguments.work / f"{one.name}.{method}.onnx"
            command = [arguments.python, Path(__file__).with_name("modelopt_int8.py"), whole, calibration]
            subprocess.run([*map(str, command), str(engines[method]), method], check=True, stdout=subprocess.DEVNULL)
        found[one.name] = {}
        for name, engine in engines.items():
            quantised = opened(engine)
            seen = compare(one.name, quantised, reference, VerificationLimits(relative=0.0))
            row = {"top1": seen.top1, "lost": seen.lost, "agreement": seen.top1_agreement, "cosine": seen.cosine}
            for batch in (1, 32):
                some = np.random.default_rng(0).standard_normal((batch, *spec.input_shape), dtype=np.float32)
                pairs = [[_once(partial(run, some)) for run in (plain, quantised.outputs)] for _ in range(60)][10:]
                before, after = np.median(pairs, axis=0)
                row[f"speedup_batch_{batch}"] = before / after
            found[one.name][name] = row
    return {"routes": found, "modelopt": _version_there(arguments.python, "nvidia-modelopt")}


def empty(arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: what exporting costs before there is anything to export."""
    from torch import nn

    import klas_zoo.building.exporting  # noqa: F401  what the command imports
    from klas_zoo.exporters.to_onnx import export

    with tempfile.TemporaryDirectory() as folder:
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
        export(network, (3, 4, 4), Path(folder) / "smallest.onnx", metadata={})
    return {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB}


PARTS = {
    "export": export, "half": half, "verify": verify, "runtime": runtime, "speed": speed, "int8": int8,
    "optimizer": optimizer,
}  # fmt: skip
INNER = {"hold": hold, "empty": empty, "verified": verified, "at_once": at_once}


def _routes() -> list[str]:
    """The anchors, and 20 of SN-Net's stitches evenly spread from small to large."""
    listed = _listed()
    stitches = [one["route"] for one in listed if one["target"] is not None]
    chosen = [stitches[index * len(stitches) // STITCHES] for index in range(STITCHES)]
    return [one["route"] for one in listed if one["target"] is None] + chosen


def _listed() -> list[dict[str, Any]]:
    """DeiT's anchors and SN-Net's stitches, small to large."""
    done = subprocess.run(
        [sys.executable, "-m", "klas_zoo", "routes", "--family", "deit", "--selector", "snnet", "--json"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed


def _held(package: Package, names: list[str]) -> int:
    """Bytes of some routes' graphs, and of the weights that they name, each once."""
    import onnx

    graphs, places = 0, {}
    for name in names:
        path = package.engine(package.route(name))
        graphs += path.stat().st_size
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                places[int(place["offset"])] = int(place["length"])
    return graphs + sum(-(-length // 4096) * 4096 for length in places.values())


def _export(out: Path, *options: str) -> dict[str, Any]:
    """Runs the command as a process of its own; wall time, processor time and peak memory."""
    subprocess.run(["rm", "-rf", str(out)], check=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "klas_zoo", "export", "--out", str(out), *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(process.stderr.read() if process.stderr else "export failed")
    return {
        "wall_s": time.perf_counter() - started,
        "processor_s": used.ru_utime + used.ru_stime,
        "peak_rss_mb": used.ru_maxrss * 1024 / MB,
    }


def _inner(part: str, arguments: argparse.Namespace, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, part, "--work", str(arguments.work), *options],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _products_ms(engine: Path, images: np.ndarray, threads: int, runs: int = 12) -> float:
    """What onnxruntime's own profile says of products with weights together, each in its fastest run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[str, int] = {}
    for event in events:
        name, took = event["name"], event["dur"]
        if name.endswith("kernel_time") and event["args"].get("op_name") in _PRODUCTS:
            fastest[name] = min(took, fastest.get(name, took))
    return sum(fastest.values()) / 1e3


def _version_there(python: Path, distribution: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    return subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _memory() -> dict[str, float]:
    """Of this process, in bytes: private to it (USS), its share of all (PSS), and what no file holds (anonymous)."""
    found: dict[str, float] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = 1024 * float(value)
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"uss": private, "pss": found["Pss"], "anonymous": found["Anonymous"]}


def _block(run: Any) -> list[float]:
    for _ in range(2):
        run()
    return [_once(run) for _ in range(6)]


def _once(run: Any, clock: Callable[[], float] = time.process_time, pause_s: float = 0.0) -> float:
    """Milliseconds of a run after a pause; of processor time, unless another clock is given."""
    time.sleep(pause_s)
    started = clock()
    run()
    return 1e3 * (clock() - started)


if __name__ == "__main__":
    main()

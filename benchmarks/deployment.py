"""From a training box to a target: JPEGs without torch, the check of images, LeViT's norms, how long an install takes.

    python benchmarks/deployment.py jpegs --folder data/jpegs        # builds deit-micro on 1,000 JPEGs, minutes
    python benchmarks/deployment.py check --folder data/many         # writes 50,000 JPEGs
    python benchmarks/deployment.py levit
    python benchmarks/deployment.py opening PACKAGE ...              # onnxruntime's own optimised graphs
    python benchmarks/deployment.py install PACKAGE ...
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from record import read_parts, write_part

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
LIGHT = """
import json, sys
from pathlib import Path
from klas_zoo.registry import Registry
from klas_zoo.registry.loaded import Engine
from klas_zoo.runtimes import open_engine
root, folder = sys.argv[1:]
files = sorted(Path(folder).rglob("*.jpg"))
found = {}
for one in Registry.open(Path(root), create=False).engines():
    if one.precision == "fp32" and one.runtime == "onnxruntime":
        with Engine(open_engine(one.path, runtime="onnxruntime", threads=1), one) as engine:
            images = engine.preprocess.batch(files)
            logits = [engine.run(images[first : first + 100]) for first in range(0, len(files), 100)]
            found[str(one.route)] = [int(number) for part in logits for number in part.argmax(1)]
assert "torch" not in sys.modules
print(json.dumps({"files": [str(one) for one in files], "classes": found}))
"""


def write_jpegs(folder: Path) -> None:
    """The 1,000 test images of deit-micro's sample, photographs of CIFAR-10, as JPEGs of 32 to 400 pixels an edge."""
    from klas_zoo.data.arrays import open_sample
    from klas_zoo.data.cifar10 import CLASSES
    from klas_zoo.families.specs import builtin_families

    sample = builtin_families()["deit-micro"].sample
    assert sample is not None
    draw = random.Random(0)
    for split, source, count in zip(("train", "val"), open_sample(sample), (2000, 1000), strict=True):
        for number in range(count):
            image = source.image(number)
            size = (draw.randint(32, 400), draw.randint(32, 400))
            place = folder / split / CLASSES[source.labels[number]]
            place.mkdir(parents=True, exist_ok=True)
            image.resize(size, Image.Resampling.BICUBIC).save(
                place / f"{number:05d}.jpg", quality=draw.randint(70, 95), subsampling=draw.choice((0, 2))
            )


def jpegs(options: argparse.Namespace) -> dict[str, Any]:
    """Classes of engines without torch, beside those of torch with timm's transform and the report's accuracies."""
    import light
    import torch

    from klas_zoo.building import tuned
    from klas_zoo.data.loading import batches, load_data
    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family

    folder, root = options.folder, options.folder / "registry"
    if not (folder / "val").is_dir():
        write_jpegs(folder)
    if not (root / "registry.sqlite").exists():
        command = ["build", "--family", "deit-micro", "--data", folder, "--registry", root, "--precision", "fp32"]
        subprocess.run([sys.executable, "-m", "klas_zoo", *map(str, command), "--threads", "1"], check=True)
    done = light.run(root.absolute(), (folder / "val").absolute(), code=LIGHT)
    if done.returncode:
        raise SystemExit(done.stderr)
    answer = json.loads(done.stdout)
    (report_file,) = (root / "reports").glob("*/report.json")
    report = {one["route"]: one for one in json.loads(report_file.read_text())["routes"]}
    spec = find_family("deit-micro")
    kept = tuned.find(root, "deit-micro")
    family = load_family(spec, random_weights=True)
    supernet = kept.load(family.chains)
    data = load_data(folder, sample=None, num_classes=10, data_config=dict(kept.data_config))
    place = {str(Path(data.test.source.name(n)).absolute()): n for n in range(len(data.test))}
    order = [place[file] for file in answer["files"]]
    labels = np.asarray(data.test.source.labels)[order]
    found = {}
    for route in kept.routes:
        if route.name in answer["classes"]:
            with torch.inference_mode():
                torchs = torch.cat([supernet(images, route.route).argmax(1) for images, _ in batches(data.test, 100)])
            ours = np.asarray(answer["classes"][route.name])
            found[route.name] = {
                "same_class": float((ours == torchs.numpy()[order]).mean()),
                "top1": 100 * float((ours == labels).mean()), "report": report[route.name]["top1"],
            }  # fmt: skip
    for name, one in found.items():
        same = f"{100 * one['same_class']:.2f} % as torch"
        print(f"{name:20} {same}, top-1 {one['top1']:.2f} %, report {one['report']:.2f} %")
    return {"images": len(order), "routes": found}


def _decode(paths: list[str]) -> int:
    for path in paths:
        with Image.open(path) as image:
            image.convert("RGB")
    return len(paths)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The check of all images beside decoding them once with Pillow on all cores."""
    from klas_zoo.data.damage import find_damaged
    from klas_zoo.data.folders import FolderOfImages

    folder = options.folder
    if not folder.is_dir():
        _many(folder, options.images)
    files = sorted(map(str, folder.rglob("*.jpg")))
    cores = len(os.sched_getaffinity(0))
    source = FolderOfImages(folder)

    def plain() -> None:
        with ProcessPoolExecutor(cores) as pool:
            assert sum(pool.map(_decode, [files[n : n + 32] for n in range(0, len(files), 32)])) == len(files)

    ratios, times = [], []
    for _ in range(options.rounds):
        ours, theirs = _seconds(lambda: find_damaged(source)), _seconds(plain)
        times.append((ours, theirs))
        ratios.append(ours / theirs)
        print(f"check {ours:.1f} s, decoding {theirs:.1f} s, {ratios[-1]:.2f} times", flush=True)
    return {"images": len(files), "cores": cores, "seconds": times, "ratio": median(ratios)}


def _many(folder: Path, count: int) -> None:
    """JPEGs of 224 to 500 pixels an edge, crops of the photographs that installed packages bring."""
    from photos import photographs

    draw, photos = random.Random(0), photographs()
    contents = []
    for _ in range(500):
        photo = draw.choice(photos)
        width, height = draw.randint(224, 500), draw.randint(224, 500)
        left, top = draw.randrange(photo.width - width + 1), draw.randrange(photo.height - height + 1)
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=draw.randint(80, 95))
        contents.append(buffer.getvalue())
    for number in range(count):
        place = folder / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(contents[number % len(contents)])


def levit(options: argparse.Namespace) -> dict[str, Any]:
    """LeViT-256 in onnxruntime beside torch eager, by turns; random weights, batch 1."""
    import onnx
    import timm
    import torch

    from klas_zoo.exporters.to_onnx import export
    from klas_zoo.runtimes import open_engine

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model("levit_256").eval()
    for module in model.modules():  # as after training: a norm that does nothing could be dropped
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        file = Path(folder) / "levit.onnx"
        export(model, (3, 224, 224), file, metadata={})
        nodes = [node.op_type for node in onnx.load(file).graph.node]
        with open_engine(file, runtime="onnxruntime", threads=options.threads) as session:
            difference = float(np.abs(session.run(images.numpy()) - model(images).numpy()).max())
            calls: dict[str, Callable[[], Any]] = {
                "torch": lambda: model(images), "onnxruntime": lambda: session.run(images.numpy())
            }  # fmt: skip
            times = dict(_by_turns(calls, options.seconds))
    ratio = times["torch"][0] / times["onnxruntime"][0]
    print(f"{nodes.count('BatchNormalization')} BatchNormalization of {len(nodes)} nodes, difference {difference:.1e}")
    print(f"torch {times['torch'][0]:.2f} ms, onnxruntime {times['onnxruntime'][0]:.2f} ms: {ratio:.2f} times as fast")
    return {"batch_norms": nodes.count("BatchNormalization"), "threads": options.threads, "ratio": ratio,
            "ms": {name: {"median": m, "fastest": f, "runs": n} for name, (m, f, n) in times.items()},
            "difference": difference}  # fmt: skip


def _by_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> Iterator[tuple[str, tuple[float, float, int]]]:
    """Median and fastest run in ms, and how many there were; 20 runs of each at a time."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            found[name] += [1000 * _seconds(call) for _ in range(20)]
    for name, times in found.items():
        yield name, (median(times), min(times), len(times))


def opening(options: argparse.Namespace) -> dict[str, Any]:
    """Anchors of packages opened in onnxruntime as they are, and as the graphs that onnxruntime had optimised.

    By turns, and in processor time, which other work on the machine changes less than the clock's.
    """
    import onnxruntime

    def opened(file: Path, optimised: Path | None = None, done: bool = False) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        if optimised is not None:
            settings.optimized_model_filepath = str(optimised)
        if done:
            settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    onnxruntime.set_default_logger_severity(4)
    found = {}
    for package in options.packages:
        for file in sorted(one for one in package.glob("*.onnx") if "+" not in one.name):
            with tempfile.TemporaryDirectory() as folder:
                kept = Path(folder) / "optimised.onnx"
                shutil.copyfile(package / "weights.bin", Path(folder) / "weights.bin")  # which it still reads
                opened(file, kept)
                ways = partial(opened, file), partial(opened, kept, None, True)
                times = [[1000 * _seconds(call, time.process_time) for call in ways] for _ in range(options.rounds)]
                ours, theirs = zip(*times, strict=True)
                size = kept.stat().st_size
            name = f"{package.name} {file.stem}"
            found[name] = {"ms": median(ours), "optimised_ms": median(theirs), "optimised_bytes": size}
            print(f"{name:32} {median(ours):.0f} ms, optimised {median(theirs):.0f} ms, {size / 1e6:.1f} MB")
    return found


def install(options: argparse.Namespace) -> dict[str, Any]:
    """`klas-zoo install` of packages as whole processes, into one new registry."""
    found = dict(read_parts("deployment").get("install", {}))
    measured = []
    with tempfile.TemporaryDirectory() as root:
        for package in map(_with_accuracies, options.packages):
            command = [sys.executable, "-m", "klas_zoo", "install", str(package), "--registry", root]
            seconds = _seconds(partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL))
            manifest = json.loads((package / "manifest.json").read_text())
            name = f"{manifest['family']['name']} {manifest['precision']}"
            found[name] = {"seconds": seconds, "engines": len(manifest["routes"])}
            print(f"{name}: {len(manifest['routes'])} engines, {seconds:.1f} s", flush=True)
            measured.append(seconds)
    print(f"together {sum(measured):.1f} s")
    return found


def _with_accuracies(package: Path) -> Path:
    """The package; of random weights a copy beside it that states accuracies, without which none is installed."""
    from klas_zoo.exporters.manifest_reading import read_manifest
    from klas_zoo.exporters.package import write_manifest

    manifest = read_manifest(json.loads((package / "manifest.json").read_text()), str(package))
    if all(one.top1 is not None for one in manifest.routes):
        return package
    copy = package.with_name(f"{package.name}-stated")
    if not copy.is_dir():
        shutil.copytree(package, copy)
        (copy / "manifest.json").unlink()
        routes = tuple(replace(one, top1=0.1) for one in manifest.routes)
        write_manifest(copy, replace(manifest, routes=routes))
    return copy


def _seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    call()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("jpegs", "check"):
        part = parts.add_parser(name)
        part.add_argument("--folder", type=Path, required=True)
        part.add_argument("--images", type=int, default=50_000)
        part.add_argument("--rounds", type=int, default=1)
    part = parts.add_parser("levit")
    part.add_argument("--threads", type=int, default=2)
    part.add_argument("--seconds", type=float, default=40)
    for name in ("install", "opening"):
        part = parts.add_parser(name)
        part.add_argument("packages", type=Path, nargs="+")
        part.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ways = {"jpegs": jpegs, "check": check, "levit": levit, "opening": opening, "install": install}
    measured = ways[options.part](options)
    print(f"Written: {write_part('deployment', options.part, measured)}")


if __name__ == "__main__":
    main()

"""Packs a supernet that tune_supernet.py tuned for a family's folder.

    python benchmarks/ship_supernet.py --anchors zoo/builtin/deit-micro --tuned data/tuned/joint-norms-0 \
        --out zoo/builtin/deit-micro/supernet.safetensors

Each anchor keeps the better of its weights before and after tuning, measured on the 4,000 images of the sample that
no training saw; accuracies in the header are those on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cifar_training import MEAN, STD
from safetensors.torch import load_file
from tune_supernet import load_chains

from klas_zoo.families.anchors import Family
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.shipped import ShippedSupernet, write_shipped


def plain(name: str) -> str:
    """A tensor's name in today's chains: those of a hand-written cut had `part` between stem or head and the rest."""
    return name.replace("stem.part.", "stem.").replace("head.part.", "head.").replace("head/part/", "head/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True, help="without the suffixes .json and .safetensors")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    record = json.loads(arguments.tuned.with_suffix(".json").read_text())
    state = {plain(name): one.float() for name, one in load_file(arguments.tuned.with_suffix(".safetensors")).items()}
    chains = load_chains(arguments.anchors, ["tiny", "small", "base"], "cpu")
    fingerprints = Family.of("deit-micro", chains, {"mean": MEAN, "std": STD}).anchor_fingerprints
    tuned = load_chains(arguments.anchors, ["tiny", "small", "base"], "cpu")
    routes = {Route.from_json(row["json"]): row for row in record["routes"]}
    supernet = Supernet.of_state(tuned, routes, state)
    supernet.load_state_dict(state)
    originals, rows = [], []
    for route, row in routes.items():
        keeps_original = route.is_anchor and row["tuned"] < row["closed_form"]
        if keeps_original:
            originals.append(route.segments[0].anchor)
        rows.append([route.to_json(), row["closed_form_test" if keeps_original else "tuned_test"]])
    images = "the 10,000 test images of CIFAR-10"
    header = {"anchors": fingerprints, "originals": originals, "routes": rows, "images": images}
    write_shipped(arguments.out, supernet, chains, header)
    shipped = ShippedSupernet.read(arguments.out)
    packed = shipped.load(chains, fingerprints)
    worst = max(
        float((packed.state_dict()[name] - tensor).abs().max()) for name, tensor in supernet.state_dict().items()
    )
    size = arguments.out.stat().st_size / 1e6
    print(f"{arguments.out}: {size:.2f} MB, largest difference of a weight {worst:.2g}, originals {originals}")


if __name__ == "__main__":
    main()

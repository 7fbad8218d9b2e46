"""Makes `training.json` of the files that train_anchors.py wrote, with top-1 of what ships on the 10,000 test images.

python benchmarks/anchor_record.py --data data/cifar10 --anchors data/anchors --out zoo/builtin/deit-micro
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from cifar_training import load_test
from safetensors.torch import load_file

import klas_zoo.families.micro  # noqa: F401  registers the anchors with timm


def top1(name: str, weights: Path, root: Path) -> float:
    """Of an anchor in fp32 with its shipped fp16 weights, in per cent."""
    model = timm.create_model(name).eval()
    model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    images = load_test(root, "cpu")
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in images.batches(500))
    return 100 * hits / len(images)


def of_model(record: dict[str, Any]) -> dict[str, Any]:
    """What one run of train_anchors.py leaves in the record, without paths of the machine."""
    paths = ("data", "out", "checkpoints", "teacher", "model")
    settings = {name: value for name, value in record["settings"].items() if name not in paths}
    settings["teacher"] = record["settings"]["teacher"] is not None
    kept = ("history", "seconds", "versions", "hardware", "date")
    return {"settings": settings, **{name: record[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"anchors": {}}
    for path in sorted(arguments.anchors.glob("deit_micro_*.safetensors")):
        record = json.loads(path.with_suffix(".json").read_text())
        shutil.copyfile(path, arguments.out / path.name)
        found["anchors"][path.stem] = {"top1_test": top1(path.stem, path, arguments.data), **of_model(record)}
        print(path.stem, found["anchors"][path.stem]["top1_test"], flush=True)
    found["teacher"] = of_model(json.loads((arguments.anchors / "teacher.json").read_text()))
    (arguments.out / "training.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

"""A family package as a model repository of NVIDIA's Triton Inference Server.

    OUT/family/             the package, once
    OUT/repository.json     size and hash of every file under models, for `klas-zoo verify OUT`
    OUT/models/             what `tritonserver --model-repository` is given
        FAMILY/             all routes behind one name: a request says `latency_ms`, or `route`
            config.pbtxt
            1/model.py      runs klas_zoo's ElasticSession in Triton's python backend
            1/family        a link to ../../../family
        FAMILY_ROUTE/       one route; Triton's own onnxruntime or tensorrt backend runs it
            config.pbtxt    names the graph by default_model_filename
            1               a link to ../../family

onnxruntime refuses a graph whose weights lie behind a link to a file, and takes one behind a link
to a folder; so all routes share one weights file. Links are relative: OUT can be moved. Where
links cannot be kept, such as in an object store, copies cost the weights once a model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import UsageError
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.manifest import MANIFEST, PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.pbtxt import Word, entries, to_text
from klas_zoo.exporters.triton_repository import CONFIG, write_record
from klas_zoo.files import replacing
from klas_zoo.runtimes.plans import check_file, read_record

FAMILY, MODELS = "family", "models"
_ELASTIC_MODEL = '''"""All routes of a family behind one name; see klas_zoo.serving."""

from klas_zoo.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


# config.pbtxt is the place to change these: they are the server's business, not the package's
_QUEUE_DELAY_US, _THREADS = 100, 1


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """How the server is to run the models.

    Attributes:
        copy: give every model files of its own instead of links.
        largest_batch: of one execution; requests are merged up to it.
        plans: folders of TensorRT engines, one for each compute capability; empty: ONNX graphs are run.
    """

    copy: bool = False
    largest_batch: int = 32
    plans: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.largest_batch < 1:
            raise UsageError(f"Triton's largest batch is at least 1, not {self.largest_batch}.")


def derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]:
    """Fills `folder` with a model repository; options are the fields of `TritonSettings`.

    Raises:
        UsageError: plans that Triton's tensorrt backend cannot load, or that are missing for a route.
        ExportError: a plan is damaged.
        OSError: a file cannot be written.
    """
    known = TritonSettings.__dataclass_fields__
    return write_repository(package, folder, TritonSettings(**{k: v for k, v in options.items() if k in known}))


def write_repository(package: Package, folder: Path, settings: TritonSettings) -> list[Verdict]:
    """`derive` with settings that are checked already."""
    family = folder / FAMILY
    _copy(package, family)
    plans = {one.name: _plans(one, settings.plans) for one in package.routes}
    for found in plans.values():
        for file in found.values():
            shutil.copyfile(file, family / file.name)
    copied = Package.open(family)
    verdicts = []
    for one in copied.routes:
        model = folder / MODELS / model_name(copied.manifest.family.name, one.name)
        config = route_config(copied, one, settings, {cc: file.name for cc, file in plans[one.name].items()})
        _write(model / CONFIG, to_text(config))
        _place(family, model / "1", settings.copy)
        artifact = Artifact(
            route=one.name, format="triton", precision=copied.manifest.precision, path=model / CONFIG
        )
        not_run = bool(plans[one.name]) or one.verification is None
        verdicts.append(
            Verdict(
                artifact=artifact,
                status="built, not run" if not_run else "verified",
                verification=None if not_run else one.verification,
                reason="only Triton's server runs it" if not_run else "",
            )
        )
    elastic = folder / MODELS / copied.manifest.family.name
    _write(elastic / CONFIG, to_text(elastic_config(copied, settings)))
    _write(elastic / "1" / "model.py", _ELASTIC_MODEL)
    _place(family, elastic / "1" / FAMILY, settings.copy)
    write_record(folder)
    return verdicts


def model_name(family: str, route: str) -> str:
    """What a route is called in Triton: `deit-micro_tiny.1-3_base.6-8`; a plus sign means a space in URLs."""
    return f"{family}_{route.replace('+', '_')}"


def route_config(
    package: Package, route: PackagedRoute, settings: TritonSettings, plans: Mapping[str, str]
) -> dict[str, Any]:
    """One route's config.pbtxt; `plans` are file names by compute capability, none for an ONNX graph."""
    about = {"family": package.manifest.family.name, "route": route.name, "precision": package.manifest.precision}
    if route.top1 is not None:
        about["top1"] = f"{route.top1:.2f}"
    if not plans:
        about["intra_op_thread_count"] = str(_THREADS)
    return {
        "name": model_name(package.manifest.family.name, route.name),
        "backend": "tensorrt" if plans else "onnxruntime",
        "default_model_filename": next(iter(plans.values()), route.file),
        "cc_model_filenames": [{"key": cc, "value": name} for cc, name in sorted(plans.items())],
        **_common(package, settings, kind="KIND_GPU" if plans else "KIND_CPU"),
        "output": [_logits(package)],
        "model_warmup": [_warmup(package, batch) for batch in sorted({1, settings.largest_batch})],
        "parameters": entries({key: {"string_value": value} for key, value in about.items()}),
    }


def elastic_config(package: Package, settings: TritonSettings) -> dict[str, Any]:
    """config.pbtxt of the model that picks a route for every request."""
    about = {"family": package.manifest.family.name, "threads": "0"}  # one for each core that the server may use
    common = _common(package, settings, kind="KIND_CPU")
    del common["dynamic_batching"]  # klas_zoo.serving merges requests: it knows what each has to wait for
    return {
        "name": package.manifest.family.name,
        "backend": "python",
        **common,
        "output": [_logits(package), {"name": "route", "data_type": Word("TYPE_STRING"), "dims": [1]}],
        "model_warmup": [_warmup(package, 1)],
        "parameters": entries({key: {"string_value": value} for key, value in about.items()}),
    }


def _common(package: Package, settings: TritonSettings, *, kind: str) -> dict[str, Any]:
    shape = package.manifest.family.input_shape
    return {
        "max_batch_size": settings.largest_batch,
        "input": [{"name": "images", "data_type": Word("TYPE_FP32"), "dims": list(shape)}],
        "dynamic_batching": {"max_queue_delay_microseconds": _QUEUE_DELAY_US},
        "instance_group": [{"count": 1, "kind": Word(kind)}],
    }


def _logits(package: Package) -> dict[str, Any]:
    return {"name": "logits", "data_type": Word("TYPE_FP32"), "dims": [package.manifest.family.num_classes]}


def _warmup(package: Package, batch: int) -> dict[str, Any]:
    """A request the server makes before the first user does."""
    images = {"data_type": Word("TYPE_FP32"), "dims": list(package.manifest.family.input_shape), "zero_data": True}
    return {"name": f"batch {batch}", "batch_size": batch, "inputs": entries({"images": images})}


def _plans(route: PackagedRoute, folders: tuple[Path, ...]) -> dict[str, Path]:
    """A route's engines by compute capability.

    Raises:
        UsageError: a folder has none of this route, or two are for one capability.
        ExportError: an engine is not what was built.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        files = sorted(folder.glob(f"{route.name}.sm*.engine"))
        if not files:
            raise UsageError(f"--plans {folder} has no engine of the route {route.name}: export tensorrt there first.")
        for file in files:
            record = read_record(file)
            check_file(file, record)
            if record.runtime != "tensorrt":
                raise UsageError(f"{file} is an engine of {record.runtime}; Triton loads those of tensorrt only.")
            for capability in record.capabilities:
                if capability in found:
                    raise UsageError(f"{file} and {found[capability]} are both for compute capability {capability}.")
                found[capability] = file
    return found


def _copy(package: Package, target: Path) -> None:
    """The files its manifest names; whatever else lies in its folder, or is linked there, stays where it is."""
    target.mkdir(parents=True)
    for name in (*package.manifest.files, MANIFEST):
        shutil.copyfile(package.folder / name, target / name, follow_symlinks=False)


def _place(family: Path, target: Path, copy: bool) -> None:
    if copy:
        shutil.copytree(family, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    up = [".."] * (len(target.parent.parts) - len(family.parent.parts))
    target.symlink_to(Path(*up, family.name), target_is_directory=True)


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")

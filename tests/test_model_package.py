"""Model packages: onnxruntime's own classes open them, select by provider, and compute what torch computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import packages
import pytest

from klas_zoo.exporters.model_package import asset_uri, derive
from klas_zoo.exporters.package import Package
from klas_zoo.files import sha256_of

_OPEN = """
import json, sys
import numpy as np, onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import ModelPackage, ModelPackageContext, ModelPackageOptions
root, asset, images, out = sys.argv[1:]
info = ModelPackage.open(root).get_info()
context = ModelPackageContext(root)
options = ModelPackageOptions(ort.SessionOptions())
logits = {}
for name in context.get_component_names():
    component = context.select_component(name, options)
    assert component.get_selected_variant_name() == "cpu"
    logits[name] = component.create_session().run(None, {"images": np.load(images)})[0]
np.savez(out, **logits)
print(json.dumps({"info": info, "hash": ModelPackage.compute_directory_hash(asset), "eps": [
    context.get_variant_ep_name(name, variant)
    for name in context.get_component_names() for variant in context.get_variant_names(name)
]}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return packages.write_package(tmp_path_factory.mktemp("source") / "package")


@pytest.fixture(scope="module")
def folder(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model-package")
    verdicts = derive(package, folder, {})
    assert [one.status for one in verdicts] == ["verified"] * len(packages.ROUTES)
    return folder


@pytest.fixture(scope="module")
def onnxruntime_with_packages() -> list[str]:
    """What to put before `sys.path`: the classes are in onnxruntime 1.32 and later."""
    if hasattr(onnxruntime, "ModelPackage"):
        return []
    beside = Path(sys.prefix) / "onnxruntime-1.32"
    if not beside.is_dir():
        pytest.skip(f"needs onnxruntime 1.32: pip install --no-deps --target {beside} 'onnxruntime>=1.32'")
    return [str(beside)]


def test_onnxruntime_opens_every_component_and_computes_what_torch_computes(
    folder: Path, package: Package, onnxruntime_with_packages: list[str], tmp_path: Path
) -> None:
    references = package.references()
    np.save(tmp_path / "images.npy", references.images)
    (asset,) = (folder / "shared_assets").iterdir()
    before = "".join(f"import sys; sys.path.insert(0, {path!r})\n" for path in onnxruntime_with_packages)
    done = subprocess.run(
        [sys.executable, "-c", before + _OPEN, folder, asset, tmp_path / "images.npy", tmp_path / "logits.npz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["hash"] == asset.name.replace("-", ":", 1)
    assert set(told["eps"]) == {"CPUExecutionProvider", "CUDAExecutionProvider"}
    assert told["info"]["package_name"] == "made-up"
    found = np.load(tmp_path / "logits.npz")
    assert set(found) == set(map(str, packages.ROUTES))
    for name, wanted in references.logits.items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-4)


def test_accuracy_and_latency_stand_in_the_additional_metadata(folder: Path, package: Package) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == "1.0"
    for one in package.routes:
        component = manifest["components"][one.name]
        assert component["additional_metadata"]["top1"] == one.top1
        timed = component["variants"]["cpu"]["additional_metadata"]["latencies"]
        assert [latency["p50_ms"] for latency in timed] == [latency.p50_ms for latency in one.latencies]
        assert component["variants"]["cuda"]["additional_metadata"]["latencies"] == []


def test_weights_are_there_once_and_the_asset_is_named_by_its_content(folder: Path, package: Package) -> None:
    (asset,) = (folder / "shared_assets").iterdir()
    hashes = {path.name: sha256_of(path) for path in asset.iterdir()}
    assert asset_uri(hashes).replace(":", "-") == asset.name
    assert [path.name for path in folder.rglob("weights.bin")] == ["weights.bin"]
    assert hashes["weights.bin"] == package.manifest.files["weights.bin"].sha256


def test_the_name_of_an_asset_is_the_digest_of_what_sha256sum_would_print() -> None:
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    found = "c703ac0c3c578e7bc50eba0089746631b24582f42bedd483e3b4b9336210654d"  # by onnxruntime 1.32 itself
    assert asset_uri({"a.txt": hello}) == f"sha256:{found}"

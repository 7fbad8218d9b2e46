"""`pip install klas-zoo` without extras: what it brings on which platform, what works with it, and what says what is
missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import light
import onnx_networks
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_adding import ANIMALS
from toys import write_images

from klas_zoo.extras import MODULES, explained

HEAVY = {"torch", "torchvision", "timm", "matplotlib", "fvcore", "onnxscript", "onnx-ir"}
# as pip names platforms, what markers see there, and the name of the runtime's package
PLATFORMS = {
    "linux-x86_64": (
        ("manylinux2014_x86_64", "manylinux_2_27_x86_64", "manylinux_2_28_x86_64"),
        {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix"},
        "onnxruntime-gpu",
    ),
    "linux-arm64": (
        ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64"),
        {"sys_platform": "linux", "platform_machine": "aarch64", "platform_system": "Linux", "os_name": "posix"},
        "onnxruntime",
    ),
    "macos-arm64": (
        ("macosx_14_0_arm64",),
        {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin", "os_name": "posix"},
        "onnxruntime",
    ),
}
BUILDS = (
    ("build", "--family", "deit-micro"),
    ("export", "--family", "deit-micro", "--out", "package"),
    ("finetune", "--family", "deit-micro", "--data", "images", "--out", "anchors"),
    ("profile", "--family", "deit-micro"),
    ("routes", "--family", "deit-micro"),
)


def project() -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, list[str]]] = tomllib.loads((light.ROOT / "pyproject.toml").read_text())["project"]
    return found


def required(platform: str) -> list[Requirement]:
    """What pip would be asked for on a platform."""
    environment = {**PLATFORMS[platform][1], "extra": ""}
    return [one for one in light.requirements() if one.marker is None or one.marker.evaluate(environment)]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_exactly_one_onnxruntime_is_asked_for_on_every_platform_and_nothing_heavy(platform: str) -> None:
    names = [canonicalize_name(one.name) for one in required(platform)]
    assert [name for name in names if name.startswith("onnxruntime")] == [PLATFORMS[platform][2]]
    assert not HEAVY & set(names)


def test_windows_is_told_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile((light.ROOT / "zoo" / "__init__.py").read_text(encoding="utf-8"), "klas_zoo", "exec")
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(ImportError) as refused:
        exec(code, {"__name__": "klas_zoo"})
    monkeypatch.undo()
    assert str(refused.value) == "klas-zoo runs on Linux and macOS. On Windows, install and run it in WSL 2."


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_light_installation_can_be_had_as_wheels(platform: str, tmp_path: Path) -> None:
    tags, _, runtime = PLATFORMS[platform]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--target", tmp_path,
         "--only-binary", ":all:", "--report", tmp_path / "report.json",
         *(word for tag in tags for word in ("--platform", tag)),
         *(f"{one.name}{one.specifier}" for one in required(platform))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and ("No module named pip" in done.stderr or "NewConnectionError" in done.stderr):
        pytest.skip(f"needs pip and a package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    names = {canonicalize_name(one["metadata"]["name"]) for one in found}
    assert runtime in names and not HEAVY & names
    assert len([name for name in names if name in ("onnxruntime", "onnxruntime-gpu")]) == 1


def test_every_module_of_the_training_side_belongs_to_an_extra() -> None:
    extra = project()["optional-dependencies"]["build"]
    named = {canonicalize_name(Requirement(text).name) for text in extra}
    installed = metadata.packages_distributions()
    ours = [module for module, extra in MODULES.items() if extra == "build"]
    assert {canonicalize_name(one) for module in ours for one in installed.get(module, [module])} == named


def test_the_light_installation_has_no_torch() -> None:
    done = light.run(code="import numpy, onnx, onnxruntime\nimport torch")
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


@pytest.mark.parametrize("arguments", BUILDS, ids=[one[0] for one in BUILDS])
def test_a_command_of_the_training_side_names_what_brings_it(arguments: tuple[str, ...], tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", ANIMALS, 1, size=(8, 8))
    paths = {"images": tmp_path / "images", "package": tmp_path / "package", "anchors": tmp_path / "anchors"}
    done = light.run(*(paths.get(one, one) for one in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: klas-zoo {arguments[0]} needs ")
    assert done.stderr.endswith("which is not installed: pip install 'klas-zoo[build]' brings it.\n")


def test_networks_of_timm_and_conversions_name_what_brings_them(tmp_path: Path) -> None:
    done = light.run("add", "timm:resnet18", "--top1", "70", "--top1-source", "timm", "--registry", tmp_path / "r")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: A network of timm needs timm, which is not installed: pip install 'klas-zoo[build]' brings it.\n",
    )
    file, data = onnx_networks.write(tmp_path / "ours.onnx"), write_images(tmp_path / "val", ANIMALS, 3, size=(8, 8))
    done = light.run("add", file, "--data", data, "--precision", "int8", "--registry", tmp_path / "r")
    assert done.returncode == 1 and "Converting a graph to int8 needs " in done.stderr
    assert "Traceback" not in done.stderr


def test_python_names_of_the_training_side_name_what_brings_them() -> None:
    code = (
        "import klas_zoo\n"
        "for use in (lambda: klas_zoo.Chain, lambda: klas_zoo.Family, lambda: klas_zoo.build('deit-micro')):\n"
        "    try: use()\n"
        "    except klas_zoo.KlasZooError as error: print(error)\n"
    )
    done = light.run(code=code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"klas_zoo.{name} needs {package}, which is not installed: pip install 'klas-zoo[build]' brings it."
        for name, package in (("Chain", "torch"), ("Family", "timm"), ("build", "torch"))
    ]


def test_an_import_that_no_extra_brings_stays_a_bug() -> None:
    with pytest.raises(ModuleNotFoundError), explained("this"):
        import a_module_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.slow
def test_a_network_is_added_picked_run_evaluated_packed_verified_and_installed_without_the_training_side(
    tmp_path: Path,
) -> None:
    file = onnx_networks.write(tmp_path / "ours.onnx")
    data = write_images(tmp_path / "val", ANIMALS, 10, size=(8, 8), seed=1)
    root = ("--registry", tmp_path / "registry")

    def works(*arguments: object) -> str:
        done = light.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    works("add", file, "--data", data, *root)
    picked = json.loads(works("pick", "--latency", "10s", "--json", *root))
    package = Path(picked["engine"]["path"]).parent
    assert "ours" in works("list", *root) and "verified" in works("verify", package)
    evaluated = json.loads(works("evaluate", package, "--data", data, "--json"))
    assert evaluated[0]["top1"] == pytest.approx(picked["engine"]["top1"])
    works("install", package, "--registry", tmp_path / "other")
    assert "ours" in works("show", "ours", "--registry", tmp_path / "other")
    works("registry", "check", "--registry", tmp_path / "other")
    for command in (("families",), ("devices",), ("doctor", "--json")):
        light.run(*command)
    code = (
        "import sys, numpy, klas_zoo\n"
        "with klas_zoo.pick('10s', registry=sys.argv[1]).load() as session:\n"
        "    print(session.run(numpy.zeros((2, 3, 8, 8), 'float32')).shape)\n"
    )
    done = light.run(tmp_path / "other", code=code)
    assert (done.stdout, done.stderr) == ("(2, 3)\n", "")

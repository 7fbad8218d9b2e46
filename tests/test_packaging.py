"""What is installed: the names, the files in the wheel, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import klas_zoo

ROOT = Path(__file__).parent.parent
FOLDERS = {"zoo": "klas_zoo", "exporters": "klas_zoo/exporters", "profiles": "klas_zoo/profiles"}


def test_every_public_name_can_be_imported_and_nothing_else_is_public() -> None:
    assert klas_zoo.__all__ == sorted(klas_zoo.__all__)
    assert all(getattr(klas_zoo, name) is not None for name in klas_zoo.__all__)
    assert dir(klas_zoo) == klas_zoo.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = klas_zoo.nothing


def test_importing_klas_zoo_and_picking_loads_nothing_heavy() -> None:
    code = (
        "import sys, klas_zoo; klas_zoo.pick; import klas_zoo.cli\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'timm', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_holds_every_module_and_data_file_and_no_others(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    _copy_sources(copy)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, copy],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == _expected()


# what is imported under another name than it is installed, where it may not be installed here
NAMED = {"pynvml": "nvidia-ml-py", "tensorrt_rtx": "tensorrt-rtx-cu13", "triton_python_backend_utils": None}


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {canonicalize_name(Requirement(one).name) for one in listed}
    installed = metadata.packages_distributions()
    missing = set()
    for path in (path for path in _sources() if path.parts[0] in FOLDERS and path.suffix == ".py"):
        for name in _imported(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            brought_by = [NAMED[name]] if name in NAMED else installed.get(name, [name])
            if brought_by != [None] and not {canonicalize_name(str(one)) for one in brought_by} & declared:
                missing.add(f"{name}, by {path}")
    assert not missing


def _imported(tree: ast.AST) -> set[str]:
    """Packages of others that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.name.partition(".")[0] for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names - {"klas_zoo"}


def _sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _copy_sources(target: Path) -> None:
    # a copy, because setuptools leaves build folders beside what it builds
    for path in _sources():
        if path.parts[0] in FOLDERS or len(path.parts) == 1:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes((ROOT / path).read_bytes())


def _expected() -> set[str]:
    return {
        f"{FOLDERS[path.parts[0]]}/{Path(*path.parts[1:])}" for path in _sources() if path.parts[0] in FOLDERS
    }

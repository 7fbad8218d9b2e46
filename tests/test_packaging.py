"""What is installed: the names, the files in the wheel, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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

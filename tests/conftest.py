"""Fixtures that several test modules share; all of them are small and the same in every run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import packages
import pytest
import torch
from hypothesis import settings
from toys import write_images

from klas_zoo.exporters import cascade_fitting
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec, read_family
from klas_zoo.files import locked
from klas_zoo.profiles import latency
from klas_zoo.profiles.timing import Method, time_in_turn

TINY_FAMILY = """
name = "tiny-vits"
input_shape = [3, 16, 16]
num_classes = 4

[[anchors]]
name = "half"
model = "deit_tiny_patch16_224"
arguments = { img_size = 16, patch_size = 8, embed_dim = 12, depth = 3, num_heads = 2 }

[[anchors]]
name = "train"
model = "deit_tiny_patch16_224"
arguments = { img_size = 16, patch_size = 8, embed_dim = 24, depth = 3, num_heads = 2 }

[[anchors]]
name = "float"
model = "deit_tiny_patch16_224"
arguments = { img_size = 16, patch_size = 8, embed_dim = 48, depth = 4, num_heads = 2 }
"""

# on a busy machine any example can take long
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


LONGEST = (
    "test_gpu_visit.py", "test_build.py", "test_census.py", "test_fake_cuda.py", "test_readers.py", "test_to_onnx.py",
    "test_build_integrity.py", "test_team.py", "test_installing.py", "test_export_family.py",
)  # fmt: skip
"""Files that take more than half a minute, longest first. Processes take whole files: none may be left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Processes that test together have to give a test one name: many objects print where in memory they lie."""
    return type(val).__name__ if " at 0x" in repr(val) and not hasattr(val, "__name__") else None


@pytest.fixture(scope="session", autouse=True)
def _shared_packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.getbasetemp()
    packages.SHARED = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def driver() -> Path:
    """The fake CUDA driver, compiled once a test run."""
    assert packages.SHARED is not None
    folder = packages.SHARED / "fake-cuda"
    try:
        with locked(packages.SHARED / "fake-cuda.lock"):
            if not (folder / "built").exists():
                fake_cuda.build(folder)
                (folder / "built").touch()
            return folder
    except fake_cuda.CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small family as a package, which no test changes."""
    return packages.write_package(tmp_path_factory.mktemp("packages") / "whole").folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # toys are too small to share out, and a busy machine makes threads wait for each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _few_runs() -> Iterator[None]:
    """The latencies of toys are not read: a second for each engine would be a third of every build."""
    few = {
        latency.BUILD_METHOD: Method(warmup_ms=5, min_runs=50, min_ms=0),
        cascade_fitting.CASCADE_METHOD: Method(warmup_ms=5, min_runs=20, min_ms=0),
    }

    def timed(runners: Any, method: Method, **options: Any) -> Any:
        return time_in_turn(runners, few.get(method, method), **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (latency, cascade_fitting):
            patch.setattr(module, "time_in_turn", timed)
        yield


@pytest.fixture
def tiny_spec(tmp_path: Path) -> FamilySpec:
    """Three Vision Transformers of five tokens, named like methods of nn.Module."""
    file = tmp_path / "tiny-vits.toml"
    file.write_text(TINY_FAMILY)
    return read_family(file)


@pytest.fixture
def tiny_family(tiny_spec: FamilySpec) -> Family:
    return load_family(tiny_spec, random_weights=True, seed=5)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes, 16 and 4 images each."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", ("ant", "bee", "cat"), 16, seed=1)
    write_images(folder / "val", ("ant", "bee", "cat"), 4, seed=2)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 512 kB, or of the size of its parameter."""
    size = getattr(request, "param", "512k")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)

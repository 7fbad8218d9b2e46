"""What two machines do together: one without a GPU builds, one with an A100, on the fake driver, measures and installs.

Kernels of that driver do nothing, and what comes back from the card is zeros. So every network here has a head of
zeros: its logits are zeros, and an engine that answers zeros is right.
"""

from __future__ import annotations

import json
from pathlib import Path

import fake_cuda
import pytest
import torch
from click.testing import CliRunner
from fake_cuda import Card
from safetensors.torch import save_file
from toy_family import networks, write_family
from toys import write_images

from klas_zoo.cli import main
from klas_zoo.registry import Registry
from klas_zoo.registry.picking import pick

pytestmark = pytest.mark.slow
A100 = Card(name="NVIDIA A100-SXM4-40GB", memory_mib=40960, zeros=True)
QUICK = ("--min-runs", "2", "--min-ms", "0", "--warmup-ms", "0", "--rounds", "1", "--stitches", "1")
# the block of a network that a device has to compute before it is measured is not zeros
THERE = """
import sys
import klas_zoo.profiles.devices as devices
devices.provider_problem = lambda provider: None
from klas_zoo.cli import main
main(sys.argv[1:])
"""


def here(*arguments: object) -> str:
    """A command on this machine, which has no GPU; gives what it printed."""
    found = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.stderr
    return found.stdout + found.stderr


def there(driver: Path, *arguments: object) -> str:
    """A command on the machine with the A100."""
    done = fake_cuda.run(driver, "-c", THERE, *map(str, arguments), card=A100)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silent")
    write_family(folder, name="silent", depth=2, checkpoints=True)
    torch.manual_seed(8)
    for name, made in networks(depth=2).items():
        state = {key: value.contiguous() for key, value in made.state_dict().items()}
        save_file(state | {key: torch.zeros_like(state[key]) for key in ("head.weight", "head.bias")},
                  folder / f"{name}.safetensors")  # fmt: skip
    for split, count in (("train", 16), ("val", 8)):
        write_images(folder / "images" / split, ("ant", "bee", "cat"), count, seed=count)
    return folder


@pytest.fixture(scope="module")
def built(family: Path, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """docs/profiles.md: a profile is measured where the A100 is and taken along; the build needs none."""
    root = tmp_path_factory.mktemp("machines")
    named = ("--family", family / "silent.toml")
    there(driver, "profile", *named, "--device", "a100", "--precision", "fp16", "--batch", "1,8", *QUICK,
          "--registry", root / "there")  # fmt: skip
    there(driver, "profile", "export", root / "a100.json", "--device", "a100", "--registry", root / "there")
    here("profile", "import", root / "a100.json", *named, "--registry", root / "here")
    said = here(
        "build", *named, "--data", family / "images", "--device", "a100", "--registry", root / "here",
        "--tune-steps", "0", "--init-images", "16", "--probe-epochs", "1", "--probe-batch", "8", "--buckets", "2",
        "--tolerance", "0", "--threads", "1", "--latency-batch", "1", "--latency-batch", "8", "--force",
    )  # fmt: skip
    return root, said


def test_a_profile_of_another_machine_prices_the_engines_of_a_build(built: tuple[Path, str]) -> None:
    root, said = built
    assert "Latencies on a100 are those of its profile of " in said
    assert "Nothing is timed: a100 is not on this machine" in said
    found = pick("10s", device="a100", registry=root / "here", measured_only=False)
    assert (found.engine.precision, found.engine.runtime) == ("fp16", "onnxruntime")
    assert found.latency.origin in ("measured", "interpolated")
    assert found.latency.hardware.startswith("NVIDIA A100-SXM4-40GB, compute capability 8.0")
    anchors = [one for one in Registry.open(root / "here", create=False).engines() if one.route.is_anchor]
    for one in anchors:
        if (one.runtime, one.precision) == ("onnxruntime", "fp16"):
            assert {found.origin for found in one.latencies} == {"measured"}, one.latencies
            assert {found.batch for found in one.latencies} == {1, 8}


LOADED = """
import json, sys
import numpy as np
import klas_zoo
found = klas_zoo.pick("10s", device="cuda", registry=sys.argv[1], measured_only=True)
with found.load() as session:
    logits = session.run(np.ones((2, 3, 16, 16), np.float32))
print(json.dumps([session.provider, logits.tolist(), "torch" in sys.modules, found.engine.precision]))
"""


def test_what_was_built_without_a_gpu_is_installed_where_the_gpu_is(built: tuple[Path, str], driver: Path) -> None:
    root, _ = built
    engines = Registry.open(root / "here", create=False).engines()
    package = {one.path.parent for one in engines if one.precision == "fp16"}.pop()
    said = there(driver, "install", package, "--device", "cuda", "--registry", root / "target")
    assert "silent" in said
    for one in Registry.open(root / "target", create=False).engines():
        assert (one.device, one.status, one.precision) == ("a100", "verified", "fp16")
        assert {found.origin for found in one.latencies} == {"measured"}
        assert {found.provider for found in one.latencies} == {"CUDAExecutionProvider"}
        assert one.verification is not None and one.verification.rounded_images is None  # it ran on a GPU
    done = fake_cuda.run(driver, "-c", LOADED, str(root / "target"), card=A100)
    assert done.returncode == 0, done.stderr
    provider, logits, torch_there, precision = json.loads(done.stdout.splitlines()[-1])
    assert (provider, torch_there, precision) == ("CUDAExecutionProvider", False, "fp16")
    assert logits == [[0.0] * 3] * 2


def test_a_package_is_not_installed_on_a_card_that_computes_nothing(
    built: tuple[Path, str], driver: Path, tmp_path: Path
) -> None:
    root, _ = built
    engines = Registry.open(root / "here", create=False).engines()
    package = {one.path.parent for one in engines if one.precision == "fp16"}.pop()
    card = Card(name=A100.name, memory_mib=40960, kernels=False)
    asked = ("install", str(package), "--device", "cuda", "--registry", str(tmp_path / "r"))
    done = fake_cuda.run(driver, "-m", "klas_zoo", *asked, card=card)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "this package has no kernels for NVIDIA A100-SXM4-40GB (compute capability 8.0)" in done.stderr
    assert not (tmp_path / "r" / "packages").exists()

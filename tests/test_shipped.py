"""Tuned supernets that come with a family, and anchors that tuning must not cost anything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from toys import IMAGE, random_batches, three_chains

from klas_zoo.errors import WeightsError
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import find_family
from klas_zoo.route_tensors import OwnTensors
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.anchors import keep_better_anchors
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.shipped import ShippedSupernet, packed, unpacked, write_shipped

ROUTES = [Route.anchor("tiny", 3), Route.anchor("small", 4), Route.stitch("tiny", 2, "small", 1, 4)]
IMAGES = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(2))


def family() -> Family:
    chains = three_chains()
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Family.of("toys", {"tiny": chains["tiny"], "small": chains["small"]}, config)


def tuned(own: OwnTensors | None = None, step: float = 1e-3) -> Supernet:
    torch.manual_seed(3)
    net = Supernet(family().chains, ROUTES, own).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(step * torch.randn_like(parameter))
    return net


def header(of: Family, **changes: Any) -> dict[str, Any]:
    routes = [[route.to_json(), 50.0 + index] for index, route in enumerate(ROUTES)]
    found = {"anchors": of.anchor_fingerprints, "originals": [], "routes": routes, "images": "made up"}
    return {**found, **changes}


@pytest.mark.parametrize("own", [None, OwnTensors(norms=True, rank=2)])
def test_a_supernet_comes_back_nearly_as_it_was(tmp_path: Path, own: OwnTensors | None) -> None:
    of, net, file = family(), tuned(own), tmp_path / "supernet.safetensors"
    write_shipped(file, net, of.chains, header(of))
    shipped = ShippedSupernet.read(file)
    again = shipped.load(of.chains, of.anchor_fingerprints)
    assert shipped.routes == tuple(ROUTES)
    assert shipped.top1[ROUTES[2]] == 52.0
    for route in ROUTES:
        assert torch.allclose(again(IMAGES, route), net(IMAGES, route), atol=2e-3)
        assert not torch.equal(again(IMAGES, route), IMAGES.new_zeros(4, 5))
    assert of.chains["tiny"] is not again.chain("tiny")


def test_matrices_are_int8_differences_and_what_did_not_change_is_left_out(tmp_path: Path) -> None:
    of, net, file = family(), tuned(), tmp_path / "supernet.safetensors"
    net.chain("tiny").load_state_dict(of.chains["tiny"].state_dict())
    write_shipped(file, net, of.chains, header(of))
    stored = load_file(file)
    assert not [name for name in stored if "anchor_tiny" in name]
    kinds = {name.rpartition(".")[2]: one.dtype for name, one in stored.items() if "anchor_small" in name}
    assert kinds == {"delta": torch.int8, "scale": torch.float16, "bias": torch.float16}


def test_rounding_is_half_a_step_of_each_row_at_most() -> None:
    base = {"w": torch.randn(6, 10), "b": torch.randn(6)}
    state = {"w": base["w"] + 0.01 * torch.randn(6, 10), "b": base["b"] + 1}
    again = unpacked(packed(state, base), base)
    step = (state["w"] - base["w"]).abs().amax(1, keepdim=True) / 127
    assert ((again["w"] - state["w"]).abs() <= 0.51 * step + 1e-6).all()
    assert torch.allclose(again["b"], state["b"], atol=2e-3)


def test_an_anchor_that_tuning_made_worse_runs_with_the_weights_it_came_with(tmp_path: Path) -> None:
    of, file = family(), tmp_path / "supernet.safetensors"
    write_shipped(file, tuned(step=0.1), of.chains, header(of, originals=["small"]))
    again = ShippedSupernet.read(file).load(of.chains, of.anchor_fingerprints)
    assert torch.equal(again(IMAGES, ROUTES[1]), of.chains["small"](IMAGES))
    assert not torch.allclose(again(IMAGES, ROUTES[0]), of.chains["tiny"](IMAGES), atol=1e-3)


def test_a_supernet_of_other_anchors_is_refused(tmp_path: Path) -> None:
    of, file = family(), tmp_path / "supernet.safetensors"
    write_shipped(file, tuned(), of.chains, header(of))
    with pytest.raises(WeightsError, match="was tuned from other weights than these anchors have: pass --preset quick"):
        ShippedSupernet.read(file).load(of.chains, {**of.anchor_fingerprints, "tiny": "another"})


@pytest.mark.parametrize("kind", ["delta", "bias"])
def test_a_file_with_an_earlier_versions_tensor_names_is_refused(tmp_path: Path, kind: str) -> None:
    of, file = family(), tmp_path / "supernet.safetensors"
    write_shipped(file, tuned(), of.chains, header(of))
    stored = load_file(file)
    renamed = {
        name.replace(".head.", ".head.part.") if name.endswith((kind, "scale")) else name: one
        for name, one in stored.items()
    }
    assert renamed.keys() != stored.keys()
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(renamed, file, metadata)
    with pytest.raises(WeightsError, match="is not the supernet of this family: install klas-zoo again") as caught:
        ShippedSupernet.read(file).load(of.chains, of.anchor_fingerprints)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "supernet.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as a family's tuned supernet"):
        ShippedSupernet.read(file)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    of, file = family(), tmp_path / "supernet.safetensors"
    write_shipped(file, tuned(), of.chains, header(of, schema_version=99))
    with pytest.raises(WeightsError, match="written by a newer klas-zoo"):
        ShippedSupernet.read(file)


@pytest.mark.parametrize("better", ["tuned", "original"])
def test_each_anchor_keeps_the_better_of_its_weights(better: str) -> None:
    net = Supernet(family().chains, ROUTES).eval()
    originals = copy.deepcopy(family().chains)
    images = [images for images, _ in random_batches((16, 16))]
    worse = net.chain("small") if better == "original" else originals["small"]
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher = originals["small"] if better == "original" else net.chain("small")
    batches = [(x, teacher(x).argmax(1)) for x in images]
    expected = teacher(IMAGES)
    choice = keep_better_anchors(net, originals, batches)["small"]
    assert choice.keeps_tuned == (better == "tuned")
    assert max(choice.before, choice.after) == 100.0
    assert torch.equal(net(IMAGES, ROUTES[1]), expected)
    assert evaluate(net, [ROUTES[1]], batches)[ROUTES[1]] == 100.0


def test_equal_accuracy_keeps_the_tuned_weights() -> None:
    net = Supernet(family().chains, ROUTES).eval()
    found = keep_better_anchors(net, family().chains, random_batches((8,)))
    assert all(choice.keeps_tuned for choice in found.values())
    assert not net.originals


def test_the_embedded_familys_supernet_belongs_to_its_anchors() -> None:
    spec = find_family("deit-micro")
    found = load_family(spec)
    assert found.supernet is not None
    shipped = ShippedSupernet.read(found.supernet)
    net = shipped.load(found.chains, found.anchor_fingerprints)
    assert {route.segments[0].anchor for route in shipped.routes if route.is_anchor} == {"tiny", "small", "base"}
    assert sum(not route.is_anchor for route in shipped.routes) == 14
    size = sum(file.stat().st_size for file in spec.supernet.parent.glob("*.safetensors"))  # type: ignore[union-attr]
    assert size <= 16e6
    assert net(torch.zeros(1, 3, 32, 32), shipped.routes[1]).shape == (1, 10)
    # a family with other weights has no tuned supernet
    assert load_family(spec, random_weights=True).supernet is None

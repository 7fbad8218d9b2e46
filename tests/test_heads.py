"""New heads on frozen anchors: fitted to features in one pass, folded into the anchor's own classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import LEVIT, SHAPE, VIT, build
from torch import Tensor, nn
from toys import map_chain, random_batches, same_state, snapshot, token_chain

from klas_zoo.building.label_check import check_labels
from klas_zoo.building.new_heads import with_new_heads
from klas_zoo.chains import Chain
from klas_zoo.data.loading import load_data
from klas_zoo.errors import FamilyError, SelectionError
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import builtin_families
from klas_zoo.progress.listeners import NullListener
from klas_zoo.tuning import heads
from klas_zoo.tuning.heads import fit_head

Batches = list[tuple[Tensor, Tensor]]


def relabelled(chain: Chain, batches: Batches, seed: int = 1) -> Batches:
    """Labels that a linear map of the chain's own pooled features knows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        features = [[*chain.walk(images)][-1].flatten(1) for images, _ in batches]
    weight = torch.randn(features[0].shape[1], chain.classes, generator=generator)
    mean = torch.cat(features).mean(0)
    labels = [((part - mean) @ weight).argmax(1) for part in features]
    return [(images, label) for (images, _), label in zip(batches, labels, strict=True)]


class FlatHead(nn.Module):
    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.flatten(1))


def flat_chain() -> Chain:
    chain = token_chain()
    return Chain(chain.stem, list(chain.blocks), FlatHead(4 * 6, 5), input_shape=(3, 8, 8)).eval()


def accuracy(chain: Chain, batches: Batches) -> float:
    with torch.inference_mode():
        right = [(chain(images).argmax(1) == labels).float() for images, labels in batches]
    return float(torch.cat(right).mean())


def test_a_head_learns_what_a_linear_map_of_the_features_knows() -> None:
    chain = flat_chain()
    train = relabelled(chain, random_batches([64] * 12, seed=3))
    test = relabelled(chain, random_batches([64] * 4, seed=4))
    rest = snapshot(nn.ModuleList([chain.stem, chain.blocks]))
    assert accuracy(chain, test) < 0.5
    head = fit_head(chain, train, test)
    assert accuracy(chain, test) > 0.85
    assert head.top1 == pytest.approx(100 * accuracy(chain, test), abs=1.0)
    assert same_state(nn.ModuleList([chain.stem, chain.blocks]), rest)


def test_a_head_is_the_minimum_of_its_loss() -> None:
    """Against a plain gradient descent on the same penalised loss, computed independently."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator) * 3 + 1
    labels = (features @ torch.randn(6, 3, generator=generator)).argmax(1)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    weight, bias = torch.zeros(3, 6, requires_grad=True), torch.zeros(3, requires_grad=True)
    heads._minimise(standard, labels, weight, bias, 0.1)
    with torch.no_grad():
        error = torch.softmax(standard @ weight.T + bias, 1) - nn.functional.one_hot(labels, 3)
        gradient = error.T @ standard / 200 + 0.1 * weight
    assert gradient.abs().max() < 2e-3
    assert error.mean(0).abs().max() < 2e-3


@pytest.mark.parametrize("name", ["vit", "distilled", "levit", "resnet"])
def test_every_architectures_own_classifier_is_fitted(name: str) -> None:
    models = {
        "vit": ("vit_tiny_patch16_224", VIT), "distilled": ("deit_tiny_distilled_patch16_224", VIT),
        "levit": ("levit_128s", LEVIT), "resnet": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}),
    }  # fmt: skip
    model, arguments = models[name]
    chain = Chain.of(build(model, arguments | {"num_classes": 3}).eval(), SHAPE).eval()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        labels = torch.randint(3, (24,), generator=generator)
        images = torch.randn(24, *SHAPE, generator=generator) * 0.3 + (labels.float() - 1)[:, None, None, None]
        batches.append((images, labels))
    head = fit_head(chain, batches[:4], batches[4:])
    assert head.top1 > 90
    assert accuracy(chain, batches[4:]) > 0.9


def test_a_network_without_a_linear_classifier_is_refused() -> None:
    chain = map_chain()
    chain.classes = 77
    with pytest.raises(FamilyError, match="needs a linear classifier for 77 classes"):
        fit_head(chain, random_batches(), random_batches())


def test_no_images_and_bad_features_are_one_sentence() -> None:
    with pytest.raises(SelectionError, match="There are no images to fit a head to"):
        fit_head(flat_chain(), [], [])
    chain = flat_chain()
    with torch.no_grad():
        chain.blocks[1][0].weight.fill_(float("nan"))
    with pytest.raises(SelectionError, match="Features before the head are not finite"):
        fit_head(chain, random_batches(), random_batches())


@pytest.fixture
def other_classes(tmp_path: Path) -> Family:
    """deit-micro with checkpoints of 7 other classes, for CIFAR-10's ten."""
    spec = builtin_families()["deit-micro"]
    for anchor in spec.anchors:
        assert anchor.checkpoint is not None
        state = load_file(anchor.checkpoint)
        state |= {name: state[name][:7].contiguous() for name in ("head.weight", "head.bias")}
        save_file(state, tmp_path / f"{anchor.name}.safetensors")
    return load_family(spec, weights_folder=tmp_path, new_heads=True)


def test_checkpoints_of_other_classes_get_heads_that_know_the_users(other_classes: Family, tmp_path: Path) -> None:
    spec = builtin_families()["deit-micro"]
    assert other_classes.unfitted == {"tiny", "small", "base"}
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=other_classes.data_config)
    small = replace(data, train=type(data.train)(data.train.source, data.train.indices[:800], data.train.transform))
    before = other_classes.fingerprint
    fitted = with_new_heads(other_classes, small, cache=tmp_path / "c", listener=NullListener())
    assert fitted.fingerprint != before
    right = {one.anchor: one.right for one in check_labels(fitted, data)}
    assert min(right.values()) > 0.5
    # a second time they come from the cache, bit for bit
    again = load_family(spec, weights_folder=tmp_path, new_heads=True)
    assert with_new_heads(again, small, cache=tmp_path / "c", listener=NullListener()).fingerprint == fitted.fingerprint
    # damaged ones are not believed
    (file,) = (tmp_path / "c").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    again = load_family(spec, weights_folder=tmp_path, new_heads=True)
    assert with_new_heads(again, small, cache=tmp_path / "c", listener=NullListener()).fingerprint == fitted.fingerprint


def test_a_family_with_its_own_heads_is_left_alone(tmp_path: Path) -> None:
    spec = builtin_families()["deit-micro"]
    family = load_family(spec, new_heads=True)
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=family.data_config)
    assert family.unfitted == frozenset()
    assert with_new_heads(family, data, listener=NullListener()) is family

"""Networks that klas-zoo has never seen, as chains; and what is said where one cannot be cut."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
import torchvision
from small_models import SHAPE, small_model
from torch import Tensor, nn
from torch.nn import functional as F

from klas_zoo.chains import Chain, Layout, can_stitch
from klas_zoo.cutting import blocks as choosing
from klas_zoo.errors import FamilyError
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

IMAGE = (3, 16, 16)
CLASSES = 5


class Residual(nn.Module):
    """Maps (B, D, H, W): a convolution around which features go unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.convolution(F.relu(self.norm(maps)))


class Branching(nn.Module):
    """Decides by a size, as many networks do to check or to pad their input."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.block, self.side = Residual(width), side

    def forward(self, maps: Tensor) -> Tensor:
        batch, width, height, _ = maps.shape
        if height % self.side != 0:
            maps = F.pad(maps, (0, 0, 0, self.side - height % self.side))
        return self.block(maps.reshape(batch, width, self.side, -1)).view(batch, width, height, -1)


class Own(nn.Module):
    """A network of somebody's own: a stem, `blocks` one after another, a mean and a classifier."""

    def __init__(self, *blocks: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.body = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        maps = self.stem(images)
        for block in self.body:
            maps = block(maps)
        pooled = F.dropout(maps.mean((2, 3)), 0.5, self.training)
        return self.classifier(pooled)


def own(*blocks: nn.Module, seed: int = 0) -> Own:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Own(*(blocks or (Residual(6), Residual(6), Residual(6)))).eval()


def same(chain: Chain, model: nn.Module, shape: tuple[int, ...] = IMAGE, batch: int = 3) -> bool:
    images = torch.randn(batch, *shape)
    with torch.inference_mode():
        return torch.equal(chain(images), model(images))


def test_a_network_of_ones_own_is_a_chain_of_its_own_modules() -> None:
    model = own()
    chain = Chain.of(model, torch.zeros(1, *IMAGE))
    assert chain.stem is model.stem
    assert list(chain.blocks) == list(model.body)
    assert all(same(chain, model, batch=batch) for batch in (1, 2, 5))
    assert (chain.depth, chain.classes, chain.input_shape) == (3, CLASSES, IMAGE)
    assert set(chain.layouts) == {Layout(kind="maps", width=6, grid=(4, 4))}


def test_the_size_of_images_is_example_enough() -> None:
    model = own()
    assert Chain.of(model, IMAGE).layouts == Chain.of(model, torch.zeros(4, *IMAGE)).layouts


def test_decisions_by_sizes_are_taken_and_the_batch_stays_free() -> None:
    model = own(Branching(6, 2), Residual(6), Branching(6, 3))
    chain = Chain.of(model, IMAGE)
    assert chain.depth == 3
    assert all(same(chain, model, batch=batch) for batch in (1, 4))


class Gate(nn.Module):
    """Decides by values, which no recording can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(6)

    def forward(self, maps: Tensor) -> Tensor:
        return self.block(maps) if maps.mean() > 0 else maps


def test_a_block_that_decides_by_values_stays_whole_and_its_network_is_cut() -> None:
    gate = Gate()
    model = own(Residual(6), gate, Residual(6))
    chain = Chain.of(model, IMAGE)
    assert chain.blocks[1] is gate
    for sign in (-1, 1):
        images = sign * torch.rand(2, *IMAGE)
        with torch.inference_mode():
            assert torch.equal(chain(images), model(images))


def test_recording_leaves_mode_weights_and_statistics_of_a_model_alone() -> None:
    model = own().train()
    before = copy.deepcopy(model.state_dict())
    chain = Chain.of(model, IMAGE)
    assert all(part.training for part in model.modules())
    assert all(part.training for part in chain.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dropout_by_a_function_is_dropout_in_a_chain() -> None:
    chain = Chain.of(own(), IMAGE)
    images = torch.randn(2, *IMAGE)
    assert torch.equal(chain(images), chain(images))
    assert not torch.equal(chain.train()(images), chain(images))


def test_what_a_model_keeps_between_passes_holds_nothing_of_the_recording() -> None:
    model = small_model("levit")
    images = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        before = model(images)
        chain = Chain.of(model, SHAPE)
        assert torch.equal(model(images), before)
        assert torch.equal(chain(images), before)
    kept = [one.attention_bias_cache for one in model.modules() if hasattr(one, "attention_bias_cache")]
    assert kept and all(isinstance(value, Tensor) for cache in kept for value in cache.values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda chain: pickle.loads(pickle.dumps(chain))])
@pytest.mark.parametrize("name", ["deit", "levit", "swin"])
def test_a_chain_can_be_copied_and_pickled(name: str, copied: Any) -> None:
    chain = Chain.of(small_model(name), SHAPE)
    other = copied(chain)
    images = torch.randn(2, *SHAPE)
    with torch.inference_mode():
        assert torch.equal(other(images), chain(images))
    assert {id(p) for p in other.parameters()}.isdisjoint({id(p) for p in chain.parameters()})


@pytest.mark.parametrize(
    ("build", "depth", "kind"),
    [
        (lambda: torchvision.models.resnet18(num_classes=7), 8, "maps"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), 12, "maps"),
        (lambda: torchvision.models.convnext_tiny(num_classes=7), 18, "maps"),
        (lambda: torchvision.models.swin_t(num_classes=7), 12, "nhwc"),
        (lambda: torchvision.models.regnet_y_400mf(num_classes=7), 16, "maps"),
        (
            lambda: torchvision.models.VisionTransformer(
                image_size=64, patch_size=16, num_layers=4, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=7
            ),
            4,
            "tokens",
        ),
        (lambda: torchvision.models.vgg11(num_classes=7), 7, "maps"),
    ],
    ids=["resnet", "mobilenetv3", "convnext", "swin", "regnet", "vit", "vgg"],
)
def test_torchvisions_networks_are_chains(build: Any, depth: int, kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    chain = Chain.of(model, SHAPE)
    assert same(chain, model, SHAPE)
    assert (chain.depth, chain.layouts[1].kind) == (depth, kind)


def test_a_network_of_layers_is_grouped_into_blocks_that_begin_and_end_with_work() -> None:
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Conv2d(6, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU()]
    model = own(*layers)
    chain = Chain.of(model, IMAGE)
    assert same(chain, model)
    assert all(any(isinstance(one, nn.Conv2d) for one in block.modules()) for block in chain.blocks)


def test_a_deep_network_has_blocks_of_even_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MOST", 4)
    model = own(*(Residual(6) for _ in range(10)))
    chain = Chain.of(model, IMAGE)
    assert same(chain, model)
    sizes = [sum(isinstance(one, Residual) for one in block.modules()) for block in chain.blocks]
    assert (sum(sizes), len(sizes)) == (10, 4)
    assert max(sizes) - min(sizes) <= 1


def test_networks_of_any_kind_are_stitched_to_each_other() -> None:
    chains = {"own": Chain.of(own(), IMAGE), "vit": Chain.of(small_vit(), IMAGE)}
    assert can_stitch(chains["own"], 2, chains["vit"], 1)
    net = Supernet(chains, [Route.stitch("own", 2, "vit", 1, chains["vit"].depth)]).eval()
    assert net(torch.randn(2, *IMAGE), net.routes[0]).shape == (2, CLASSES)


def small_vit() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
    return timm.create_model(
        "vit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=CLASSES, **sizes
    ).eval()


class MixedViT(timm.models.VisionTransformer):
    """A subclass that does something else between its blocks."""

    def forward_features(self, images: Tensor, **_: Any) -> Tensor:
        tokens = self._pos_embed(self.patch_embed(images))
        for block in self.blocks:
            tokens = block(tokens) * 2 - tokens.mean(1, keepdim=True)
        return self.norm(tokens)


def test_what_a_subclass_does_between_its_blocks_is_part_of_the_chain() -> None:
    model = MixedViT(img_size=16, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=CLASSES).eval()
    chain = Chain.of(model, IMAGE)
    assert chain.depth >= 3
    assert same(chain, model)


def test_tables_that_depend_on_no_image_are_computed_where_they_are_read() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.classifier = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, CLASSES)
            self.body = nn.ModuleList(Residual(6) for _ in range(3))
            self.register_buffer("angles", torch.rand(6, 4, 4))

        def forward(self, images: Tensor) -> Tensor:
            maps, table = self.stem(images), self.angles.cos()
            for block in self.body:
                maps = block(maps * table)
            return self.classifier(maps.mean((2, 3)))

    model = Rotated().eval()
    chain = Chain.of(model, IMAGE)
    assert chain.depth == 3
    assert same(chain, model)


class Refused(nn.Module):
    """Passes images through a stem and to `body`, a function of maps that gives logits."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.stem, self.block, self.other = nn.Conv2d(3, 6, 4, 4), Residual(6), Residual(6)
        self.classifier = nn.Linear(6, CLASSES)
        self._body = body

    def forward(self, images: Tensor) -> Tensor:
        return self._body(self, self.stem(images))

    def head(self, maps: Tensor) -> Tensor:
        return self.classifier(maps.mean((2, 3)))


def by_values(net: Refused, maps: Tensor) -> Tensor:
    return net.head(net.block(maps) if maps.sum() > 0 else net.other(maps))


def by_a_tuple(net: Refused, maps: Tensor) -> Tensor:
    pair = (maps, maps.relu())
    for _ in range(3):
        pair = (net.block(pair[0]) + pair[1], net.other(pair[1]))
    return net.head(pair[0] + pair[1])


def with_shared_weights(net: Refused, maps: Tensor) -> Tensor:
    for _ in range(3):
        maps = net.block(maps)
    return net.head(maps)


def by_a_number(net: Refused, maps: Tensor) -> Tensor:
    return net.head(net.block(maps) * float(maps.amax()))


def image_by_image(net: Refused, maps: Tensor) -> Tensor:
    return torch.cat([net.head(net.block(maps[k : k + 1])) for k in range(maps.shape[0])])


def a_dictionary(net: Refused, maps: Tensor) -> Tensor:
    return {"logits": net.head(net.block(maps)), "maps": maps}  # type: ignore[return-value]


def all_in_place(net: Refused, maps: Tensor) -> Tensor:
    for block in (net.block, net.other):
        maps.add_(block.convolution(maps))
    return net.head(maps)


def two_tensors(net: Refused, maps: Tensor) -> Tensor:
    return net.head(net.other(net.block(maps))), maps  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (by_values, r"its forward pass decides by the values of a tensor \(test_cutting.py, line \d+: return net.head"),
        (by_a_tuple, r"up to \d+ tensors go from one layer to the next, and a seam is one tensor"),
        (with_shared_weights, r"share the weights block\..* Give each block weights of its own \(copy.deepcopy\)"),
        (by_a_number, r"its forward pass takes a number out of a tensor \(test_cutting.py, line \d+: return net.head"),
        (image_by_image, r"its forward pass counts the images of a batch one by one \(test_cutting.py, line \d+: "),
        (a_dictionary, r"^Refused returns a dictionary \(logits, maps\), not logits \(B, classes\): wrap it"),
        (
            all_in_place,
            r"its layers change the features at every seam in place\. Build it with inplace=False, or build",
        ),
        (two_tensors, r"^Refused returns 2 tensors, not logits \(B, classes\): wrap it"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason_and_a_way_out(body: Any, sentence: str) -> None:
    with pytest.raises(FamilyError, match=sentence) as caught:
        Chain.of(Refused(body).eval(), IMAGE)
    assert "\n" not in str(caught.value)
    assert body in (two_tensors, a_dictionary) or "klas_zoo.Chain(stem, blocks, head" in str(caught.value)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps.relu_() + self.convolution(maps)


def test_there_is_no_seam_where_the_next_block_changes_features_in_place() -> None:
    model = own(Residual(6), InPlace(), Residual(6), Residual(6))
    chain = Chain.of(model, IMAGE)
    assert same(chain, model)
    with torch.no_grad():
        features = chain.stem(torch.randn(2, *IMAGE))
        for part in (*chain.blocks, chain.head):
            before = features.clone()
            after = part(features)
            assert torch.equal(features, before)
            features = after
    assert 2 <= chain.depth <= 3


def test_tensors_made_for_each_image_are_recorded() -> None:
    class Made(Own):
        def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
            maps = self.stem(images)
            batch = maps.shape[0]
            table = torch.arange(4.0).expand(batch, 1, 4, -1) + torch.ones(batch, 1, 1, 1).repeat(batch and 1, 1, 4, 4)
            for block in self.body:
                maps = block(maps + table * torch.full((batch, 1, 1, 1), 0.5) + table.new_zeros(batch, 6, 4, 4))
            return self.classifier(maps.mean((2, 3)))

    expand, ones = torch.Tensor.expand, torch.ones
    model = Made(Residual(6), Residual(6), Residual(6)).eval()
    chain = Chain.of(model, IMAGE)
    assert chain.depth == 3
    assert all(same(chain, model, batch=batch) for batch in (1, 2, 5))
    assert (torch.Tensor.expand, torch.ones) == (expand, ones)
    assert "expand" not in vars(torch.Tensor)


def test_a_network_that_depends_on_how_many_images_there_are_is_refused() -> None:
    class Centred(Own):
        def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(images / (1 if images.shape[0] > 1 else 2))

    with pytest.raises(FamilyError, match="what was recorded for 2 images is not what it computes for 1"):
        Chain.of(Centred(Residual(6), Residual(6)).eval(), IMAGE)


def test_an_example_that_is_no_batch_of_images_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"An example is a batch of images \(B, C, H, W\), not \(3, 16\)\."):
        Chain.of(own(), torch.zeros(3, 16))


def test_images_that_the_network_itself_does_not_take_are_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        Chain.of(own(), (1, 16, 16))


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        (lambda: [Residual(6), InPlace()], r"^Block 2 changes the features it is given in place, and routes .* clone"),
        (lambda: 2 * [Residual(6)], r"^Block 2 shares its weight .* with block 1: give each part its own \(copy"),
        (lambda: [Pair(), Residual(6)], r"^Block 1 gives a tuple .* a seam is one tensor, so concatenate"),
    ],
    ids=["in place", "shared", "tuple"],
)
def test_blocks_put_together_by_hand_are_held_to_the_same_rules(blocks: Any, sentence: str) -> None:
    model = own()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.classifier)
    with pytest.raises(FamilyError, match=sentence):
        Chain(model.stem, blocks(), head, input_shape=IMAGE)


class Pair(nn.Module):
    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        return maps, maps


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("caformer_s18", ["maps", "tokens"]), ("mambaout_femto", ["nhwc"]), ("tiny_vit_5m_224", ["maps", "nhwc"])],
)
def test_channels_lie_where_the_layers_around_a_seam_read_them(name: str, kinds: list[str]) -> None:
    chain = Chain.of(timm.create_model(name, num_classes=7).eval(), (3, 224, 224))
    found = {layout.kind for layout in chain.layouts}
    assert sorted(found) == kinds
    # grids shrink and channels grow from stage to stage, whatever the order in memory
    assert all(a.grid[0] >= b.grid[0] and a.width <= b.width for a, b in pairwise(chain.layouts))


def test_tokens_that_are_sorted_into_groups_lie_on_no_known_grid() -> None:
    chain = Chain.of(timm.create_model("hiera_tiny_224", num_classes=7).eval(), (3, 224, 224))
    assert {len(layout.grid) for layout in chain.layouts} == {1}

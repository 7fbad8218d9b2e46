"""Building anchors and loading their weights."""

from __future__ import annotations

import importlib
import pickle
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from safetensors.torch import save_file
from torch import nn
from toys import CLASSES, IMAGE, same_state, snapshot, three_chains, token_chain

from klas_zoo.chains import Chain
from klas_zoo.data.loading import batches, load_data
from klas_zoo.errors import FamilyError, UnknownName, WeightsError
from klas_zoo.families.anchors import Family, _common, load_family, read_state_dict
from klas_zoo.families.specs import FamilySpec, builtin_families, read_family
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet


class Touch:
    """A pickle of it makes a file when it is read by someone careless."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def models(spec: FamilySpec, seed: int = 0) -> dict[str, nn.Module]:
    """Every anchor as timm builds it, with weights of its own."""
    torch.manual_seed(seed)
    return {
        anchor.name: timm.create_model(anchor.model, num_classes=spec.num_classes, **anchor.arguments)
        for anchor in spec.anchors
    }


def put(folder: Path, spec: FamilySpec, suffix: str = ".safetensors") -> dict[str, nn.Module]:
    """Writes the weights of every anchor and tells which models they are of."""
    folder.mkdir(exist_ok=True)
    built = models(spec)
    for name, model in built.items():
        if suffix == ".safetensors":
            save_file(model.state_dict(), folder / f"{name}{suffix}")
        else:
            torch.save(model.state_dict(), folder / f"{name}{suffix}")
    return built


def test_a_family_holds_its_anchors_in_order_and_in_evaluation_mode(tiny_family: Family) -> None:
    assert list(tiny_family.chains) == ["half", "train", "float"]
    assert not any(part.training for chain in tiny_family.chains.values() for part in chain.modules())
    assert (tiny_family.name, tiny_family.input_shape, tiny_family.num_classes) == ("tiny-vits", (3, 16, 16), 4)
    assert tiny_family.data_config["input_size"] == (3, 16, 16)
    assert tiny_family.data_config["mean"] == (0.485, 0.456, 0.406)
    assert tiny_family.weights == "random"


def test_anchors_may_be_named_like_methods_of_modules(tiny_family: Family) -> None:
    chains = tiny_family.chains
    net = Supernet(chains, [Route.stitch("half", 2, "float", 1, 4)]).float().eval()
    assert net.chain("half") is chains["half"]
    assert net(torch.zeros(1, 3, 16, 16), net.routes[0]).shape == (1, 4)


def test_random_weights_come_from_the_seed_and_leave_torchs_own_alone(tiny_spec: FamilySpec) -> None:
    state = torch.get_rng_state()
    one, same, other = (load_family(tiny_spec, random_weights=True, seed=seed) for seed in (3, 3, 4))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(torch.get_rng_state(), state)
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(one.chains["half"](image), same.chains["half"](image))


def test_a_fingerprint_notices_any_weight(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    built = put(tmp_path, tiny_spec)
    before = load_family(tiny_spec, weights_folder=tmp_path).fingerprint
    with torch.no_grad():
        built["train"].blocks[0].norm1.bias[3] += 1e-6
    save_file(built["train"].state_dict(), tmp_path / "train.safetensors")
    assert load_family(tiny_spec, weights_folder=tmp_path).fingerprint != before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_weights_come_from_a_folder(tiny_spec: FamilySpec, tmp_path: Path, suffix: str) -> None:
    built = put(tmp_path, tiny_spec, suffix)
    family = load_family(tiny_spec, weights_folder=tmp_path)
    assert family.weights == "pretrained"
    images = torch.randn(2, 3, 16, 16)
    for name, model in built.items():
        assert torch.equal(family.chains[name](images), model.eval()(images))


MINE = """
name = "mine"
input_shape = [3, 32, 32]
num_classes = 3
images = { crop_pct = 1.0 }

[[anchors]]
name = "tiny"
model = "deit_tiny_patch16_224"
checkpoint = "weights/tiny.safetensors"

[anchors.arguments]
img_size = 32
patch_size = 8
embed_dim = 12
depth = 2
pretrained_cfg_overlay = { mean = [0.4914, 0.4822, 0.4465], std = [0.2470, 0.2435, 0.2616] }

[[anchors]]
name = "wide"
model = "deit_micro_tiny"
checkpoint = "wide.pth"
arguments = { drop_path_rate = 0.1 }
"""


def test_a_family_file_with_checkpoints_and_arguments_works_from_end_to_end(tmp_path: Path) -> None:
    tiny = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, depth=2, num_classes=3)
    wide = timm.create_model("deit_micro_tiny", num_classes=3)
    (tmp_path / "weights").mkdir()
    save_file(tiny.state_dict(), tmp_path / "weights" / "tiny.safetensors")
    torch.save({"model": wide.state_dict(), "epoch": 3}, tmp_path / "wide.pth")
    (tmp_path / "mine.toml").write_text(MINE)
    family = load_family(read_family(tmp_path / "mine.toml"))
    assert family.weights == "pretrained"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(family.chains["tiny"](images), tiny.eval()(images))
    assert torch.equal(family.chains["wide"](images), wide.eval()(images))
    assert family.chains["wide"].blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert tuple(family.data_config["mean"]) == (0.4914, 0.4822, 0.4465)


def test_published_checkpoints_hide_their_tensors_under_a_key(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    for index, wrapped in enumerate([{"model": tensors}, {"state_dict": tensors, "epoch": 1}, tensors]):
        torch.save(wrapped, tmp_path / f"{index}.pth")
        assert read_state_dict(tmp_path / f"{index}.pth").keys() == {"a"}


def test_weights_of_half_precision_are_taken(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    built = put(tmp_path, tiny_spec)
    halves = {name: tensor.half() for name, tensor in built["half"].state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    state = load_family(tiny_spec, weights_folder=tmp_path).chains["half"].head.state_dict()
    weight = next(value for name, value in state.items() if name.endswith("head.weight"))
    assert weight.dtype == torch.float32
    assert torch.equal(weight, halves["head.weight"].float())


def test_a_folder_may_name_weights_after_the_model(tmp_path: Path) -> None:
    micro = builtin_families()["deit-micro"]
    for anchor in micro.anchors:
        torch.manual_seed(0)
        save_file(timm.create_model(anchor.model).state_dict(), tmp_path / f"{anchor.model}.safetensors")
    assert load_family(micro, weights_folder=tmp_path).weights == "pretrained"


def damage(folder: Path, spec: FamilySpec, kind: str) -> None:
    """Spoils the weights of the first anchor, `half`."""
    built = put(folder, spec)
    file = folder / "half.safetensors"
    state = built["half"].state_dict()
    if kind == "missing":
        file.unlink()
    elif kind == "truncated safetensors":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "empty safetensors":
        file.write_bytes(b"")
    elif kind == "another model":
        save_file({"stem.weight": torch.ones(2)}, file)
    elif kind == "more than the model":
        save_file(state | {"extra": torch.ones(2)}, file)
    elif kind == "another width":
        save_file(built["train"].state_dict(), file)
    elif kind == "not a number":
        state["blocks.1.norm1.weight"][2] = float("nan")
        save_file(state, file)
    elif kind == "infinite in half precision":
        state = {name: tensor.half() for name, tensor in state.items()}
        state["norm.bias"][0] = float("inf")
        save_file(state, file)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", r"No weights for anchor half in .*: expected half or deit_tiny_patch16_224 with one of \.saf"),
        ("truncated safetensors", r"half.safetensors is not a whole safetensors file .*: copy it again\."),
        ("empty safetensors", r"half.safetensors is not a whole safetensors file .*: copy it again\."),
        ("another model", r"it lacks blocks.0.attn.proj.bias and has stem.weight, which the model lacks \(\d+ m"),
        ("more than the model", r"it has extra, which the model lacks \(0 missing, 1 unknown of \d+ tensors\)\."),
        ("another width", r"half.safetensors is not a checkpoint of deit_tiny_patch16_224: .* is \(.*\) there and \("),
        ("not a number", r"half.safetensors holds values that are not finite in blocks.1.norm1.weight\."),
        ("infinite in half precision", r"half.safetensors holds values that are not finite in norm.bias\."),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_sentence(
    tiny_spec: FamilySpec, tmp_path: Path, kind: str, sentence: str
) -> None:
    damage(tmp_path / "weights", tiny_spec, kind)
    with pytest.raises(WeightsError, match=sentence) as caught:
        load_family(tiny_spec, weights_folder=tmp_path / "weights")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_checkpoint_cut_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "x.pth"
    tensors = {"a.weight": torch.randn(20, 30), "b": torch.arange(10.0)}
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 60):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"x\.pth is (not a whole torch checkpoint|a pickle that )"):
            read_state_dict(file)
    file.write_bytes(whole)
    assert torch.equal(read_state_dict(file)["a.weight"], tensors["a.weight"])


# opcodes in the middle of a legacy file; torch answers with IndexError, KeyError, struct.error and others
@pytest.mark.parametrize("replacement", [b"t", b"s", b"0", b"h\x07", b"J"])
def test_a_torch_checkpoint_damaged_inside_is_refused(tmp_path: Path, replacement: bytes) -> None:
    file = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    start = whole.index(b"cctypes") if b"cctypes" in whole else whole.index(b"ctorch")
    file.write_bytes(whole[:start] + replacement + whole[start:])
    with pytest.raises(WeightsError, match=r"x\.pth is"):
        read_state_dict(file)


def test_a_checkpoint_that_does_not_exist_is_one_sentence(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    anchors = tuple(replace(anchor, checkpoint=tmp_path / "no.pth") for anchor in tiny_spec.anchors)
    with pytest.raises(WeightsError, match=r"Weights .*no\.pth do not exist\.$"):
        load_family(replace(tiny_spec, anchors=anchors))
    with pytest.raises(WeightsError, match=r"Weights .*no\.safetensors do not exist\.$"):
        read_state_dict(tmp_path / "no.safetensors")


@pytest.mark.parametrize("how", ["torch", "pickle", "torch legacy"])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, how: str) -> None:
    marker, file = tmp_path / "marker", tmp_path / "x.pth"
    holder = {"a": torch.ones(1), "b": Touch(marker)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(holder, protocol=2))
    else:
        torch.save(holder, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(WeightsError, match=r"asks for (getattr|torch\.storage\._load_from_bytes), which could"):
        read_state_dict(file)
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists()  # the trap works: someone careless steps on it


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"model": {"a": "text"}}, torch.ones(2), {"a": None}])
def test_a_file_that_holds_something_else_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"not a state dict: expected tensors by name, found (a|one|a list).*\.$"):
        read_state_dict(tmp_path / "x.pth")


def transport_errors() -> list[Exception]:
    """What the hub's client and the transports it has used raise where there is no way to the hub."""
    found: list[Exception] = [
        hub.LocalEntryNotFoundError("Cannot find the requested files in the disk cache"),
        hub.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled"),
        ConnectionError("refused"),
        TimeoutError("too slow"),
        RuntimeError("No pretrained weights exist for this model"),
        EOFError("damaged cache"),
        pickle.UnpicklingError("damaged cache"),
    ]
    for module in ("httpx2", "httpx", "requests.exceptions"):
        try:
            transport = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        found += [transport.ProxyError("no proxy"), transport.InvalidURL("no address")]
        found += [transport.ConnectError("refused")] if hasattr(transport, "ConnectError") else []
        found += [transport.ReadTimeout("too slow")]
    return found


def hub_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_out_of_reach_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub_at("http://127.0.0.1:9", monkeypatch)  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_family(builtin_families()["deit3"])
    assert str(caught.value) == (
        "timm could not load pretrained weights of deit3_small_patch16_224 (not in the cache, and the Hugging Face hub "
        "cannot be reached): put them in a folder and pass --weights DIR, or pass --random-weights to build without "
        "any."
    )
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("error", transport_errors(), ids=lambda e: f"{type(e).__module__}.{type(e).__name__}")
def test_a_hub_that_fails_is_reported_with_the_way_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool, **_: object) -> nn.Module:
        assert pretrained
        raise error

    monkeypatch.setattr(timm, "create_model", create_model)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(WeightsError) as caught:
        hub_at(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        load_family(builtin_families()["deit"])
    assert str(caught.value) == (
        f"timm could not load pretrained weights of deit_tiny_patch16_224 ({error}): put them in a folder and pass "
        "--weights DIR, or pass --random-weights to build without any."
    )
    assert caught.value.__cause__ is error


def test_timms_own_weights_are_asked_for_where_the_family_names_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tiny_spec: FamilySpec
) -> None:
    asked = []
    create = timm.create_model

    def create_model(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(timm, "create_model", create_model)
    family = load_family(replace(tiny_spec, num_classes=1000))
    assert asked == [True, True, True]
    assert family.weights == "pretrained"


def test_timms_weights_of_another_number_of_classes_are_refused(tiny_spec: FamilySpec) -> None:
    with pytest.raises(WeightsError) as caught:
        load_family(tiny_spec)
    assert str(caught.value) == (
        "timm's own weights of deit_tiny_patch16_224 are for 1,000 classes, the family has 4: give the anchor a "
        "checkpoint, pass --weights DIR, or pass --fit-heads to fit new heads to your images."
    )


def with_first(spec: FamilySpec, **changes: Any) -> FamilySpec:
    return replace(spec, anchors=(replace(spec.anchors[0], **changes), *spec.anchors[1:]))


@pytest.mark.parametrize(
    ("arguments", "random_weights"),
    [
        ({"depth": -1}, True),
        ({"embed_dim": "wide"}, True),
        ({"global_pool": "x"}, True),
        ({"global_pool": "x"}, False),
        ({"no_such": 1}, True),
        ({"no_such": 1}, False),
        ({"num_heads": 5}, False),
        ({"pretrained": 1}, False),
    ],
)
def test_arguments_the_model_does_not_take_are_named(
    tiny_spec: FamilySpec, arguments: dict[str, Any], random_weights: bool
) -> None:
    before = tiny_spec.anchors[0].arguments
    spec = replace(with_first(tiny_spec, arguments=before | arguments), num_classes=1000)
    with pytest.raises(FamilyError, match=r"^timm cannot build deit_tiny_patch16_224 with \{'num_cl") as caught:
        load_family(spec, random_weights=random_weights)
    assert not isinstance(caught.value, WeightsError)
    assert "\n" not in str(caught.value)


def test_a_model_timm_does_not_know_is_answered_with_the_nearest(tiny_spec: FamilySpec) -> None:
    with pytest.raises(UnknownName, match=r"Unknown timm model 'deit_tiny_patch16_24': did you mean .*Asked for by"):
        load_family(with_first(tiny_spec, model="deit_tiny_patch16_24"), random_weights=True)


def test_an_anchor_of_another_number_of_classes_is_refused(tiny_spec: FamilySpec) -> None:
    arguments = tiny_spec.anchors[0].arguments | {"num_classes": 9}
    with pytest.raises(FamilyError, match="Anchor half tells 9 classes apart, the family 4"):
        load_family(with_first(tiny_spec, arguments=arguments), random_weights=True)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 16, 16)])
def test_images_an_anchor_does_not_take_are_named(tiny_spec: FamilySpec, shape: tuple[int, int, int]) -> None:
    with pytest.raises(FamilyError) as caught:
        load_family(replace(tiny_spec, input_shape=shape), random_weights=True)
    assert str(caught.value).startswith(f"Anchor half takes no images of shape {shape}: ")
    assert "\n" not in str(caught.value)


def test_an_anchor_that_cannot_be_cut_is_refused_with_the_reason(tiny_spec: FamilySpec) -> None:
    with pytest.raises(FamilyError, match=r"^CrossVit cannot be cut into blocks: up to \d+ tensors go from one layer"):
        load_family(
            replace(with_first(tiny_spec, model="crossvit_tiny_240", arguments={}), input_shape=(3, 240, 240)),
            random_weights=True,
        )


def test_anchors_that_want_images_normalised_differently_are_no_family(tiny_spec: FamilySpec) -> None:
    with pytest.raises(FamilyError) as caught:
        load_family(with_first(tiny_spec, model="vit_tiny_patch16_224"), random_weights=True)
    assert str(caught.value) == (
        "Anchors half and train were trained on images normalised differently: mean (0.5, 0.5, 0.5) and "
        "(0.485, 0.456, 0.406)."
    )


def test_loading_weights_does_not_change_them(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    built = put(tmp_path, tiny_spec)
    before = snapshot(built["half"])
    load_family(tiny_spec, weights_folder=tmp_path)
    assert same_state(built["half"], before)


def test_the_built_in_weights_tell_the_sample_images_apart() -> None:
    spec = builtin_families()["deit-micro"]
    family = load_family(spec)
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=family.data_config)
    images, labels = next(batches(data.test, 100))
    with torch.inference_mode():
        right = {name: (chain(images).argmax(1) == labels).sum().item() for name, chain in family.chains.items()}
    assert min(right.values()) > 50


DATA = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


def test_a_family_of_ones_own_chains_is_like_one_from_a_file() -> None:
    chains = three_chains()
    family = Family.of("mine", chains, DATA)
    assert (family.name, family.input_shape, family.num_classes) == ("mine", IMAGE, CLASSES)
    assert family.chains is chains
    assert family.data_config == {**DATA, "input_size": IMAGE}
    assert family.notes == ()
    assert family.weights == "pretrained"
    assert family.fingerprint == Family.of("other", three_chains(), {}, "random").fingerprint


def test_chains_that_do_not_agree_on_classes_are_no_family() -> None:
    with pytest.raises(FamilyError) as caught:
        Family.of("mine", {"tiny": token_chain(), "base": token_chain(classes=7)}, DATA)
    assert str(caught.value) == (
        "Anchors of mine do not agree: base takes images (3, 8, 8) and tells 7 classes apart, the first one "
        "(3, 8, 8) and 5."
    )


@pytest.mark.parametrize(("family", "anchor"), [("mine", "tiny.v2"), ("my family", "tiny"), ("mine", "a+b")])
def test_names_that_cannot_be_part_of_a_route_are_refused(family: str, anchor: str) -> None:
    with pytest.raises(FamilyError, match="letters, digits"):
        Family.of(family, {anchor: token_chain()}, DATA)


def test_mean_and_std_of_ones_own_chains_are_required() -> None:
    with pytest.raises(FamilyError, match="The family mine needs mean and std of the images its anchors were"):
        Family.of("mine", three_chains(), {})
    with pytest.raises(FamilyError, match=r"needs std of"):
        Family.of("mine", three_chains(), {"mean": (0.5,) * 3})


def test_defaults_that_are_filled_in_are_reported() -> None:
    family = Family.of("mine", three_chains(), {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    assert (family.data_config["crop_pct"], family.data_config["interpolation"]) == (0.875, "bilinear")
    assert family.notes == (
        "mine: images are prepared by timm's defaults where data_config says nothing: crop_pct 0.875, interpolation "
        "bilinear.",
    )


def test_chains_in_training_mode_are_put_into_evaluation_mode() -> None:
    chains = three_chains()
    chains["small"].blocks[1].train()
    family = Family.of("mine", chains, DATA)
    assert not any(part.training for chain in family.chains.values() for part in chain.modules())
    assert family.notes == ("mine: small was in training mode and is put into evaluation mode.",)


def test_a_family_without_anchors_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"The family mine has no anchors: give at least one chain\."):
        Family.of("mine", {}, DATA)


class Returns(nn.Module):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def forward(self, features: torch.Tensor) -> Any:
        return self.found


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((nn.Conv2d(1, 4, 3), [nn.Identity()], nn.Identity()), r"^The stem does not take images \(3, 8, 8\): "),
        ((nn.Conv2d(3, 4, 3), [nn.ReLU(), nn.Conv2d(5, 4, 1)], nn.ReLU()), r"^Block 2 does not take features \(4, 6"),
        ((nn.Conv2d(3, 4, 3), [nn.Identity()], nn.Linear(7, 2)), r"^The head does not take features \(4, 6, 6\): "),
        ((nn.Conv2d(3, 4, 3), [Returns(None)], nn.ReLU()), r"^Block 1 gives a NoneType for \(4, 6, 6\), not one"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named_with_its_shape(parts: Any, sentence: str) -> None:
    with pytest.raises(FamilyError, match=sentence) as caught:
        Chain(*parts, input_shape=(3, 8, 8))
    assert "\n" not in str(caught.value)


def test_paths_may_be_text(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    put(tmp_path, tiny_spec)
    by_text = load_family(tiny_spec, weights_folder=str(tmp_path))
    assert by_text.fingerprint == load_family(tiny_spec, weights_folder=tmp_path).fingerprint
    assert read_state_dict(str(tmp_path / "half.safetensors"))


def test_anchors_whose_images_are_prepared_differently_need_a_statement(tmp_path: Path, tiny_spec: FamilySpec) -> None:
    overlay = {"pretrained_cfg_overlay": {"crop_pct": 0.5}}
    spec = with_first(tiny_spec, arguments=tiny_spec.anchors[0].arguments | overlay)
    with pytest.raises(FamilyError) as caught:
        load_family(spec, random_weights=True)
    assert str(caught.value) == (
        "Anchors half and train were evaluated on images prepared differently: crop_pct 0.5 and 0.9. All routes of a "
        "family take the same images: state which in the family file, such as images = { crop_pct = 0.5 }."
    )
    stated = load_family(replace(spec, images={"crop_pct": 0.7}), random_weights=True)
    assert stated.data_config["crop_pct"] == 0.7


@pytest.mark.parametrize("name", [one for one in builtin_families() if one != "deit-micro"])
def test_the_built_in_families_state_how_images_are_prepared(name: str) -> None:
    spec = builtin_families()[name]
    known = {}
    for anchor in spec.anchors:
        found = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(anchor.model).to_dict())
        known[anchor.name] = found
    assert _common(known, spec)["crop_pct"] in (0.875, 0.9, 0.95, 0.965, 1.0)

"""Checkpoints as training scripts write them are read; everything else is refused and called by its name."""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import pathlib
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from small_models import CLASSES, LEVIT, MODELS, build, small_model
from torch import Tensor, nn

from klas_zoo.errors import FamilyError, UnknownName, WeightsError
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.checkpoints import find_weights, read_checkpoint, read_state_dict
from klas_zoo.families.fitting import OtherHead, fit
from klas_zoo.families.specs import FamilySpec, read_family

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model("vit")


def other(state: State) -> State:
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED: dict[str, tuple[Callable[[State], Any], str]] = {
    "bare": (lambda s: s, ""),
    "ordered": (lambda s: OrderedDict(s), ""),
    "parameters": (lambda s: {k: nn.Parameter(v) for k, v in s.items()}, ""),
    "timm": (
        lambda s: {"epoch": 3, "arch": "x", "state_dict": s, "optimizer": {}, "version": 2, "metric": np.float64(8.5),
                   "args": argparse.Namespace(lr=1e-3, opt="adamw")},
        "weights under state_dict",
    ),
    "timm with EMA": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s}, "EMA weights (state_dict_ema, not state_dict)",
    ),
    "timm without EMA": (lambda s: {"state_dict": s, "state_dict_ema": None}, "weights under state_dict"),
    "DeiT": (lambda s: {"model": s, "args": argparse.Namespace(a=1), "scaler": {"scale": 1.0}}, "weights under model"),
    "DeiT with EMA": (lambda s: {"model": other(s), "model_ema": s, "epoch": 1}, "EMA weights (model_ema, not model)"),
    "EMA alone": (lambda s: {"model_ema": s}, "EMA weights (model_ema)"),
    "torchvision": (
        lambda s: {"model": other(s), "lr_scheduler": {"last_epoch": 3},
                   "model_ema": {"n_averaged": torch.tensor(4)} | prefixed(s, "module.")},
        "EMA weights (model_ema, not model); prefix module. removed",
    ),
    "Lightning": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"criterion.weight": torch.ones(3)},
                   "hyper_parameters": {"path": pathlib.PurePosixPath("x")}, "pytorch-lightning_version": "2.0"},
        "weights under state_dict; outside of model, left out: criterion.weight; prefix model. removed",
    ),
    "tutorial": (
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {}, "loss": 0.3}, "weights under model_state_dict",
    ),
    "model_state": (lambda s: {"model_state": s}, "weights under model_state"),
    "net": (lambda s: {"net": s, "acc": 93.1}, "weights under net"),
    "nested": (lambda s: {"model": {"state_dict": s}}, "weights under model; weights under state_dict"),
    "nested the other way": (lambda s: {"state_dict": {"model": s}}, "weights under state_dict; weights under model"),
    "DDP": (lambda s: prefixed(s, "module."), "prefix module. removed"),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "prefix _orig_mod. removed"),
    "DDP of compiled": (lambda s: prefixed(s, "module._orig_mod."), "prefix _orig_mod.module. removed"),
    "compiled DDP": (lambda s: prefixed(s, "_orig_mod.module."), "prefix _orig_mod.module. removed"),
    "compiled blocks": (
        lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()}, "prefix _orig_mod. removed",
    ),
    "backbone": (lambda s: prefixed(s, "backbone."), "prefix backbone. removed"),
    "an int among tensors": (lambda s: s | {"epoch": 3}, "not tensors, left out: epoch"),
    "a numpy array beside": (lambda s: {"model": s, "rng": np.arange(5)}, "weights under model"),
    "dates and defaults beside": (
        lambda s: {"model": s, "at": datetime.datetime(2024, 1, 1), "log": defaultdict(list, a=[1])},
        "weights under model",
    ),
    "float16": (lambda s: {k: v.half() for k, v in s.items()}, "converted from float16"),
    "bfloat16": (lambda s: {k: v.bfloat16() for k, v in s.items()}, "converted from bfloat16"),
    "float64": (lambda s: {k: v.double() for k, v in s.items()}, "converted from float64"),
    "profiled": (lambda s: s | {"total_ops": torch.ones(1), "blocks.0.total_params": torch.ones(1)},
                 "left out: total_ops, total_params"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", WRAPPED)
def test_what_training_scripts_write_is_read_and_accounted_for(
    kind: str, zipped: bool, model: nn.Module, tmp_path: Path
) -> None:
    wrap, account = WRAPPED[kind]
    state = model.state_dict()
    torch.save(wrap(state), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    found, said = fit(read_checkpoint(tmp_path / "x.pth"), model, "vit")
    assert found.keys() == state.keys()
    loose = 0.01 if "float" in kind else 0.0
    assert all(torch.allclose(found[name].float(), state[name].float(), atol=loose, rtol=loose) for name in state)
    assert said == (f"x.pth: {account}" if account else "x.pth")


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "trap",
    [
        lambda marker: {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=Touch(marker))},
        lambda marker: {"a": torch.ones(1), "b": np.array([Touch(marker)], dtype=object)},
    ],
    ids=["in a namespace", "in an array"],
)
def test_placeholders_let_no_code_through(trap: Callable[[Path], Any], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save(trap(marker), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="which could run code, so it is not read"):
        read_state_dict(tmp_path / "x.pth")
    assert not marker.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert marker.exists()


def test_a_namespace_of_a_checkpoint_is_never_the_real_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=1), "n": np.float32(3)}, tmp_path / "x.pth")

    def explode(*args: object, **options: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(argparse.Namespace, "__init__", explode)
    monkeypatch.setattr(argparse.Namespace, "__setattr__", explode)
    assert read_state_dict(tmp_path / "x.pth").keys() == {"a"}
    assert not any(isinstance(one, tuple) for one in torch.serialization.get_safe_globals())


KINDS: dict[str, tuple[bytes | Any, str]] = {
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n", "is a pointer of Git LFS"),
    "HTML": (b"\n<!DOCTYPE html><html>Log in</html>", r"is a web page, not weights: "),
    "gzip": (gzip.compress(b"x" * 100), r"is compressed by gzip: unpack it first\."),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), r"is an HDF5 file, as Keras writes it"),
    "text": (b"hello, this is text" * 10, r"is (not a whole torch checkpoint|a pickle that would)"),
    "empty": (b"", r"is not a whole torch checkpoint"),
    "module": (nn.Linear(2, 2), r"is a pickle that asks for torch\.nn\.modules\.linear\.Linear, which could run code"),
    "meta": ({"a": torch.empty(2, device="meta")}, r"tensors that are without data \(on the device meta\), such as a"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, r"holds tensors that are sparse or quantised, such as a"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    content, sentence = KINDS[kind]
    for suffix in (".pth",) if kind in ("text", "empty", "module", "meta", "sparse") else (".pth", ".safetensors"):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(WeightsError, match=sentence) as caught:
            read_state_dict(file)
        assert "\n" not in str(caught.value)


def test_torchscript_is_called_by_its_name(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x\.pt is a TorchScript archive: save its state_dict\(\) instead\."):
        read_state_dict(tmp_path / "x.pt")


def test_safetensors_are_known_by_their_content(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "x.pth")
    assert read_state_dict(tmp_path / "x.pth").keys() == model.state_dict().keys()


def sharded(folder: Path, state: State, suffix: str = ".safetensors") -> None:
    folder.mkdir(exist_ok=True)
    names, stem = list(state), "model" if suffix == ".safetensors" else "pytorch_model"
    parts = {f"{stem}-{k + 1:05d}-of-00002{suffix}": names[k::2] for k in range(2)}
    for file, part in parts.items():
        content = {name: state[name] for name in part}
        save_file(content, folder / file) if suffix == ".safetensors" else torch.save(content, folder / file)
    table = {name: file for file, part in parts.items() for name in part}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_several_files_are_put_together(suffix: str, model: nn.Module, tmp_path: Path) -> None:
    sharded(tmp_path / "half", model.state_dict(), suffix)
    found = read_checkpoint(tmp_path / "half")
    assert found.notes == ("2 files",)
    assert all(torch.equal(found.state[name], value) for name, value in model.state_dict().items())
    assert find_weights(tmp_path, ["half"]) == found.path
    next(tmp_path.glob(f"half/*00002{suffix}")).unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00002.* do not exist|Weights .* do not exist"):
        read_checkpoint(tmp_path / "half")


@pytest.mark.parametrize(
    "table",
    ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "model.safetensors.index.json"}}'],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_one_sentence(table: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(table)
    with pytest.raises(WeightsError, match=r"is not an index of weights|which is not a file beside it"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["half.ckpt", "half.pth.tar", "half.PTH", "half/model.safetensors", "half/pytorch_model.bin",
     "Deit_Tiny_Patch16_224.SAFETENSORS"],
)  # fmt: skip
def test_a_folder_of_weights_may_name_them_in_many_ways(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert find_weights(tmp_path, ["half", "deit_tiny_patch16_224"]) == tmp_path / file


def test_weights_that_are_no_folder_are_one_sentence(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    for place in ("a.pth", "nowhere"):
        with pytest.raises(WeightsError, match=rf"--weights .*{place} is not a folder: it takes one with a checkpoint"):
            load_family(tiny_spec, weights_folder=tmp_path / place)


def resized(name: str, **changes: Any) -> tuple[State, nn.Module]:
    """A checkpoint of a model of the same kind for larger images, and the model."""
    arguments = MODELS[name][1] | {"num_classes": CLASSES}
    large = build(MODELS[name][0], arguments | changes)
    return large.state_dict(), small_model(name)


@pytest.mark.parametrize(
    ("name", "changes", "account"),
    [
        ("deit", {"img_size": 96}, r"resized by timm: pos_embed \(1, 37, 24\) → \(1, 17, 24\)"),
        ("vit", {"img_size": 32}, r"resized by timm: pos_embed \(1, 4, 24\) → \(1, 16, 24\)"),
        ("swin", {"img_size": 128, "window_size": 8}, r"resized by timm: layers.0.*_bias_table \(225, 1\)"),
    ],
)
def test_positions_of_another_image_size_are_resized_by_timm(
    name: str, changes: dict[str, Any], account: str, tmp_path: Path
) -> None:
    state, model = resized(name, **changes)
    save_file(state, tmp_path / "x.safetensors")
    found, said = fit(read_checkpoint(tmp_path / "x.safetensors"), model, name)
    model.load_state_dict(found)
    assert said.startswith("x.safetensors: ")
    assert re.search(account, said), said


def test_swins_official_release_is_read(tmp_path: Path) -> None:
    """It shrinks at the end of a stage, names the classifier otherwise, and keeps buffers that follow from settings."""
    model = small_model("swin")
    official: State = {}
    for name, value in model.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda one: f"layers.{int(one[1]) - 1}.downsample", name)
        official[name.replace("head.fc.", "head.")] = value
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    official["layers.1.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({"model": official}, tmp_path / "swin.pth")
    found, account = fit(read_checkpoint(tmp_path / "swin.pth"), model, "swin")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert account.endswith("left out: attn_mask, relative_position_index; names converted to timm's")


def test_levits_official_release_is_read_by_the_order_of_its_tensors(tmp_path: Path) -> None:
    model = build("levit_128s", LEVIT | {"num_classes": CLASSES})
    official = {f"t.{k}.x": value for k, value in enumerate(model.state_dict().values())}
    official["blocks.0.m.attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.int64)
    torch.save({"model": official}, tmp_path / "levit.pth")
    found, account = fit(read_checkpoint(tmp_path / "levit.pth"), model, "levit_128s")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert "left out: attention_bias_idxs; names converted to timm's" in account


def test_convnexts_official_release_is_read(tmp_path: Path) -> None:
    model = small_model("convnext")
    official = {}
    for name, value in model.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace(".blocks.", ".").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc", "pwconv").replace("head.fc.", "head.").replace("head.norm", "norm")
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        official[name] = value
    torch.save({"model": official}, tmp_path / "x.pth")
    found, account = fit(read_checkpoint(tmp_path / "x.pth"), model, "convnext")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert account == "x.pth: weights under model; names converted to timm's"


def test_batch_norms_may_lack_their_counters(tmp_path: Path) -> None:
    model = small_model("resnet")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "x.safetensors")
    assert fit(read_checkpoint(tmp_path / "x.safetensors"), model, "resnet")[0].keys() == model.state_dict().keys()


def test_another_architecture_is_refused_with_the_nearest_models(model: nn.Module, tmp_path: Path) -> None:
    with torch.device("cpu"):
        state = timm.create_model("resnet18", num_classes=37).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError) as caught:
        fit(read_checkpoint(tmp_path / "x.safetensors"), model, "deit_tiny_patch16_224")
    message = str(caught.value)
    assert "is not a checkpoint of deit_tiny_patch16_224: it lacks blocks.0.attn.proj.bias and has " in message
    assert "By the shapes of its tensors it is most like timm's resnet18 (96%), " in message
    assert message.count("%)") == 3 and "\n" not in message


@pytest.mark.parametrize("kind", ["other classes", "no head"])
def test_a_head_for_other_classes_names_the_command_that_fits_one(kind: str, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    has = "has no head"
    if kind == "other classes":
        state |= {"head.weight": torch.ones(9, 24), "head.bias": torch.ones(9)}
        has = "has a head for 9 classes"
    else:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    save_file(state, tmp_path / "x.safetensors")
    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(OtherHead) as caught:
        fit(checkpoint, model, "vit")
    assert str(caught.value) == (
        f"{checkpoint.path} {has}, the family has 7: pass --fit-heads to build, or run klas-zoo finetune, which fit a "
        "new head to your images."
    )
    found, account = fit(checkpoint, model, "vit", new_head=True)
    assert torch.equal(found["head.weight"], model.state_dict()["head.weight"])
    assert account == f"x.safetensors: {has}; a new one is fitted"


def test_a_family_keeps_the_accounts_of_its_checkpoints(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    for anchor in tiny_spec.anchors:
        built = timm.create_model(anchor.model, num_classes=4, **anchor.arguments)
        torch.save({"state_dict_ema": built.state_dict()}, tmp_path / f"{anchor.name}.pth.tar")
    family = load_family(tiny_spec, weights_folder=tmp_path)
    assert family.checkpoints["train"] == "train.pth.tar: EMA weights (state_dict_ema)"
    assert family.unfitted == frozenset()
    assert load_family(tiny_spec, random_weights=True).checkpoints["half"] == "random weights"


def local_model(folder: Path) -> nn.Module:
    """A folder as timm's save_for_hf writes it."""
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    built = timm.create_model("deit_tiny_patch16_224", num_classes=4, **arguments)
    folder.mkdir()
    config = {
        "architecture": "deit_tiny_patch16_224", "num_classes": 4, "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 1.0,
                           "num_classes": 4, "classifier": "head", "first_conv": "patch_embed.proj",
                           "interpolation": "bilinear"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(built.state_dict(), folder / "model.safetensors")
    return built


FROM_FOLDERS = """
name = "local"
input_shape = [3, 16, 16]
num_classes = 4

[[anchors]]
name = "one"
model = "local-dir:one"

[[anchors]]
name = "two"
model = "local-dir:two"
"""


def load_local(tmp_path: Path, text: str = FROM_FOLDERS) -> Family:
    (tmp_path / "f.toml").write_text(text)
    return load_family(read_family(tmp_path / "f.toml"))


def test_models_may_be_described_by_a_folder(tmp_path: Path) -> None:
    built = [local_model(tmp_path / name) for name in ("one", "two")]
    family = load_local(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(family.chains["two"](images), built[1].eval()(images))
    assert tuple(family.data_config["mean"]) == (0.1, 0.2, 0.3)
    assert family.checkpoints["one"] == "model.safetensors"
    (tmp_path / "two" / "config.json").unlink()
    with pytest.raises(FamilyError, match=r"two does not describe a timm model \(.*\): it needs a config\.json"):
        load_local(tmp_path)


def test_timms_own_prefix_is_known_and_a_wrong_name_behind_it_too(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    text = (tmp_path / "tiny-vits.toml").read_text()
    file = write(tmp_path, text.replace('"deit_tiny', '"timm/deit_tiny'))
    family = load_family(read_family(file), random_weights=True)
    assert list(family.chains) == ["half", "train", "float"]
    with pytest.raises(UnknownName, match="Unknown timm model 'timm/deit_tiny_patch16_22'"):
        load_family(read_family(write(tmp_path, text.replace('"deit_tiny_patch16_224', '"timm/deit_tiny_patch16_22'))))


def write(folder: Path, text: str) -> Path:
    (folder / "changed.toml").write_text(text)
    return folder / "changed.toml"


def test_a_url_as_checkpoint_says_what_to_do(tiny_spec: FamilySpec, tmp_path: Path) -> None:
    text = (tmp_path / "tiny-vits.toml").read_text()
    file = write(tmp_path, text.replace("arguments =", 'checkpoint = "https://x.org/a.pth"\narguments ='))
    with pytest.raises(FamilyError, match=r"checkpoint is not valid: https://x\.org/a\.pth is a URL: download"):
        read_family(file)

"""The bill of materials in a package: valid, the same for the same package, and true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import packages
import pytest
import timm
from torch import nn

from klas_zoo.exporters.bom import BOM, SPEC, bom_of
from klas_zoo.exporters.package import Package
from klas_zoo.families.anchors import load_family
from klas_zoo.families.models import weights_facts
from klas_zoo.families.specs import AnchorSpec, find_family

pytest.importorskip("cyclonedx", reason="needs cyclonedx-python-lib: pip install 'klas-zoo[build]'")


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return packages.write_package(tmp_path / "package")


def licensed(package: Package) -> Any:
    """Its manifest, with sources of weights, data and versions as a build writes them."""
    manifest = package.manifest
    place = "timm/deit.fb_in1k"
    weights = {"source": place, "url": f"https://huggingface.co/{place}", "license": "apache-2.0"}
    odd = {"source": "mine.pth", "license": "whatever I like"}
    anchors = [{**manifest.family.anchors[0], "weights": weights}, {**manifest.family.anchors[1], "weights": odd}]
    return replace(
        manifest, family=replace(manifest.family, anchors=tuple(anchors)),
        data={"description": "photos", "fingerprint": "ab"},
        provenance={"versions": {"python": "3.11.7", "torch": "2.11", "onnxruntime-gpu": "1.31.1"}},
    )  # fmt: skip


def components(text: str) -> dict[str, dict[str, Any]]:
    return {one["bom-ref"]: one for one in json.loads(text)["components"]}


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {one["name"].removeprefix("klas-zoo:"): one["value"] for one in component.get("properties", [])}


def test_it_is_valid_cyclonedx(package: Package) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.from_version(SPEC))
    for text in ((package.folder / BOM).read_text(), bom_of(licensed(package))):
        assert validator.validate_str(text) is None
    assert validator.validate_str(bom_of(licensed(package)).replace('"file"', '"folder"')) is not None


def test_a_package_has_it_under_its_hash(package: Package) -> None:
    assert package.manifest.files[BOM].size_bytes == (package.folder / BOM).stat().st_size
    assert (package.folder / BOM).read_text() == bom_of(package.manifest)


def test_the_same_package_has_the_same_one_without_numbers_or_dates(package: Package, tmp_path: Path) -> None:
    again = packages.write_package(tmp_path / "again", fresh=True)
    assert (again.folder / BOM).read_bytes() == (package.folder / BOM).read_bytes()
    table = json.loads((package.folder / BOM).read_text())
    assert "serialNumber" not in table and "timestamp" not in table["metadata"]


def test_every_network_and_file_is_in_it_with_its_hash(package: Package) -> None:
    found = components((package.folder / BOM).read_text())
    for route in package.routes:
        entry = found[f"route:{route.name}"]
        assert entry["hashes"] == [{"alg": "SHA-256", "content": package.manifest.files[str(route.file)].sha256}]
        assert float(properties(entry)["top1"]) == route.top1 and properties(entry)["macs"] == str(route.macs)
    for name in ("weights.bin", "references.safetensors"):
        assert found[f"file:{name}"]["hashes"][0]["content"] == package.manifest.files[name].sha256
    assert {one for one in found if one.startswith("anchor:")} == {"anchor:slim", "anchor:wide"}


def test_weights_have_their_source_and_licence_and_data_and_versions_are_named(package: Package) -> None:
    text = bom_of(licensed(package))
    found = components(text)
    slim, wide = found["anchor:slim"], found["anchor:wide"]
    assert slim["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert slim["externalReferences"] == [{"type": "distribution", "url": "https://huggingface.co/timm/deit.fb_in1k"}]
    assert wide["licenses"] == [{"license": {"name": "whatever I like"}}]
    assert properties(wide)["weights_source"] == "mine.pth"
    assert found["data:test"]["name"] == "photos" and properties(found["data:test"])["fingerprint"] == "ab"
    assert found["library:onnxruntime-gpu"]["purl"] == "pkg:pypi/onnxruntime-gpu@1.31.1"
    assert found["library:python"]["version"] == "3.11.7"
    uses = {one["ref"]: one.get("dependsOn", []) for one in json.loads(text)["dependencies"]}
    assert uses["route:slim"] == ["anchor:slim", "file:weights.bin"]
    assert uses["route:slim.1-2+wide.2-3"] == ["anchor:slim", "anchor:wide", "file:weights.bin"]


@pytest.mark.parametrize("odd", ["[/x]", "a\nb", "\x1b[2J", "Ω", "a" * 5000])
def test_odd_texts_from_outside_give_a_valid_one(odd: str, package: Package) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    manifest = licensed(package)
    weights = {"source": odd, "license": odd, "url": f"https://x/{odd}"}
    anchors = tuple({**one, "weights": weights, "model": odd} for one in manifest.family.anchors)
    name = odd if odd.isprintable() else "a"  # others are refused as names
    text = bom_of(replace(manifest, family=replace(manifest.family, anchors=anchors, name=name)))
    assert JsonStrictValidator(SchemaVersion.from_version(SPEC)).validate_str(text) is None


# where weights are from


def test_timms_own_weights_are_named_by_their_place_on_the_hub() -> None:
    model = nn.Identity()
    model.pretrained_cfg = timm.models.get_pretrained_cfg("deit_tiny_patch16_224").to_dict()  # type: ignore[assignment]
    spec = find_family("deit")
    assert weights_facts(AnchorSpec(name="a", model="deit_tiny_patch16_224"), spec, "pretrained", model) == {
        "weights": {
            "source": "timm/deit_tiny_patch16_224.fb_in1k",
            "url": "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k",
            "license": "apache-2.0",
        }
    }


def test_a_checkpoint_of_a_user_has_no_licence_and_no_folder(tmp_path: Path) -> None:
    anchor, spec = AnchorSpec(name="a", model="deit_tiny_patch16_224"), find_family("levit")
    found = weights_facts(anchor, spec, tmp_path / "secret" / "mine.pth", nn.Identity())
    assert found == {"weights": {"source": "mine.pth"}}
    assert weights_facts(anchor, spec, "random", nn.Identity()) == {}


def test_the_embedded_networks_have_a_licence() -> None:
    family = load_family(find_family("deit-micro"))
    for name in family.chains:
        assert family.described(name)["weights"] == {
            "source": f"deit_micro_{name}.safetensors", "license": "apache-2.0"
        }  # fmt: skip

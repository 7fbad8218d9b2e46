"""The catalog of devices: complete, with sources, and found by any of a device's names."""

from __future__ import annotations

import json

import pytest

from klas_zoo.profiles import catalog
from klas_zoo.profiles.catalog import canonical, find_spec, read_catalog, spec_of_cuda_device, unknown

DATA_CENTRE = {"a100", "a100-80", "h100", "h200", "l4", "l40s", "t4", "v100", "a10g", "b200"}
WANTED = DATA_CENTRE | {"rtx-4090", "rtx-5090", "jetson-orin", "cpu"}


def test_every_device_a_user_may_name_is_there() -> None:
    assert catalog.catalog().keys() >= WANTED


@pytest.mark.parametrize("name", [name for name in catalog.catalog() if name != "cpu"])
def test_every_figure_has_a_public_source_and_a_plausible_value(name: str) -> None:
    spec = catalog.catalog()[name]
    for figure in ("compute_capability", "memory_gb", "bandwidth_gb_s", "peak_tflops"):
        assert spec.sources[figure].url.startswith("https://")
    assert spec.memory_gb and spec.bandwidth_gb_s and spec.compute_capability
    # operations for each byte that memory gives: of one order of magnitude everywhere, a slip of units is not
    assert 4 <= spec.memory_gb <= 200
    assert 50 < spec.peak_tflops["fp16"] * 1e12 / (spec.bandwidth_gb_s * 1e9) < 500
    assert spec.peak_tflops["fp16"] > 1.9 * spec.peak_tflops["fp32"]


def test_names_aliases_and_cuda_names_find_a_device() -> None:
    assert canonical("A100-80GB") == "a100-80"
    assert canonical("tesla-t4") == "t4"
    assert canonical("fleet-7") == "fleet-7"
    assert find_spec("no-such") is None
    named = {"NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA H100 80GB HBM3": "h100", "Tesla T4": "t4"}
    for cuda_name, name in named.items():
        found = spec_of_cuda_device(cuda_name)
        assert found is not None and found.name == name
    assert spec_of_cuda_device("NVIDIA Imaginary") is None


def test_an_unknown_device_is_answered_with_the_nearest() -> None:
    assert "did you mean" in str(unknown("a101"))
    assert "did you mean fleet-xeon?" in str(unknown("fleet-xeno", frozenset({"fleet-xeon"})))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bandwidth_gb_s", -1, "bandwidth_gb_s is above zero, not -1"),
        ("peak_tflops", {"fp32": 0}, "peak_tflops.fp32 is above zero"),
        ("peak_tflops", {"fp12": 5}, "a peak in {'fp12'}"),
        ("figures_from", {}, "memory_gb has no source"),
        ("aliases", ["cpu"], "two devices are called cpu"),
    ],
)
def test_a_catalog_that_is_wrong_is_refused(field: str, value: object, says: str) -> None:
    table = json.loads(catalog._FILE.read_text())
    next(one for one in table["devices"] if one["name"] == "t4")[field] = value
    with pytest.raises(ValueError, match=says):
        read_catalog(json.dumps(table))


@pytest.mark.parametrize(
    ("cuda_name", "name", "gb", "memory", "compute"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "a100-mig-1g.5gb", 5, 1 / 8, 14 / 108),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "a100-mig-3g.20gb", 20, 4 / 8, 42 / 108),
        ("NVIDIA A100-SXM4-80GB MIG 1c.3g.40gb", "a100-80-mig-1c.3g.40gb", 40, 4 / 8, 14 / 108),
        ("NVIDIA H100 80GB HBM3 MIG 7g.80gb", "h100-mig-7g.80gb", 80, 1, 1),
        ("NVIDIA H200 MIG 1g.18gb", "h200-mig-1g.18gb", 18, 1 / 8, 1 / 7),
        ("NVIDIA H200 MIG 1g.18gb+me", "h200-mig-1g.18gb+me", 18, 1 / 8, 1 / 7),
    ],
)
def test_a_slice_has_its_share_of_the_card(
    cuda_name: str, name: str, gb: float, memory: float, compute: float
) -> None:
    found = spec_of_cuda_device(cuda_name, gb * 2**30, 14)
    assert found is not None and found == find_spec(name)
    whole = catalog.catalog()[name.partition("-mig-")[0]]
    assert (found.name, found.memory_gb) == (name, gb)
    assert found.bandwidth_gb_s == pytest.approx(memory * (whole.bandwidth_gb_s or 0))
    for precision, peak in whole.peak_tflops.items():
        assert found.peak_tflops[precision] == pytest.approx(compute * peak, rel=1e-4)


@pytest.mark.parametrize("name", ["t4-mig-1g.5gb", "a100-mig-8g.40gb", "a100-mig-1g.80gb", "a100-mig-x"])
def test_there_is_no_such_slice(name: str) -> None:
    assert find_spec(name) is None

"""Profiles as files: they come back as they were, and what cannot be believed is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles_made_up import latency_model, network, profile, statistics

from klas_zoo.errors import KlasZooError, ProfileError
from klas_zoo.profiles.files import from_text, to_json, to_text
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.routes import Route

STITCH = Route.stitch("tiny", 2, "base", 2, 4)


def test_a_route_costs_its_parts_and_its_seam() -> None:
    model = latency_model()
    seam_macs = 16 * 8 * 16
    assert model.macs(STITCH) == 1_000 + 2 * 10_000 + seam_macs + 2 * 10_000 + 500
    assert model.predict_ms(STITCH) == pytest.approx(0.25 + 2 * 1 + 0.5 + 100 * seam_macs / 1e9 + 2 * 4 + 0.125)
    assert model.predict_ms(Route.anchor("base", 4)) == pytest.approx(0.25 + 16 + 0.125)
    assert model.covers(STITCH)
    assert not model.covers(Route.anchor("small", 4))
    assert not model.covers(Route.anchor("base", 5))


@pytest.mark.parametrize("count", [1, 2])
def test_profiles_come_back_as_they_were(count: int) -> None:
    whole = [replace(profile(), batch=batch) for batch in range(1, count + 1)]
    assert from_text(to_text(whole), "here") == whole


@given(
    batch=st.integers(1, 4096),
    p50_ms=st.floats(0.1, 1e5),
    device=st.sampled_from(["cpu", "fleet-7"]),
    precision=st.sampled_from(["fp32", "fp16", "bf16", "int8"]),
    warnings=st.lists(st.text(max_size=20), max_size=2),
)
def test_any_profile_survives_the_trip_to_seven_digits(
    batch: int, p50_ms: float, device: str, precision: str, warnings: list[str]
) -> None:
    one = profile(
        batch=batch, device=device, precision=precision, warnings=tuple(warnings), networks=(network(STITCH, p50_ms),)
    )
    (back,) = from_text(to_text([one]), "here")
    assert to_text([back]) == to_text([one])
    assert back.networks[0].latency.p50_ms == pytest.approx(p50_ms, abs=1e-4, rel=1e-6)


def test_a_failed_batch_is_a_record_too() -> None:
    one = profile(networks=(), model=None, failure="batch 4096 does not fit into memory")
    assert from_text(to_text([one]), "here") == [one]


Change = Callable[[dict[str, Any]], object]

BAD: dict[str, tuple[Change, str]] = {
    "a negative latency": (
        lambda t: t["networks"][1]["latency"].update(p50_ms=-3), r"networks\[1\]\.latency\.p50_ms has to be between"
    ),
    "a latency of zero": (lambda t: t["networks"][0]["latency"].update(min_ms=0), r"min_ms has to be between"),
    "a latency that is a text": (
        lambda t: t["networks"][0]["latency"].update(p50_ms="3 ms"), r'p50_ms has to be a number, not "3 ms"'
    ),
    "a latency that is true": (lambda t: t["networks"][0]["latency"].update(p50_ms=True), r"p50_ms has to be a number"),
    "a missing number": (lambda t: t["networks"][0]["latency"].pop("p99_ms"), r"networks\[0\]\.latency\.p99_ms is mis"),
    "percentiles that fall": (
        lambda t: t["networks"][0]["latency"].update(p90_ms=0.001), r"p90_ms has to be at least p50_ms"
    ),
    "no runs": (lambda t: t["networks"][0]["latency"].update(runs=0), r"runs has to be a whole number from 1 on"),
    "another unit": (lambda t: t.update(unit="us"), r"unit has to be 'ms'"),
    "a newer schema": (lambda t: t.update(schema_version=99), r"by a newer klas-zoo: its schema is 99"),
    "no schema": (lambda t: t.pop("schema_version"), r"schema_version is missing"),
    "a field nobody knows": (lambda t: t.update(mood="good"), r"nobody knows the fields mood"),
    "an unknown precision": (lambda t: t.update(precision="fp12"), r"precision has to be one of fp32"),
    "a batch of zero": (lambda t: t.update(batch=0), r"batch has to be a whole number from 1 on"),
    "a date that is none": (lambda t: t.update(measured_at="yesterday"), r"measured_at has to be a date"),
    "a date without a zone": (lambda t: t.update(measured_at="2026-01-02T03:04:05"), r"with its zone"),
    "a route and segments that differ": (lambda t: t["networks"][0].update(route="base"), r"route has to be 'tiny'"),
    "a network twice": (lambda t: t["networks"].append(t["networks"][0]), r"networks that are all different"),
    "no networks and no reason": (lambda t: t.update(networks=[]), r"at least one network"),
    "multiply-adds that are not the model's": (lambda t: t["networks"][0].update(macs=7), r"as in its model, not 7"),
    "a model with a hole": (lambda t: t["model"]["anchors"]["tiny"]["widths"].pop(), r"widths has to be 5 numbers"),
    "a negative block": (
        lambda t: t["model"]["anchors"]["tiny"].update(block_ms=[1, 1, -1, 1]), r"block_ms\.2 has to be between"
    ),
    "an anchor without a rate": (lambda t: t["model"]["seam_ms_per_gmac"].pop("base"), r"gmac\.base is missing"),
    "an empty name": (lambda t: t.update(device=""), r"device has to be a text that is not empty"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD)
def test_a_profile_that_cannot_be_believed_is_refused_and_the_field_named(change: Change, says: str) -> None:
    table = json.loads(json.dumps(to_json(profile())))
    change(table)
    with pytest.raises(ProfileError, match=says) as caught:
        from_text(json.dumps(table), "a100.json")
    assert str(caught.value).startswith("a100.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"schema_version": 1, "profiles": []}', "[" * 100_000])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ProfileError, match=r"^it\.json"):
        from_text(text, "it.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_numbers_that_json_does_not_have_are_refused(number: str) -> None:
    with pytest.raises(ProfileError, match=f"{number} is no number"):
        from_text(to_text([profile()]).replace('"seam_ms": 0.5', f'"seam_ms": {number}'), "it.json")


def test_a_network_faster_than_its_device_is_absurd() -> None:
    model = latency_model()
    fast = network(STITCH, 0.002, macs=model.macs(STITCH))
    ok = profile(device="t4", kind="gpu", networks=(fast,), precision="fp16")
    assert from_text(to_text([ok]), "it.json")
    # 41,000 multiply-adds for each of 10^6 images in two microseconds
    absurd = replace(ok, batch=10**6)
    with pytest.raises(ProfileError, match=r"would compute at .* TFLOPS, and t4 reaches 71\.5 in fp16 at best"):
        from_text(to_text([absurd]), "it.json")


def test_the_spread_is_the_median_networks() -> None:
    one = profile(networks=(network(STITCH, latency=statistics(2.0, p90_ms=2.6, p95_ms=2.8)),))
    assert one.spread("p90") == pytest.approx(1.3)
    assert profile(networks=()).spread("p90") is None


# the store


def test_a_stored_profile_is_found_by_family_and_device(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    one, other = profile(), profile(device="t4", kind="gpu")
    (path, _) = store.add([one, other])
    assert path.relative_to(tmp_path).parts[:3] == ("toy", "cpu", "onnxruntime-fp32-batch1")
    assert store.profiles("toy", "cpu") == [one]
    assert store.profiles(device="t4") == [other]
    assert set(store.devices()) == {"cpu", "t4"}
    assert store.profiles("other") == store.profiles("../toy") == []
    assert ProfileStore(tmp_path / "none").profiles() == []


def test_two_measurements_are_both_kept_and_the_newer_comes_first(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    old, new = profile(), profile(measured_at="2026-02-02T03:04:05+00:00")
    store.add([new])
    store.add([old, old])
    store.add([old])
    assert store.profiles() == [new, old]
    assert len(store.paths()) == 2


def test_a_damaged_file_in_the_store_is_named(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    (path,) = store.add([profile()])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ProfileError, match=path.name):
        store.profiles()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="it is no text"):
        store.profiles()


@pytest.mark.parametrize("device", ["../up", "a/b", ".hidden", "-x"])
def test_a_name_that_is_no_folder_is_refused_and_nothing_written(device: str, tmp_path: Path) -> None:
    with pytest.raises(KlasZooError, match="cannot name a folder"):
        ProfileStore(tmp_path / "store").add([profile(), profile(device=device)])
    assert not (tmp_path / "store").exists()

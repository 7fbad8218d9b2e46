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

from klas_zoo.costs.exchange import import_file
from klas_zoo.errors import KlasZooError, ProfileError
from klas_zoo.profiles.estimates import estimate, measurements
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
        lambda t: t["networks"][1]["latency"].update(p50_ms=-3), r"\[1\]\.latency\.p50_ms is .* >= 0\.0001, not -3"
    ),
    "a latency of zero": (lambda t: t["networks"][0]["latency"].update(min_ms=0), r"min_ms is .* >= 0\.0001, not 0"),
    "a latency that is a text": (
        lambda t: t["networks"][0]["latency"].update(p50_ms="3 ms"), r"p50_ms is not valid: expected float, not '3 ms'"
    ),
    "a latency that is true": (lambda t: t["networks"][0]["latency"].update(p50_ms=True), r"expected float, not True"),
    "a missing number": (lambda t: t["networks"][0]["latency"].pop("p99_ms"), r"networks\[0\]\.latency is .* p99_ms"),
    "percentiles that fall": (
        lambda t: t["networks"][0]["latency"].update(p90_ms=0.001), r"p90_ms is 0\.001, less than p50_ms"
    ),
    "no runs": (lambda t: t["networks"][0]["latency"].update(runs=0), r"runs is not valid: expected int >= 1, not 0"),
    "another unit": (lambda t: t.update(unit="us"), r"unit is not valid: expected one of 'ms', not 'us'"),
    "a newer schema": (lambda t: t.update(schema_version=99), r"by a newer klas-zoo: its schema is 99"),
    "no schema": (lambda t: t.pop("schema_version"), r"it has no schema_version"),
    "an unknown field": (lambda t: t.update(mood="good"), r"unknown fields mood"),
    "an unknown precision": (lambda t: t.update(precision="fp12"), r"precision is 'fp12', not one of fp32"),
    "a batch of zero": (lambda t: t.update(batch=0), r"batch is not valid: expected int >= 1"),
    "a date that is none": (lambda t: t.update(measured_at="yesterday"), r"isoformat string: 'yesterday'"),
    "a date without a zone": (lambda t: t.update(measured_at="2026-01-02T03:04:05"), r"without its time zone"),
    "a route and segments that differ": (lambda t: t["networks"][0].update(route="base"), r"those of 'tiny'"),
    "a network twice": (lambda t: t["networks"].append(t["networks"][0]), r"networks has one route twice"),
    "no networks and no reason": (lambda t: t.update(networks=[]), r"networks has none"),
    "multiply-adds that are not the model's": (lambda t: t["networks"][0].update(macs=7), r"7, and 41500 in its model"),
    "a model with a hole": (lambda t: t["model"]["anchors"]["tiny"]["widths"].pop(), r"4 numbers, 5 are needed"),
    "a negative block": (
        lambda t: t["model"]["anchors"]["tiny"].update(block_ms=[1, 1, -1, 1]), r"block_ms\[2\] is .* float >= 0"
    ),
    "an anchor without a rate": (lambda t: t["model"]["seam_ms_per_gmac"].pop("base"), r"only one has base"),
    "hardware that clears the screen": (
        lambda t: t.update(hardware="\x1b[2J"), r"hardware is '\\x1b\[2J', which no terminal shows"
    ),
    "hardware of half a character": (lambda t: t.update(hardware="\ud800"), r"hardware is '\\ud800', which no"),
    "an empty name": (lambda t: t.update(device=""), r"device is not valid: expected str of length >= 1"),
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


def test_a_profile_that_is_dated_in_the_future_is_not_the_newest_and_is_not_imported(tmp_path: Path) -> None:
    old, never = profile(), profile(measured_at="9999-12-31T23:59:59+00:00", device="loom", hardware="a loom")
    store = ProfileStore(tmp_path / "store")
    store.add([never])
    store.add([old])
    assert store.profiles() == [old, never]
    (tmp_path / "file.json").write_text(to_text([never]))
    with pytest.raises(ProfileError, match=r"measured at 9999-12-31T23:59:59\+00:00, which is in the future: set the clock"):
        import_file(tmp_path, tmp_path / "file.json")


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


def as_schema_1(table: dict[str, Any], options: dict[str, object]) -> dict[str, Any]:
    """The record as klas-zoo 0.1 wrote it: the device's time is `latency`, and the host's without copies `host`."""
    networks = [{key: value for key, value in one.items() if key != "device"} for one in table["networks"]]
    for one in networks:
        one["host"] = to_json(profile())["networks"][0]["latency"] if table["kind"] == "gpu" else None
    old = {key: value for key, value in table.items() if key != "clock"}
    return {**old, "schema_version": 1, "networks": networks, "options": options}


def test_a_profile_of_a_gpu_of_schema_1_is_one_of_the_devices_clock() -> None:
    new = profile(kind="gpu", device="own-gpu", compute_capability="8.0", provider="CUDAExecutionProvider", threads=0)
    old = as_schema_1(to_json(new), {"compiled": False, "cuda_graph": True, "spinning": "while running"})
    (found,) = from_text(json.dumps(old), "old.json")
    assert found == replace(new, clock="device", options={"enable_cuda_graph": "1"})
    for record in measurements(found, found.networks[0]):
        assert (record.clock, record.options) == ("device", '{"enable_cuda_graph":"1"}')
    assert estimate(found, STITCH).clock == "device"


def test_a_profile_of_a_processor_of_schema_1_is_one_of_the_hosts_clock() -> None:
    old = as_schema_1(to_json(profile()), {"compiled": False, "cuda_graph": False, "spinning": "while running"})
    assert from_text(json.dumps({"schema_version": 1, "profiles": [old, old]}), "old.json") == [profile(), profile()]
    torch = as_schema_1(to_json(profile(runtime="torch", provider="cpu")), {"compiled": True, "cuda_graph": False})
    assert from_text(json.dumps(torch), "old.json")[0].options == {"compile": "1"}


def test_both_clocks_of_a_network_are_records_with_their_conditions() -> None:
    seen = network(STITCH, 2.0, device=statistics(1.5))
    host, device = measurements(profile(kind="gpu", threads=0, options={"enable_cuda_graph": "1"}), seen)
    assert (host.clock, host.p50_ms, device.clock, device.p50_ms) == ("host", 2.0, "device", 1.5)
    assert host.options == device.options == '{"enable_cuda_graph":"1"}'
    assert host.conditions.comparable != device.conditions.comparable

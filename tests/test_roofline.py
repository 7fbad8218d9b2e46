"""Rooflines by hand, their calibration, and builds for devices that are not here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from profiles_made_up import latency_model, statistics

from klas_zoo.cli import main
from klas_zoo.cli.tables import profile_table
from klas_zoo.costs.predictions import predict_profiles, predicted_costs
from klas_zoo.costs.targets import target_device
from klas_zoo.errors import AbsentDevice, ProfileError, UnknownName
from klas_zoo.families.anchors import Family
from klas_zoo.profiles.catalog import catalog
from klas_zoo.profiles.devices import elsewhere
from klas_zoo.profiles.files import from_text, to_text
from klas_zoo.profiles.profile import MeasuredNetwork, PredictionError, Profile
from klas_zoo.profiles.roofline import Calibration, calibration_of, calibrations, operations_ms
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.profiles.traffic import Operation
from klas_zoo.routes import Route
from klas_zoo.units import format_latency

T4 = catalog()["t4"]
CALIBRATION = Calibration(
    compute=0.5, memory=0.8, kernel_us=5.0, host_us=0.0, based_on="torch",
    error=PredictionError(checked=9, median_percent=10, p90_percent=20, largest_percent=30, method="made up"),
)  # fmt: skip
PRODUCT = Operation(macs=10**9, activations=10**5, weights=10**5)
COPY = Operation(macs=0, activations=10**7, weights=0)
TINY = Operation(macs=10, activations=10, weights=0)


def ms(*operations: Operation, batch: int = 1, **changes: Any) -> tuple[float, float]:
    return operations_ms(operations, T4, replace(CALIBRATION, **changes), precision="fp16", batch=batch)


def test_an_operator_takes_its_arithmetic_or_its_bytes_whichever_is_longer_and_no_less_than_a_kernel() -> None:
    assert ms(PRODUCT)[0] == pytest.approx(1e3 * 2e9 / (65e12 * 0.5))
    assert ms(COPY)[0] == pytest.approx(1e3 * 2 * 10**7 / (320e9 * 0.8))
    assert ms(TINY)[0] == pytest.approx(5e-3)
    assert ms(PRODUCT, COPY, TINY)[0] == pytest.approx(ms(PRODUCT)[0] + ms(COPY)[0] + 5e-3)


def test_batches_multiply_arithmetic_and_activations_and_weights_are_read_once() -> None:
    assert ms(PRODUCT, batch=8)[0] == pytest.approx(8 * ms(PRODUCT)[0])
    weights = Operation(macs=0, activations=0, weights=10**7)
    assert ms(weights, batch=8)[0] == ms(weights)[0]


def test_the_host_needs_its_time_for_every_operator() -> None:
    assert ms(TINY, TINY, host_us=20.0)[1] == pytest.approx(0.04)
    assert ms(TINY, host_us=20.0) == pytest.approx((0.005, 0.02))


def test_a_precision_or_a_device_without_figures_is_an_error() -> None:
    with pytest.raises(ProfileError, match="t4 has no bf16: it has fp32, fp16, int8"):
        operations_ms([PRODUCT], T4, CALIBRATION, precision="bf16", batch=1)
    with pytest.raises(ProfileError, match="no public figures of cpu: measure a profile"):
        operations_ms([PRODUCT], catalog()["cpu"], CALIBRATION, precision="fp32", batch=1)
    with pytest.raises(ProfileError, match="no roofline of abacus, only of"):
        calibration_of("abacus")


def test_every_runtime_of_a_profile_has_a_calibration_within_physics() -> None:
    assert {"onnxruntime", "torch", "torch-compiled", "tensorrt"} <= calibrations().keys()
    for one in calibrations().values():
        assert 0.1 < one.compute < 1.3
        assert 0.1 < one.memory < 1.6  # caches give more than the memory's bandwidth
        assert one.error.checked >= 8 and "left out of the fit" in one.error.method
        assert 0 < one.error.median_percent <= one.error.p90_percent <= one.error.largest_percent


def predict(family: Family, device: str, store: ProfileStore, **changes: Any) -> Profile:
    options: dict[str, Any] = {"runtime": "onnxruntime", "precision": "fp32", "batches": (8,), "store": store}
    (found,) = predict_profiles(family, catalog()[device], **options | changes)
    return found


def as_measured(profile: Profile, times: float, family: Family) -> Profile:
    """A profile of the same device whose anchors take so many times what was predicted."""
    model = profile.model
    assert model is not None
    anchors = [Route.anchor(name, chain.depth) for name, chain in family.chains.items()]
    networks = tuple(
        MeasuredNetwork(
            route=one, macs=model.macs(one), parameters=1, latency=statistics(times * model.predict_ms(one))
        )
        for one in anchors
    )
    return replace(profile, origin="measured", networks=networks, model=None)


def test_a_roofline_is_a_profile_that_says_so(tiny_family: Family, tmp_path: Path) -> None:
    found = predict(tiny_family, "t4", ProfileStore(tmp_path))
    assert (found.origin, found.device, found.kind, found.networks) == ("roofline", "t4", "gpu", ())
    assert found.model is not None and found.model.error.method.startswith("unchecked: ")
    assert to_text(from_text(to_text([found]), "here")) == to_text([found])


def test_measured_profiles_of_other_devices_correct_it(tiny_family: Family, tmp_path: Path) -> None:
    store = ProfileStore(tmp_path)
    plain = predict(tiny_family, "t4", store)
    route = Route.anchor("half", 3)
    for number, (device, times) in enumerate((("a100", 2.0), ("l4", 2.2)), start=1):
        # made with a calibration that nothing has corrected yet
        store.add([as_measured(predict(tiny_family, device, ProfileStore(tmp_path / "none")), times, tiny_family)])
        found = predict(tiny_family, "t4", store)
        assert found.model is not None and plain.model is not None
        expected = (2.0, 2.1)[number - 1]
        # statistics are rounded
        assert found.method["factor_of_profiles"] == pytest.approx(expected, rel=0.01)
        assert found.model.predict_ms(route) == pytest.approx(expected * plain.model.predict_ms(route), rel=0.01)
        if number == 1:
            assert found.model.error == plain.model.error
        else:
            assert "each of a100, l4 predicted from profiles of the others" in found.model.error.method
            assert found.model.error.median_percent == pytest.approx(10, abs=2)
    # what was measured on the device itself is no correction of its prediction
    before = predict(tiny_family, "t4", store).method["factor_of_profiles"]
    store.add([as_measured(plain, 9.0, tiny_family)])
    assert predict(tiny_family, "t4", store).method["factor_of_profiles"] == before


def test_a_measured_profile_prices_routes_and_a_roofline_where_there_is_none(
    tiny_family: Family, tmp_path: Path
) -> None:
    store, t4 = ProfileStore(tmp_path), elsewhere("t4", "not here")
    by_roofline = predicted_costs(tiny_family, t4, batches=(1, 8), store=store)
    assert by_roofline is not None and by_roofline.profile.origin == "roofline"
    assert [one.batch for one in store.profiles("tiny-vits", "t4")] == [8, 1] or len(store.paths()) == 2
    anchor = Route.anchor("float", 4)
    assert by_roofline.origin(anchor) == "roofline (unchecked)"
    measured = as_measured(by_roofline.profile, 3.0, tiny_family)
    store.add([replace(measured, model=by_roofline.profile.model)])
    by_profile = predicted_costs(tiny_family, t4, batches=(1,), store=store)
    assert by_profile is not None and by_profile.profile.origin == "measured"
    assert by_profile(anchor) == pytest.approx(3 * by_roofline(anchor), rel=1e-2)
    assert by_profile.origin(anchor) == "measured"
    assert by_profile.anchors_ms().keys() == {"half", "train", "float"}
    with pytest.raises(AbsentDevice, match="no profile of tiny-vits on fleet-7 at batch 1"):
        predicted_costs(tiny_family, elsewhere("fleet-7", ""), batches=(1,), store=store)


def test_predictions_do_not_pile_up_and_measurements_stay(tiny_family: Family, tmp_path: Path) -> None:
    store, t4 = ProfileStore(tmp_path), elsewhere("t4", "not here")
    first = predict(tiny_family, "t4", store)
    (place,) = store.add([first])
    (measured,) = store.add([as_measured(first, 2.0, tiny_family)])
    other = replace(first, family_sha256="0" * 64)  # networks of the same name
    (others,) = store.add([other])
    # what klas-zoo wrote before it had one file for all predictions of the same networks
    for second in range(3):
        (place.parent / f"2026010100000{second}-0123456789ab.json").write_text(to_text([first]))
    for _ in range(3):
        assert predicted_costs(tiny_family, t4, batches=(8,), store=store, runtime="onnxruntime") is not None
    later = replace(first, measured_at="2031-01-01T00:00:00+00:00")
    assert store.add([later]) == [place]
    assert set(store.paths()) == {place, measured, others}
    assert [one.measured_at for one in store.read(place)] == [later.measured_at]


def test_the_newest_profile_is_the_newest_in_whatever_zone_it_was_measured(
    tiny_family: Family, tmp_path: Path
) -> None:
    store = ProfileStore(tmp_path)
    one = as_measured(predict(tiny_family, "t4", store), 1.0, tiny_family)
    earlier = replace(one, measured_at="2026-03-01T23:30:00+09:00")
    later = replace(one, measured_at="2026-03-01T15:00:00+00:00")
    store.add([later, earlier])
    assert [found.measured_at for found in store.profiles()] == [later.measured_at, earlier.measured_at]


def test_the_target_of_a_build_may_be_elsewhere(tmp_path: Path, tiny_family: Family) -> None:
    store = ProfileStore(tmp_path)
    assert target_device("cpu", store).here
    far = target_device("A100-80GB", store)
    assert (far.name, far.here, far.torch_device, far.provider) == ("a100-80", False, "cpu", "CPUExecutionProvider")
    with pytest.raises(UnknownName, match="Unknown device 'fleet-7'"):
        target_device("fleet-7", store)
    store.add([replace(predict(tiny_family, "t4", store), device="fleet-7", kind="cpu")])
    assert target_device("fleet-7", store).hardware == "not here: NVIDIA t4, public figures"
    with pytest.raises(UnknownName, match="did you mean fleet-7"):
        target_device("fleet-8", store)
    with pytest.raises(AbsentDevice):
        target_device("cuda", store)


def test_a_device_that_is_not_here_is_predicted_on_request(tmp_path: Path) -> None:
    arguments = ["profile", "--family", "deit-micro", "--device", "a100", "--predict", "--precision", "fp16"]
    arguments += ["--batch", "1,8", "--registry", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    small, large = json.loads(result.stdout)
    assert (small["origin"], small["batch"], large["batch"]) == ("roofline", 1, 8)
    whole = [one["model"]["anchors"]["base"] for one in (small, large)]
    assert sum(whole[0]["block_ms"]) <= sum(whole[1]["block_ms"])
    result = CliRunner().invoke(main, [*arguments[:4], "cpu", *arguments[5:]], catch_exceptions=False)
    assert result.exit_code == 1 and "no public figures of cpu: measure a profile" in result.stderr


def test_the_table_of_a_prediction_has_every_anchor_and_a_stitch_between_neighbours(
    tiny_family: Family, tmp_path: Path
) -> None:
    found = predict(tiny_family, "t4", ProfileStore(tmp_path))
    assert not found.networks and found.model is not None
    table = profile_table(found)
    names, latencies = (list(table.columns[at].cells) for at in (0, 3))
    assert set(tiny_family.chains) <= set(names) and len(names) == 2 * len(tiny_family.chains) - 1
    for name, shown in zip(names, latencies, strict=True):
        if name in tiny_family.chains:
            expected = found.model.predict_ms(Route.anchor(str(name), tiny_family.chains[str(name)].depth))
            assert shown == format_latency(expected)


def test_a_frontier_is_not_drawn_over_latencies_that_the_kernel_floor_makes_alike(
    tiny_family: Family, tmp_path: Path
) -> None:
    store, device = ProfileStore(tmp_path), elsewhere("h100", "not here")
    costs = predicted_costs(tiny_family, device, batches=(1,), store=store)
    assert costs is not None and not costs.tell_routes_apart  # networks of a few operators each on 3 TB/s
    assert costs.describe().endswith(
        "come out alike, since starting kernels takes longer than what they compute: a larger --batch or a measured "
        "profile tells them apart."
    )
    measured = as_measured(costs.profile, 3.0, tiny_family)
    store.add([replace(measured, model=costs.profile.model)])
    by_profile = predicted_costs(tiny_family, device, batches=(1,), store=store)
    assert by_profile is not None and by_profile.tell_routes_apart  # whatever it says, it was measured


def test_anchors_are_alike_only_where_one_does_much_more_in_the_same_time() -> None:
    model = latency_model()
    assert model.hidden_by_the_floor is None  # base takes four times as long, for as many multiply-adds
    heavy = replace(model.anchors["base"], block_macs=(90_000,) * 4)
    assert replace(model, anchors={**model.anchors, "base": heavy}).hidden_by_the_floor is None
    flat = replace(heavy, block_ms=model.anchors["tiny"].block_ms)
    assert replace(model, anchors={**model.anchors, "base": flat}).hidden_by_the_floor == ("tiny", "base")


def test_a_profile_in_the_precision_of_the_engines_is_taken_before_a_roofline_of_another(
    tiny_family: Family, tmp_path: Path
) -> None:
    """The flow of docs/profiles.md: profiled in fp16 on a machine that has one, built for here."""
    store, t4 = ProfileStore(tmp_path), elsewhere("t4", "not here")
    predicted = predict(tiny_family, "t4", store)
    half = replace(as_measured(predicted, 3.0, tiny_family), precision="fp16", model=predicted.model)
    store.add([half])
    engines = [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("tensorrt", "fp16")]
    found = predicted_costs(tiny_family, t4, batches=(8,), store=store, also=engines)
    assert found is not None
    assert (found.profile.origin, found.profile.precision, found.profile.batch) == ("measured", "fp16", 8)
    assert "(onnxruntime, fp16)" in found.describe()
    alone = predicted_costs(tiny_family, t4, batches=(8,), store=store)
    assert alone is not None and alone.profile.origin == "roofline"
    store.add([replace(half, precision="fp32")])
    exact = predicted_costs(tiny_family, t4, batches=(8,), store=store, also=engines)
    assert exact is not None and exact.profile.precision == "fp32"

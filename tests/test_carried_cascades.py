"""Cascades that go into a package which is exported anew: those whose thresholds hold for its engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import packages
import pytest

from klas_zoo.exporters.carried_cascades import carry_cascades
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import CASCADES, PackagedCascades, engines_of, read_cascades


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> PackagedCascades:
    package, _ = packages.carry_cascade(packages.write_package(tmp_path_factory.mktemp("given") / "package"))
    return read_cascades(package)


def _changed(given: PackagedCascades, threshold: float) -> PackagedCascades:
    (one,) = given.cascades
    first, second = one.cascade.stages
    cascade = replace(one.cascade, stages=(replace(first, threshold=threshold), second))
    return replace(given, cascades=(replace(one, cascade=cascade),))


def test_a_cascade_is_verified_and_keeps_its_latencies(given: PackagedCascades, tmp_path: Path) -> None:
    package, (verdict,) = carry_cascades(packages.write_package(tmp_path / "package"), given, threads=1)
    (carried,), (one,) = read_cascades(Package.open(package.folder)).cascades, given.cascades
    assert verdict.status == "verified" and verdict.artifact.route == carried.name == one.name
    assert carried.verification == verdict.verification
    assert (carried.cascade, carried.facts, carried.latencies) == (one.cascade, one.facts, one.latencies)
    assert carried.parameters > 1000 and carried.size_bytes > 4 * carried.parameters / 2
    assert CASCADES in Package.open(package.folder).manifest.files


def test_latencies_are_measured_anew_when_engines_are(given: PackagedCascades, tmp_path: Path) -> None:
    old = replace(given.cascades[0], latencies=())
    package, _ = carry_cascades(
        packages.write_package(tmp_path / "package"), replace(given, cascades=(old,)), threads=1, timed=True
    )
    (latency,) = read_cascades(package).cascades[0].latencies
    assert (latency.threads, latency.origin) == (1, "measured")
    assert 0 < latency.paths_ms[0] < latency.paths_ms[1]


def test_of_a_route_that_is_not_exported_there_is_no_cascade(given: PackagedCascades, tmp_path: Path) -> None:
    routes = packages.source().routes[::2]
    made = packages.write_package(tmp_path / "package", routes=routes)
    package, verdicts = carry_cascades(made, given, threads=1)
    assert verdicts == [] and package is made
    assert CASCADES not in package.manifest.files


def test_a_cascade_with_other_exits_than_torch_is_left_out_with_the_reason(
    given: PackagedCascades, tmp_path: Path
) -> None:
    made = packages.write_package(tmp_path / "package", load=lambda routes: packages.supernet(seed=5), fresh=True)
    references = packages.write_package(tmp_path / "other").folder / made.manifest.references
    (made.folder / made.manifest.references).write_bytes(references.read_bytes())
    packages.rehash(made.folder, made.manifest.references)
    package, (verdict,) = carry_cascades(Package.open(made.folder), given, threads=1)
    assert verdict.status == "refused" and verdict.verification is None
    assert str(given.cascades[0].cascade) in verdict.reason
    assert CASCADES not in package.manifest.files


def test_thresholds_of_int8_engines_hold_for_the_same_files_only(given: PackagedCascades, tmp_path: Path) -> None:
    made = packages.write_package(tmp_path / "package", precision="int8")
    easy = _changed(given, 0.0)  # all images stop at the first stage: exits are the same in any precision
    package, (verdict,) = carry_cascades(made, easy, threads=1)
    assert "fitted on another int8 engine of slim: fit them with klas-zoo cascades" in verdict.reason
    assert CASCADES not in package.manifest.files
    equal = replace(easy, engines=engines_of(made.manifest))
    package, (verdict,) = carry_cascades(made, equal, threads=1)
    assert verdict.status == "verified", verdict.reason
    assert len(read_cascades(package).cascades) == 1

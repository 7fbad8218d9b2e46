"""The main job from end to end, on networks and images small enough for seconds."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from profiles_made_up import statistics

import klas_zoo
from klas_zoo.building.engines import time_anchors
from klas_zoo.cli import main
from klas_zoo.profiles.profile import MeasuredNetwork
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry import Registry
from klas_zoo.registry.latencies import apply_profiles
from klas_zoo.registry.picking import pick

FAMILY = """
name = "toy"
input_shape = [3, 16, 16]
num_classes = 3
"""
ANCHOR = """
[[anchors]]
name = "{name}"
model = "vit_tiny_patch16_224"
arguments = {{ img_size = 16, patch_size = 8, embed_dim = {width}, depth = 3, num_heads = 2 }}
"""
QUICK = (
    *("--random-weights", "--tune-steps", "3", "--tune-batch", "8", "--init-images", "16"),
    *("--probe-epochs", "1", "--probe-batch", "8", "--buckets", "3", "--tolerance", "0", "--threads", "1"),
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a family file and a small image folder of three colours."""
    folder = tmp_path_factory.mktemp("toy")
    anchors = (ANCHOR.format(name=name, width=width) for name, width in (("small", 8), ("large", 16)))
    (folder / "toy.toml").write_text(FAMILY + "".join(anchors))
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for label, name in enumerate(("blue", "green", "red")):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def command(toy: Path, registry: Path, *more: object) -> list[str]:
    fixed = ["build", "--family", toy / "toy.toml", "--data", toy / "images", "--registry", registry]
    return [str(one) for one in (*fixed, *QUICK, *more)]


@pytest.fixture(scope="module")
def built(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    registry = tmp_path_factory.mktemp("registry")
    more = ("--json", "--log-json", str(registry / "log.json"))
    result = CliRunner().invoke(main, [*command(toy, registry), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return registry, json.loads(result.stdout)


def test_a_build_registers_verified_timed_engines(built: tuple[Path, dict]) -> None:
    registry, report = built
    engines = Registry.open(registry, create=False).engines()
    wanted = {r["route"] for r in report["routes"] if r["on_frontier"] or len(r["segments"]) == 1}
    assert {str(one.route) for one in engines} == wanted
    for one in engines:
        assert one.verification.passed
        assert one.verification.images == 24
        assert one.latencies[0].runs >= 50
        assert one.latencies[0].min_ms <= one.latencies[0].p50_ms <= one.latencies[0].p99_ms


def test_the_report_holds_every_number_that_led_to_the_choice(built: tuple[Path, dict]) -> None:
    _, report = built
    candidates = report["selection"]["candidates"]
    chosen = {c["route"] for c in candidates if c["reason"]}
    assert chosen == {r["route"] for r in report["routes"] if len(r["segments"]) > 1}
    for one in candidates:
        assert one["score"] == pytest.approx(max(one["mismatch"], 0) / max(one["capacity"], 1e-4))


def test_random_weights_are_loud_everywhere(built: tuple[Path, dict], toy: Path) -> None:
    registry, report = built
    assert report["build"]["weights"] == "random"
    for arguments in (["list"], ["pick", "--latency", "1s"]):
        result = CliRunner().invoke(main, [*arguments, "--registry", str(registry)])
        assert "random" in result.output.lower()


def test_pictures_and_reports_are_written(built: tuple[Path, dict]) -> None:
    registry, report = built
    (folder,) = (registry / "reports").iterdir()
    assert json.loads((folder / "report.json").read_text()) == report
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert {one["route"] for one in shown["engines"]} == {one["route"] for one in report["routes"] if one["engines"]}
    assert shown["builds"][0]["selection"]["pairs"] and shown["random_weights"]
    assert shown["builds"][0]["preprocessing"]["mean"] == report["preprocessing"]["mean"]
    with Image.open(folder / "frontier.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 800


def test_a_picked_engine_answers_any_batch(built: tuple[Path, dict]) -> None:
    registry, _ = built
    session = pick("10s", registry=registry).load()
    for batch in (1, 5):
        logits = session.run(np.zeros((batch, 3, 16, 16), np.float32))
        assert logits.shape == (batch, 3)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_engines(built: tuple[Path, dict], toy: Path, tmp_path: Path) -> None:
    _, first = built
    result = CliRunner().invoke(main, [*command(toy, tmp_path), "--json"], catch_exceptions=False)
    again = json.loads(result.stdout)
    assert again["selection"] == first["selection"]
    assert [r["top1"] for r in again["routes"]] == [r["top1"] for r in first["routes"]]


STAGES = [
    *("probes", "similarity", "initialise", "evaluate untuned", "tune", "evaluate tuned"),
    *("export and verify", "latency", "register"),
]


def test_the_same_command_again_does_nothing_anew(built: tuple[Path, dict], toy: Path) -> None:
    registry, first = built
    before = Registry.open(registry, create=False).engines()
    result = CliRunner().invoke(main, [*command(toy, registry), "--json"], catch_exceptions=False)
    again = json.loads(result.stdout)
    assert again["build_id"] == first["build_id"]
    assert again["routes"] == first["routes"]
    assert again["seconds"] == first["seconds"]
    assert Registry.open(registry, create=False).engines() == before
    assert all(f"{name:17} cached (originally" in result.stderr for name in STAGES)


@pytest.mark.parametrize(
    ("change", "first_to_do"),
    [
        ([], None),
        (["--workers", "2"], None),
        (["--latency-batch", "2"], "latency"),
        (["--threads", "2"], "export and verify"),
        (["--tune-steps", "4"], "tune"),
        (["--init-images", "8"], "initialise"),
        (["--probe-epochs", "2"], "probes"),
        (["--redo", "evaluate tuned"], "evaluate tuned"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_dry_run_tells_what_a_changed_setting_redoes(
    change: list[str], first_to_do: str | None, built: tuple[Path, dict], toy: Path
) -> None:
    arguments = [*command(toy, built[0], "--dry-run", "--json"), *change]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    found = {one["stage"]: one["status"] for one in json.loads(result.stdout)}
    kept = STAGES[: STAGES.index(first_to_do)] if first_to_do else STAGES
    assert list(found) == STAGES
    assert [name for name, status in found.items() if status == "cached"] == kept


def test_gc_deletes_results_that_no_registered_build_was_made_from(
    built: tuple[Path, dict], toy: Path, tmp_path: Path
) -> None:
    registry = Path(shutil.copytree(built[0], tmp_path / "registry"))
    here = ("--registry", str(registry))

    def gc(*more: str) -> list[str]:
        result = CliRunner().invoke(main, ["registry", "gc", "--cache-unused", "0", *more, *here, "--json"])
        assert result.exit_code == 0, result.stderr
        return [name.partition("/")[0] for name in json.loads(result.stdout)["results"]]

    assert gc() == []
    result = CliRunner().invoke(main, [*command(toy, registry, "--dry-run", "--json")], catch_exceptions=False)
    statuses = {one["stage"]: one["status"] for one in json.loads(result.stdout)}
    assert statuses == dict.fromkeys(STAGES, "cached")
    assert CliRunner().invoke(main, ["registry", "remove", "toy", *here]).exit_code == 0
    assert gc("--dry-run") == gc() == sorted(name.replace(" ", "-") for name in STAGES)
    assert not [path for path in (registry / "cache").rglob("*") if path.is_file() and path.name != "in-use.lock"]


def test_a_build_of_a_dominated_family_says_that_a_plain_network_may_serve_better(toy: Path, tmp_path: Path) -> None:
    text = (toy / "toy.toml").read_text()
    family = toy / "dominated.toml"
    family.write_text(text.replace("num_classes = 3", 'num_classes = 3\ndominated = "plain networks are better"'))
    arguments = command(toy, tmp_path, "--dry-run")
    for file, times in ((toy / "toy.toml", 0), (family, 1)):
        arguments[arguments.index("--family") + 1] = str(file)
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        note = "Note: plain networks are better; a plain network may serve better (benchmarks/README.md)."
        assert " ".join(result.stderr.split()).count(note) == times


def test_a_stage_nobody_knows_is_said_before_any_work(built: tuple[Path, dict], toy: Path) -> None:
    result = CliRunner().invoke(main, command(toy, built[0], "--redo", "tuning"), catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Unknown stage 'tuning': did you mean tune?" in result.stderr
    assert "cached (originally" not in result.stderr


def test_show_tells_where_an_engine_came_from(built: tuple[Path, dict], toy: Path) -> None:
    registry, report = built
    engine = Registry.open(registry, create=False).engines()[0]
    for asked in (str(engine.route), str(engine.path)):
        result = CliRunner().invoke(main, ["show", asked, "--registry", str(registry), "--json"])
        shown, *_ = json.loads(result.stdout)
        assert shown["engine"]["sha256"] == engine.sha256
        manifest = shown["build"]["manifest"]
        assert manifest["anchors"].keys() == {"small", "large"}
        assert manifest["data"]["fingerprint"] == report["data_fingerprint"]
        assert [one["stage"] for one in manifest["stages"]] == STAGES[:-1]
        assert all(one["seconds"] >= 0 and one["key"] for one in manifest["stages"])
    text = CliRunner().invoke(main, ["show", str(engine.route), "--registry", str(registry)]).stdout
    for part in (engine.sha256, report["build"]["command"], "seeds", "stage        tune", "RANDOM WEIGHTS"):
        assert part in text
    result = CliRunner().invoke(main, ["show", "smal", "--registry", str(registry)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean small?" in result.stderr


def test_the_manifest_lies_beside_the_report_with_all_stages(built: tuple[Path, dict]) -> None:
    registry, report = built
    (file,) = (registry / "reports").glob("*/manifest.json")
    manifest = json.loads(file.read_text())
    assert [one["stage"] for one in manifest["stages"]] == STAGES
    assert manifest["build"]["versions"] == report["build"]["versions"]
    assert manifest["seeds"] == {"build": 0, "selection": 0, "tuning": 0}


def test_the_log_tells_every_pass_in_order(built: tuple[Path, dict]) -> None:
    events = [json.loads(line) for line in (built[0] / "log.json").read_text().splitlines()]
    assert [one["stage"] for one in events if one["event"] == "finished"] == ["check images", *STAGES]
    assert any(one["event"] == "scalars" and {"loss", "rate"} <= one.keys() for one in events)


def wait_for(file: Path, text: str, child: subprocess.Popen) -> None:
    for _ in range(6_000):  # a busy machine may take minutes
        if file.is_file() and text in file.read_text():
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no {text} in {file}")


@pytest.mark.slow
def test_a_build_told_to_stop_puts_tuning_away_and_goes_on(toy: Path, tmp_path: Path) -> None:
    arguments = command(toy, tmp_path, "--tune-steps", "100000")
    child = subprocess.Popen(
        [sys.executable, "-m", "klas_zoo", *arguments, "--log-json", str(tmp_path / "log.json")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "log.json", '"scalars"', child)
    child.send_signal(signal.SIGTERM)
    out, error = child.communicate(timeout=120)
    assert (child.returncode, out) == (143, "")
    assert "Stopped by SIGTERM at step " in error and "run the same command again" in error
    assert "Traceback" not in error
    assert list((tmp_path / "cache" / "tune").glob("*.unfinished/checkpoint.pt"))
    result = CliRunner().invoke(main, [*arguments, "--dry-run"], catch_exceptions=False)
    assert any(line.split()[:2] == ["tune", "resumes"] for line in result.stdout.splitlines())


@pytest.mark.slow
def test_two_processes_build_what_one_does(toy: Path, tmp_path: Path) -> None:
    """The same build by one process takes what two have done for its own."""
    arguments = command(toy, tmp_path, "--tune-precision", "fp32")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "klas_zoo"]
    done = subprocess.run([*start, *arguments, "--nproc", "2"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert Registry.open(tmp_path, create=False).engines()
    result = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"], catch_exceptions=False)
    assert {one["status"] for one in json.loads(result.stdout)} == {"cached"}
    # what cannot be shared out is one sentence, however many processes find out
    bad = subprocess.run(
        [*start, *arguments, "--nproc", "2", "--tune-batch", "7"], capture_output=True, text=True, env=environment
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("Error: A batch of 7 images cannot be") == 1
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_without_tuning_accuracy_stays_as_it_was(toy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*command(toy, tmp_path), "--tune-steps", "0", "--json"], catch_exceptions=False)
    routes = json.loads(result.stdout)["routes"]
    assert [r["top1"] for r in routes] == [r["top1_before"] for r in routes]


@pytest.mark.slow
def test_engines_of_fp32_and_bf16_are_built_verified_timed_and_picked_in_openvino(toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'klas-zoo[openvino]'")
    more = ("--tune-steps", "0", "--precision", "fp32,bf16", "--runtime", "openvino")
    result = CliRunner().invoke(main, command(toy, tmp_path, *more), catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    engines = Registry.open(tmp_path, create=False).engines()
    assert {(one.runtime, one.precision, one.status) for one in engines} == {
        ("openvino", precision, "verified") for precision in ("fp32", "bf16")
    }
    assert all(one.latencies and one.verification for one in engines)
    picked = pick("10s", registry=tmp_path)
    with picked.load() as session:
        assert session.runtime == "openvino"
        assert session.run(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, 3)


@pytest.mark.slow
def test_a_family_of_one_channel_is_built_evaluated_and_used_with_grey_images(toy: Path, tmp_path: Path) -> None:
    text = (toy / "toy.toml").read_text()
    text = text.replace("[3, 16, 16]", "[1, 16, 16]").replace("num_heads", "in_chans = 1, num_heads")
    (tmp_path / "grey.toml").write_text(text)
    arguments = command(toy, tmp_path, "--tune-steps", "3")
    arguments[2] = str(tmp_path / "grey.toml")
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "its networks take 1 channel, and timm's mean and std are of three: their average" in result.stderr
    engine = pick("10s", registry=tmp_path).engine
    found = klas_zoo.evaluate(str(engine.route), registry=tmp_path, data=toy / "images")
    assert {one.precision: one.top1 for one in found}[engine.precision] == pytest.approx(engine.top1)
    with pick("10s", registry=tmp_path).load() as session:
        assert session.preprocess(toy / "images/val/red/0.png").shape == (1, 16, 16)
        assert len(session.predict(toy / "images/val/red/0.png")) == 3
    (tmp_path / "grey.toml").write_text(text.replace("[1, 16", "[4, 16").replace("in_chans = 1", "in_chans = 4"))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "Images are read as RGB, 3 channels, or for networks of 1 channel as grey; the anchors" in result.stderr


def test_an_unreadable_image_stops_the_build_and_names_it(
    built: tuple[Path, dict], toy: Path, tmp_path: Path
) -> None:
    registry, _ = built
    before = Registry.open(registry, create=False).engines()
    bad = toy / "images" / "train" / "red" / "bad.png"
    bad.write_bytes(b"no picture")
    try:
        result = CliRunner().invoke(main, command(toy, registry), catch_exceptions=False)
    finally:
        bad.unlink()
    assert result.exit_code == 1
    assert "1 of " in result.stderr and "bad.png: it is not an image" in result.stderr
    assert Registry.open(registry, create=False).engines() == before


@pytest.mark.slow
def test_a_build_killed_in_a_stage_leaves_the_registry_as_it_was_and_the_next_one_completes_it(
    built: tuple[Path, dict], toy: Path, tmp_path: Path
) -> None:
    registry = Path(shutil.copytree(built[0], tmp_path / "registry"))
    before = Registry.open(registry, create=False).engines()
    other = command(toy, registry, "--seed", "1")
    for stage in ("tune", "export and verify", "latency"):
        log = tmp_path / f"{stage}.json"
        child = subprocess.Popen(
            [sys.executable, "-m", "klas_zoo", *other, "--log-json", str(log)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(log, f'"stage": "{stage}"', child)
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert Registry.open(registry, create=False).engines() == before
    assert CliRunner().invoke(main, other, catch_exceptions=False).exit_code == 0
    after = Registry.open(registry, create=False).engines()
    assert {one.build_id for one in after}.isdisjoint({one.build_id for one in before})


def routes(toy: Path, registry: Path, *more: object) -> tuple[int, str, str]:
    arguments = ["routes", "--family", toy / "toy.toml", "--registry", registry, *more]
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["klas-latency", "snnet"])
def test_a_build_takes_any_selector_and_the_report_names_it(
    selector: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*arguments: Any, **options: Any) -> dict[str, float]:
        # anchors this small differ in latency by less than the noise
        found = time_anchors(*arguments, **options)
        assert found.keys() == {"small", "large"} and min(found.values()) > 0
        return {"small": 1.0, "large": 4.0}

    monkeypatch.setattr("klas_zoo.building.engine_stages.time_anchors", timed)
    arguments = [*command(toy, tmp_path, "--selector", selector, "--tune-steps", "0"), "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    selection = json.loads(result.stdout)["selection"]
    assert selection["selector"] == selector
    assert selection["cost_unit"] == ("ms" if selector == "klas-latency" else "multiply-adds")
    assert bool(selection["score"]) == (selector != "snnet")
    chosen = [one for one in selection["candidates"] if one["reason"]]
    assert all(isinstance(one["score"], float) for one in chosen) == (selector != "snnet")
    if selector == "snnet":
        places = [(one["segments"][0][2], one["segments"][1][1] - 1) for one in chosen]
        assert sorted(places) == [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 1), (3, 2)]
        assert selection["measurements"] == {}
    if selector == "klas-latency":
        assert selection["measurements"]["latency_ms"] == {"small": 1.0, "large": 4.0}
        assert all(1 < one["cost"] < 4 for one in chosen)


def test_a_build_with_the_papers_selector_says_which_buckets_are_empty(built: tuple[Path, dict]) -> None:
    _, report = built
    held = {one["bucket"] for one in report["selection"]["candidates"]}
    empty = report["selection"]["empty_buckets"].get("small:large", [])
    assert set(empty) == set(range(3)) - held


def test_routes_are_those_of_the_last_build(built: tuple[Path, dict], toy: Path) -> None:
    registry, report = built
    code, out, err = routes(toy, registry, "--buckets", "3", "--tolerance", "0", "--json")
    assert code == 0, err
    assert f"Scores are those of build {report['build_id']}" in err and "RANDOM WEIGHTS" in err
    listed = {one["route"]: one for one in json.loads(out)}
    assert listed.keys() == {one["route"] for one in report["routes"]}
    for one in report["routes"]:
        assert listed[one["route"]]["macs"] == one["cost"]["macs"]
        assert listed[one["route"]]["parameters"] == one["cost"]["parameters"]
        assert listed[one["route"]]["segments"] == one["segments"]
    scores = {one["route"]: one["score"] for one in report["selection"]["candidates"]}
    assert all(one["score"] == scores.get(route) for route, one in listed.items())


@pytest.mark.parametrize("selector", ["kl-only", "ce", "random"])
def test_one_builds_measurements_serve_every_selector_they_suffice_for(
    selector: str, built: tuple[Path, dict], toy: Path
) -> None:
    code, out, err = routes(toy, built[0], "--selector", selector, "--json")
    assert code == 0, err
    assert any(one["target"] == "large" for one in json.loads(out))


def test_the_newest_report_that_can_be_read_counts_and_brings_its_latencies(
    built: tuple[Path, dict], toy: Path, tmp_path: Path
) -> None:
    for number, milliseconds in ((9, 3.0), (10, 5.0)):
        report = copy.deepcopy(built[1])
        report["build_id"] = number
        for one in report["routes"]:
            if one["route"] in ("small", "large"):
                one["latencies"][0]["p50_ms"] = milliseconds if one["route"] == "large" else 1.0
        folder = tmp_path / "reports" / f"{number:04d}-toy-cpu"
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    (tmp_path / "reports" / "0011-toy-cpu").mkdir()
    (tmp_path / "reports" / "0011-toy-cpu" / "report.json").write_text("{")
    code, out, err = routes(toy, tmp_path, "--selector", "klas-latency", "--json")
    assert code == 0, err
    assert "Scores are those of build 10," in err
    assert any(one["target"] == "large" for one in json.loads(out))


def test_routes_without_anything_measured_say_what_to_do(built: tuple[Path, dict], toy: Path, tmp_path: Path) -> None:
    for registry, selector in ((built[0], "cka"), (tmp_path, "klas")):
        code, out, err = routes(toy, registry, "--selector", selector)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert f"run klas-zoo build --family {toy / 'toy.toml'} --selector {selector} first, or pass --data" in err


@pytest.mark.slow
def test_routes_of_another_direction_or_pair_than_was_measured_are_not_guessed(toy: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, command(toy, tmp_path, "--selector", "cka", "--tune-steps", "0"))
    assert done.exit_code == 0, done.stderr
    assert routes(toy, tmp_path, "--selector", "cka")[0] == 0
    code, out, err = routes(toy, tmp_path, "--selector", "cka", "--direction", "both")
    assert (code, out) == (1, "")
    assert "cka needs measurements of toy that no build has taken: run klas-zoo build" in err
    assert "--selector cka --direction both first" in err


def test_routes_of_other_networks_with_the_same_names_are_not_taken_for_these(
    built: tuple[Path, dict], toy: Path, tmp_path: Path
) -> None:
    other = tmp_path / "toy.toml"
    other.write_text((toy / "toy.toml").read_text().replace("num_heads = 2", "num_heads = 4"))
    result = CliRunner().invoke(main, ["routes", "--family", str(other), "--registry", str(built[0])])
    assert (result.exit_code, result.stdout) == (1, "")
    assert "needs measurements of toy that no build has taken" in result.stderr


def test_routes_are_measured_on_images_and_checkpoints_that_are_given(toy: Path, tmp_path: Path) -> None:
    for name, width in (("small", 8), ("large", 16)):
        model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=8, embed_dim=width, depth=3, num_heads=2
        )
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    given = ("--data", toy / "images", "--weights", tmp_path)
    code, out, err = routes(toy, tmp_path / "none", "--selector", "output-kl", *given, "--json")
    assert code == 0, err
    stitches = [one for one in json.loads(out) if one["target"]]
    assert stitches and all(one["score"] >= 0 for one in stitches)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_build_for_a_device_elsewhere_goes_by_its_roofline_until_a_profile_arrives(
    built: tuple[Path, dict], toy: Path
) -> None:
    registry, _ = built
    far = ("--device", "a100")
    result = CliRunner().invoke(main, [*command(toy, registry, *far), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "Latencies on a100 are predicted by a roofline (unchecked: " in result.stderr
    assert "Nothing is timed: a100 is not on this machine" in result.stderr
    report = json.loads(result.stdout)
    for one in report["routes"]:
        assert one["latencies"] == [] and one["predicted_ms"] > 0
        assert one["predicted_by"] == "roofline (unchecked)"
    best = 0.0
    for one in sorted(report["routes"], key=lambda one: (one["predicted_ms"], -one["top1"])):
        assert one["on_frontier"] == (one["top1"] > best)
        best = max(best, one["top1"])
    found = pick("1s", device="a100", registry=registry)
    assert found.latency.origin == "roofline" and found.engine.verification.passed
    store = ProfileStore.of(registry)
    (roofline,) = store.profiles("toy", "a100")
    engine = found.engine
    network = MeasuredNetwork(
        route=engine.route, macs=engine.macs, parameters=engine.parameters, latency=statistics(0.5)
    )
    store.add([replace(roofline, origin="measured", networks=(network,))])
    apply_profiles(Registry.open(registry, create=False), "toy", "a100")
    filled = pick("1s", device="a100", registry=registry, measured_only=True)
    assert (filled.latency_ms, filled.latency.origin) == (0.5, "measured")
    assert pick("1s", device="cpu", registry=registry).latency.origin == "measured"


@pytest.mark.slow
def test_a_profile_of_this_machine_prices_the_next_builds_routes(toy: Path, tmp_path: Path) -> None:
    quick = ("--min-runs", "4", "--min-ms", "0", "--warmup-ms", "0", "--rounds", "2", "--stitches", "1")
    asked = ["profile", "--family", str(toy / "toy.toml"), *quick, "--threads", "1", "--registry", str(tmp_path)]
    assert CliRunner().invoke(main, asked, catch_exceptions=False).exit_code == 0
    result = CliRunner().invoke(main, [*command(toy, tmp_path, "--tune-steps", "0"), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "Latencies on cpu are those of its profile of" in result.stderr
    routes = json.loads(result.stdout)["routes"]
    kinds = {one["route"]: one["predicted_by"].partition(" ")[0] for one in routes}
    assert kinds["small"] == kinds["large"] == "measured" and set(kinds.values()) <= {"measured", "interpolated"}
    assert all(one["latencies"] for one in routes if one["on_frontier"])

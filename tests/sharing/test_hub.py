"""Packages on the Hugging Face hub: its own client, against a server that speaks the hub's protocol."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import packages
import platformdirs
import pytest
from hub_server import Hub
from sharing_fixtures import other, package, shared, small_pieces
from sharing_places import content, run, size

from klas_zoo.errors import DamagedPackage, PackageError, RemoteError, UsageError
from klas_zoo.exporters.checking import verify_package
from klas_zoo.exporters.package import Package
from klas_zoo.runtime import ElasticSession
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push

# huggingface_hub 2.4 sends large files in a way that httpx2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
URL = "hf://me/zoo"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serve(monkeypatch) as started:
        yield started


@pytest.mark.parametrize("url", [URL, "hf://models/me/zoo", "hf://datasets/me/zoo", "hf://me/zoo@main"])
def test_a_package_comes_back_as_it_was(url: str, hub: Hub, package: Path, tmp_path: Path) -> None:
    pushed = push(package, url)
    assert pushed.size_bytes == pushed.sent_bytes == size(package)
    assert set(hub.repositories["me/zoo"][-1][1]) == {".gitattributes", *content(package)}
    pulled = pull(url, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(package)
    assert (pulled.version, pulled.received_bytes) == (pushed.version, size(package))
    assert pull(url, tmp_path / "pulled").received_bytes == 0
    assert list(tmp_path.glob(".pulled*")) == []


def test_pushing_again_makes_no_commit_and_another_version_sends_what_differs(
    hub: Hub, package: Path, other: Path, tmp_path: Path
) -> None:
    first, again, second = push(package, URL), push(package, URL), push(other, URL)
    assert (again.version, again.sent_bytes) == (first.version, 0)
    assert second.sent_bytes == (other / "manifest.json").stat().st_size
    assert pull(URL, tmp_path / "new").version == second.version
    pull(f"{URL}@{first.version}", tmp_path / "old")
    assert content(tmp_path / "new") == content(other) and content(tmp_path / "old") == content(package)


def test_other_files_of_a_repository_stay_and_are_not_pulled_but_former_engines_go(
    hub: Hub, package: Path, tmp_path: Path
) -> None:
    push(package, URL)
    files = hub.repositories["me/zoo"][-1][1]
    hub.commit("me/zoo", {**files, "README.md": b"about", "former.onnx": b"x", "sitecustomize.py": b"evil"})
    pull(URL, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(package)
    packages.edit(package, lambda manifest: manifest["provenance"].update(build_id=9))
    push(package, URL)
    left = set(hub.repositories["me/zoo"][-1][1]) - set(content(package))
    assert left == {".gitattributes", "README.md", "sitecustomize.py"}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_hub_that_refuses_is_one_sentence_and_the_former_state_stays(
    after: int, hub: Hub, package: Path, other: Path, tmp_path: Path
) -> None:
    before = push(package, URL)
    hub.refuse = (after, 403)
    for attempt in (lambda: push(other, URL), lambda: pull(URL, tmp_path / "pulled")):
        with pytest.raises(RemoteError, match=r"hf://me/zoo .*(may not be|cannot be) (read|written)") as error:
            attempt()
        assert "s3cr3t" not in str(error.value) and len(str(error.value).splitlines()) == 1
    hub.refuse = None
    assert not (tmp_path / "pulled").exists()
    assert pull(URL, tmp_path / "pulled").version == before.version
    assert content(tmp_path / "pulled") == content(package)
    assert list(tmp_path.glob(".pulled*")) == []


def test_what_is_missing_or_damaged_there_is_one_sentence(hub: Hub, package: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="There is no hf://me/zoo that may be read here: klas-zoo push makes one"):
        pull(URL, tmp_path / "pulled")
    push(package, URL)
    with pytest.raises(RemoteError, match="There is no hf://me/zoo@nowhere that may be read here"):
        pull(f"{URL}@nowhere", tmp_path / "pulled")
    files = dict(hub.repositories["me/zoo"][-1][1])
    weights = files["weights.bin"]
    for changed, says in (
        ({"weights.bin": weights[:-1] + b"?"}, r"weights\.bin is not the file that was written"),
        ({"weights.bin": weights[:-9]}, r"holds weights\.bin in another size than its manifest says"),
        ({"manifest.json": b"{"}, r"manifest\.json is not JSON"),
        ({"manifest.json": b"{}"}, "is no manifest"),
    ):
        hub.commit("me/zoo", {**files, **changed})
        with pytest.raises((RemoteError, DamagedPackage), match=says):
            pull(URL, tmp_path / "pulled")
    lacking = {"weights.bin": r"lacks weights\.bin, which its manifest", "manifest.json": "There is no package at"}
    for name, says in lacking.items():
        hub.commit("me/zoo", {one: data for one, data in files.items() if one != name})
        with pytest.raises(RemoteError, match=says):
            pull(URL, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_hub_that_does_not_answer_is_one_sentence_within_seconds(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    started = time.monotonic()
    for attempt in (lambda: push(package, URL), lambda: pull(URL, tmp_path / "pulled")):
        with pytest.raises(RemoteError, match=r"cannot be (written|read): the Hugging Face hub cannot be reached"):
            attempt()
    assert time.monotonic() - started < 60  # minutes of retries, without that


@pytest.mark.parametrize("words", [["pull", URL, "pulled"], ["push", "package", URL], ["install", URL]])
def test_a_command_in_a_process_of_its_own_says_so_too(words: list[str], package: Path, tmp_path: Path) -> None:
    """Nothing else has imported parts of the client there."""
    done = subprocess.run(
        [sys.executable, "-m", "klas_zoo", *words], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "KLAS_ZOO_REGISTRY": str(tmp_path / "registry")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "the Hugging Face hub cannot be reached" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("url", ["hf://zoo", "hf://me/zoo/folder", "hf://spaces/me/zoo", "hf://me/zoo@", "hf://a:b@me/zoo"])
def test_what_is_no_repository_is_refused(url: str, package: Path, tmp_path: Path) -> None:
    for attempt in (lambda: push(package, url), lambda: pull(url, tmp_path / "pulled")):
        with pytest.raises(UsageError, match="is no repository of the Hugging Face hub: write hf://owner/name"):
            attempt()
    assert run("push", package, URL, "--name", "x")[0] == run("pull", URL, tmp_path / "p", "--version", "x")[0] == 2


# the hub's cache, where files are links to blobs


@pytest.fixture
def cached(hub: Hub, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in the hub's cache, as `hf download` makes one."""
    from huggingface_hub import snapshot_download

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *names, **options: tmp_path / "ours")
    push(package, URL)
    snapshot = Path(snapshot_download("me/zoo", cache_dir=tmp_path / "cache"))
    assert (snapshot / "weights.bin").is_symlink()
    return snapshot


def test_a_package_in_the_hubs_cache_opens_verifies_runs_and_installs(
    cached: Path, package: Path, tmp_path: Path
) -> None:
    assert Package.open(cached).manifest == Package.open(package).manifest
    assert [one.status for one in verify_package(cached)] == ["verified"] * 3
    images = np.zeros((1, 3, 16, 16), np.float32)
    logits = [ElasticSession(folder).run(images, route="wide") for folder in (cached, package)]
    assert np.array_equal(*logits)
    code, out, _ = run("install", cached, "--dry-run", "--registry", tmp_path / "registry")
    assert code == 0 and "would be installed" in out
    (ours,) = (tmp_path / "ours" / "hub").iterdir()
    assert content(ours) == content(package)


def test_links_that_lead_elsewhere_are_not_followed(cached: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((cached / "weights.bin").read_bytes())
    (cached / "weights.bin").unlink()
    (cached / "weights.bin").symlink_to(outside)
    with pytest.raises(DamagedPackage, match=r"weights\.bin is missing"):
        Package.open(cached)
    manifest = tmp_path / "manifest.json"
    shutil.copy(cached / "manifest.json", manifest)
    (cached / "manifest.json").unlink()
    (cached / "manifest.json").symlink_to(manifest)
    with pytest.raises(DamagedPackage, match=r"manifest\.json is a link"):
        Package.open(cached)


def test_a_damaged_blob_is_found(cached: Path) -> None:
    blob = (cached / "weights.bin").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedPackage, match=r"weights\.bin is not the file"):
        Package.open(cached)


def test_a_manifest_of_a_stranger_names_no_file_outside(cached: Path, tmp_path: Path) -> None:
    evil = {"../../../evil": {"size_bytes": 1, "sha256": "0" * 64}}
    packages.edit(cached, lambda manifest: manifest["files"].update(evil))
    with pytest.raises(PackageError):
        Package.open(cached)
    assert not list(tmp_path.rglob("evil"))

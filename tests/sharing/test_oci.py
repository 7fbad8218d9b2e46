"""Packages in a real OCI registry: what is stored there, what another client makes of it, and everything that fails."""

from __future__ import annotations

import base64
import errno
import itertools
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oci_registries
import packages
import pytest
from oci_registries import OciServer, breaking_off, digest
from sharing_fixtures import other, package, shared, small_pieces
from sharing_places import content, run, size

from klas_zoo.errors import RemoteError, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.sharing import modelpack, registries
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.registries import Reference

pytestmark = pytest.mark.slow  # starts servers
GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciServer]:
    with oci_registries.serve(tmp_path_factory.mktemp("registry") / "here") as started:
        yield started


_numbers = itertools.count()


@pytest.fixture
def url(server: OciServer) -> str:
    return f"{server.url(f'zoo/made-up{next(_numbers)}')}:1"


def stored(url: str) -> tuple[bytes, dict[str, Any]]:
    """A manifest as the registry gives it to anybody."""
    reference = Reference.parse(url)
    request = urllib.request.Request(
        f"http://{reference.registry}/v2/{reference.name}/manifests/{reference.place}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
    )
    with urllib.request.urlopen(request) as answer:
        found = answer.read()
    return found, json.loads(found)


def put(url: str, table: dict[str, Any] | bytes, kind: str = "application/vnd.oci.image.manifest.v1+json") -> None:
    """Makes a tag point at any manifest."""
    reference = Reference.parse(url)
    data = table if isinstance(table, bytes) else json.dumps(table).encode()
    place = f"http://{reference.registry}/v2/{reference.name}/manifests/{reference.place}"
    request = urllib.request.Request(place, data=data, method="PUT", headers={"Content-Type": kind})
    urllib.request.urlopen(request).close()


# what is pushed comes back


def test_a_package_comes_back_as_it_was(package: Path, url: str, tmp_path: Path) -> None:
    pushed = push(package, url)
    assert pushed.size_bytes == pushed.sent_bytes == size(package)
    assert (pushed.url, pushed.name) == (url, Reference.parse(url).name)
    pulled = pull(url, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(package)
    assert (pulled.version, pulled.received_bytes) == (pushed.version, size(package))
    assert pull(url, tmp_path / "pulled").received_bytes == 0
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_pushing_again_sends_nothing_and_gives_the_same_digest(package: Path, url: str) -> None:
    first, again = push(package, url), push(package, url)
    assert (again.version, again.sent_bytes) == (first.version, 0)
    assert digest(stored(url)[0]) == f"sha256:{first.version}"


def test_versions_share_what_they_have_in_common_and_can_be_named_by_their_digest(
    package: Path, other: Path, url: str, tmp_path: Path
) -> None:
    old, new = push(package, url), push(other, url)
    assert new.sent_bytes == (other / "manifest.json").stat().st_size
    assert pull(url, tmp_path / "new").version == new.version
    name = url.removesuffix(":1")
    for number, place in enumerate((f"{name}@sha256:{old.version}", f"{url}@sha256:{old.version}")):
        assert pull(place, tmp_path / f"old{number}").version == old.version
        assert content(tmp_path / f"old{number}") == content(package)


def test_a_reference_without_a_tag_is_latest(package: Path, url: str, tmp_path: Path) -> None:
    name = url.removesuffix(":1")
    assert push(package, name).url == f"{name}:latest"
    assert pull(f"{name}:latest", tmp_path / "pulled").name == Reference.parse(name).name


def test_the_artifact_is_one_of_modelpack(package: Path, url: str) -> None:
    import jsonschema

    push(package, url)
    _, table = stored(url)
    assert table["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert table["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert table["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {one["annotations"]["org.cncf.model.filepath"]: one["mediaType"] for one in table["layers"]}
    assert set(kinds) == set(content(package))
    assert kinds["weights.bin"] == kinds["wide.onnx"] == "application/vnd.cncf.model.weight.v1.raw"
    assert kinds["manifest.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert kinds["references.safetensors"] == "application/vnd.cncf.model.dataset.v1.raw"
    reference = Reference.parse(url)
    where = f"http://{reference.registry}/v2/{reference.name}/blobs/{table['config']['digest']}"
    with urllib.request.urlopen(where) as answer:
        config = json.loads(answer.read())
    jsonschema.validate(config, json.loads((GOLDEN / "modelpack-config.schema.json").read_text()))
    assert config["modelfs"]["diffIds"] == [one["digest"] for one in table["layers"]]
    assert config["config"]["precision"] == "float32" and config["config"]["paramSize"] == "0.0K"


def test_annotations_say_how_accurate_and_how_fast_every_route_is(package: Path, url: str) -> None:
    push(package, url)
    _, table = stored(url)
    routes = {one.file: one for one in Package.open(package).routes}
    about = {one["annotations"]["org.cncf.model.filepath"]: one["annotations"] for one in table["layers"]}
    for file, route in routes.items():
        found = about[str(file)]
        assert found["io.klas-zoo.route"] == route.name and float(found["io.klas-zoo.top1"]) == route.top1
        (latency,) = json.loads(found["io.klas-zoo.latencies"])
        assert latency["p50_ms"] == route.latencies[0].p50_ms and latency["hardware"] == "made up"
    assert table["annotations"]["io.klas-zoo.top1.max"] == "80"
    assert table["annotations"]["io.klas-zoo.latency-ms.min"] == "1"


def test_another_client_reads_the_same_files(package: Path, url: str, tmp_path: Path) -> None:
    import oras.provider

    push(package, url)
    oras.provider.Registry(insecure=True).pull(url.removeprefix("oci://"), outdir=str(tmp_path / "theirs"))
    assert content(tmp_path / "theirs") == content(package)


def test_the_commands_take_a_reference(package: Path, url: str, tmp_path: Path) -> None:
    code, out, errors = run("push", package, url)
    assert (code, errors) == (0, "") and out.startswith(Reference.parse(url).name)
    code, out, errors = run("pull", url, tmp_path / "pulled", "--json")
    assert (code, errors, json.loads(out)["received_bytes"]) == (0, "", size(package))
    code, out, errors = run("install", url, "--dry-run", "--registry", tmp_path / "registry")
    assert code == 0 and "would be installed" in out
    for words in (["push", package, url, "--name", "x"], ["push", package, url, "--trust-sizes"],
                  ["pull", url, tmp_path / "x", "--name", "x"], ["pull", url, tmp_path / "x", "--version", "abcd"],
                  ["push", package, f"{url}@sha256:{'0' * 64}"]):  # fmt: skip
        code, out, errors = run(*words)
        assert (code, out, len(errors.strip().splitlines())) == (2, "", 1)


@pytest.mark.parametrize(
    "url",
    ["oci://host", "oci://host/", "oci://host/Upper:1", "oci://host/a:", "oci://host/a@sha256:12", "oci://host/a/../b",
     "oci://host/a:b:c", "oci://host:99999999/a", "oci://a:b@host/c:1", "oci://host/a?b=c", "oci://host//a"],
)  # fmt: skip
def test_what_is_no_reference_is_refused(url: str, package: Path, tmp_path: Path) -> None:
    for attempt in (lambda: push(package, url), lambda: pull(url, tmp_path / "pulled")):
        with pytest.raises(UsageError, match=r"no reference of an OCI registry|holds credentials: log in with docker"):
            attempt()


# registries that refuse, break off, or hold something else


def test_a_registry_that_is_not_there_is_one_sentence(package: Path, tmp_path: Path) -> None:
    url = "oci://127.0.0.1:9/x:1"
    for attempt in (lambda: push(package, url), lambda: pull(url, tmp_path / "pulled")):
        with pytest.raises(RemoteError, match=r"x:1 cannot be reached: Connection refused\. Rerun the command"):
            attempt()
    with pytest.raises(RemoteError, match=r"nowhere\.invalid/x:1 cannot be reached: "):
        pull("oci://nowhere.invalid/x:1", tmp_path / "pulled")


def test_an_unknown_name_or_tag_is_one_sentence(package: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"There is no package at oci://.*: klas-zoo push puts one there"):
        pull(url, tmp_path / "pulled")
    push(package, url)
    with pytest.raises(RemoteError, match=r"There is no package at oci://.*:2: klas-zoo push"):
        pull(url.removesuffix("1") + "2", tmp_path / "pulled")


def test_a_registry_with_passwords_takes_those_of_docker_login_and_shows_none(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with oci_registries.serve(tmp_path / "registry", password=True) as server:
        url = server.url("zoo/made-up:1")
        for user in (None, "user:wrong"):
            if user is not None:
                _log_in(tmp_path / "home", server.address, user)
            for attempt in (lambda: push(package, url), lambda: pull(url, tmp_path / "pulled")):
                with pytest.raises(RemoteError, match=r"refuses access to zoo/made-up \(401\): log in") as error:
                    attempt()
                assert "wrong" not in str(error.value)
        _log_in(tmp_path / "home", server.address, f"user:{oci_registries.PASSWORD}")
        push(package, url)
        pull(url, tmp_path / "pulled")
        assert content(tmp_path / "pulled") == content(package)


@pytest.mark.parametrize("registry", ["its own name", "docker.io"])
def test_a_registry_with_tokens_lets_everybody_pull_and_only_those_who_are_logged_in_push(
    registry: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "registry").mkdir()
    with (
        oci_registries.token_service(tmp_path / "registry") as tokens,
        oci_registries.serve(tmp_path / "registry", tokens=tokens) as server,
    ):
        url, login = server.url("library/made-up:1"), server.address
        if registry == "docker.io":  # whose server has another name, and which is logged in to under a third
            url, login = "oci://docker.io/made-up:1", "https://index.docker.io/v1/"
            monkeypatch.setitem(registries._HUBS, "docker.io", (server.address, login))
        for user in (None, "user:wrong"):
            if user is not None:
                _log_in(tmp_path / "home", login, user)
            with pytest.raises(RemoteError, match=r"refuses access to .*made-up \(401\): log in"):
                push(package, url)
        _log_in(tmp_path / "home", login, f"user:{oci_registries.PASSWORD}")
        push(package, url)
        assert push(package, url).sent_bytes == 0
        (tmp_path / "home" / ".docker" / "config.json").unlink()
        pull(url, tmp_path / "pulled")
        assert content(tmp_path / "pulled") == content(package)


def test_docker_hubs_server_is_the_one_that_docker_asks() -> None:
    assert registries._HUBS == {"docker.io": ("registry-1.docker.io", "https://index.docker.io/v1/")}


def _log_in(home: Path, address: str, user: str) -> None:
    """As `docker login` does it."""
    (home / ".docker").mkdir(parents=True, exist_ok=True)
    entry = {"auth": base64.b64encode(user.encode()).decode()}
    (home / ".docker" / "config.json").write_text(json.dumps({"auths": {address: entry}}))


@pytest.mark.parametrize("after_bytes", [2_000, 20_000, 200_000, 600_000])
def test_a_pull_that_breaks_off_leaves_nothing_and_a_repeat_fetches_the_rest(
    after_bytes: int, server: OciServer, url: str, package: Path, tmp_path: Path
) -> None:
    push(package, url)
    target = tmp_path / "pulled"
    says = pytest.raises(RemoteError, match=r"made-up\d+:1.*Rerun the command to resume")
    with breaking_off(server.address, after_bytes) as address, says:
        pull(url.replace(server.address, address), target)
    assert not target.exists()
    had = sum(size(folder / "package") for folder in tmp_path.glob(".pulled.*.part"))
    assert pull(url, target).received_bytes == size(package) - had
    assert after_bytes < 100_000 or had > after_bytes // 2
    assert content(target) == content(package)
    assert list(tmp_path.glob(".*.part")) == []


@pytest.mark.parametrize("after_bytes", [500, 30_000, 300_000])
def test_a_push_that_breaks_off_leaves_the_tag_where_it_was(
    after_bytes: int, server: OciServer, url: str, package: Path, tmp_path: Path
) -> None:
    reference = Reference.parse(url)
    first = tmp_path / "first"
    other_weights(package, first)
    before = push(first, url)
    says = pytest.raises(RemoteError, match=r"made-up\d+:1 cannot be (read|written|reached): .*Rerun the command")
    with breaking_off(server.address, after_bytes) as address, says:
        push(package, url.replace(server.address, address))
    assert pull(url, tmp_path / "before").version == before.version
    assert content(tmp_path / "before") == content(first)
    push(package, url)
    pull(url, tmp_path / "after")
    assert content(tmp_path / "after") == content(package)
    assert reference.tag == "1"


def other_weights(package: Path, out: Path) -> None:
    """Another version of the package, which shares no large file with it."""
    import packages

    packages.write_package(out, precision="fp16", fresh=False)
    assert content(out)["weights.bin"] != content(package)["weights.bin"]


def test_a_registry_whose_disk_is_full_is_one_sentence_and_keeps_its_tag(package: Path, tmp_path: Path) -> None:
    with oci_registries.serve(tmp_path / "registry", largest_file_bytes=100_000) as server:
        url = server.url("zoo/made-up:1")
        with pytest.raises(RemoteError, match=r"made-up:1 cannot be written: "):
            push(package, url)
        with pytest.raises(RemoteError, match="There is no package at"):
            pull(url, tmp_path / "pulled")


FULL = """
import resource, signal, sys
from klas_zoo.errors import KlasZooError
from klas_zoo.sharing.pull import pull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    pull(sys.argv[1], sys.argv[2])
except KlasZooError as error:
    print(error)
"""


def test_a_disk_that_fills_up_in_the_middle_of_a_pull_is_one_sentence_and_a_repeat_resumes(
    package: Path, url: str, tmp_path: Path
) -> None:
    push(package, url)
    target = tmp_path / "pulled"
    done = subprocess.run(
        [sys.executable, "-c", FULL, url, str(target)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{target} cannot be written: {os.strerror(errno.EFBIG)}. Rerun the command to resume." in done.stdout
    assert not target.exists()
    assert pull(url, target).received_bytes <= size(package) - 50_000
    assert content(target) == content(package)


def test_a_digest_that_does_not_match_its_tag_is_refused(
    server: OciServer, package: Path, url: str, tmp_path: Path
) -> None:
    version = push(package, url).version
    blob = server.blob(version)
    kept = blob.read_bytes()
    blob.write_bytes(kept.replace(b'"io.klas-zoo.top1.max":"80"', b'"io.klas-zoo.top1.max":"99"'))
    for place in (url, f"{url}@sha256:{version}"):
        with pytest.raises(RemoteError, match=rf"the manifest that came is sha256:\w+, not sha256:{version}"):
            pull(place, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    blob.write_bytes(kept)


@pytest.mark.parametrize("file", ["weights.bin", "manifest.json", "wide.onnx"])
def test_a_blob_that_is_not_what_its_digest_says_is_refused(
    file: str, server: OciServer, package: Path, url: str, tmp_path: Path
) -> None:
    packages.edit(package, lambda manifest: manifest["provenance"].update(build_id=next(_numbers)))
    push(package, url)
    whole = server.blob(digest(content(package)[file])).read_bytes()
    server.corrupt(digest(content(package)[file]))
    for _ in range(2):  # what came is not kept
        with pytest.raises(RemoteError, match="is not what was pushed: push the package again"):
            pull(url, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    server.blob(digest(content(package)[file])).write_bytes(whole)
    pull(url, tmp_path / "pulled")
    assert content(tmp_path / "pulled") == content(package)


def test_a_blob_that_the_registry_has_lost_is_one_sentence(
    server: OciServer, package: Path, url: str, tmp_path: Path
) -> None:
    push(package, url)
    lost = server.blob(digest(content(package)["weights.bin"]))
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(RemoteError, match=r"has lost sha256:.*: push the package again"):
        pull(url, tmp_path / "pulled")
    lost.write_bytes(kept)


def test_an_artifact_of_another_kind_is_refused(package: Path, url: str, tmp_path: Path) -> None:
    push(package, url)
    _, table = stored(url)
    for changes, says in (
        ({"artifactType": "application/vnd.example"}, "is no package: it is 'application/vnd.example', and"),
        ({"artifactType": None}, "is no package: it is 'application/vnd.oci.image.manifest"),
        ({"layers": []}, r"is no package of klas-zoo: it has no manifest\.json, or a file twice"),
        ({"layers": [*table["layers"], table["layers"][0]]}, "a file twice"),
    ):
        put(url, {key: value for key, value in {**table, **changes}.items() if value is not None})
        with pytest.raises(RemoteError, match=says):
            pull(url, tmp_path / "pulled")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "", ".hidden", "a\0b", None])
def test_a_layer_that_names_a_file_outside_is_refused(
    name: str | None, package: Path, url: str, tmp_path: Path
) -> None:
    push(package, url)
    _, table = stored(url)
    annotations = table["layers"][0]["annotations"]
    if name is None:
        del annotations["org.cncf.model.filepath"]
    else:
        annotations["org.cncf.model.filepath"] = name
    before = sorted(tmp_path.rglob("*"))
    put(url, table)
    with pytest.raises(RemoteError, match=r"is not valid|no manifest\.json"):
        pull(url, tmp_path / "pulled")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_layer_that_claims_another_size_is_refused(package: Path, url: str, tmp_path: Path) -> None:
    push(package, url)
    _, table = stored(url)
    weights = next(one for one in table["layers"] if one["annotations"]["org.cncf.model.filepath"] == "weights.bin")
    for claimed in (weights["size"] - 1, 2**45):
        weights["size"] = claimed
        put(url, table)
        with pytest.raises(RemoteError, match=r"in another size than its manifest says|names a package of \d+\.\d+ GB"):
            pull(url, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()


def test_a_manifest_that_is_too_large_or_no_json_is_refused() -> None:
    for found in (b"[]", b"{", b"\xff", b"[" * 100_000, b'{"artifactType": 5}'):
        with pytest.raises(RemoteError, match="there "):
            modelpack.read_artifact(found, "there")


def test_a_missing_extra_names_what_to_install(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "oras.container", None)
    with pytest.raises(RemoteError, match=r"pip install 'klas-zoo\[oci\]'"):
        push(package, "oci://127.0.0.1:9/x:1")

"""Signed packages: the signature goes where the package goes, and install refuses what its owner did not sign."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import hub_server
import oci_registries
import packages
import pytest
from sharing_fixtures import other, package, shared, small_pieces
from sharing_places import content, run

from klas_zoo.errors import PackageError, UsageError
from klas_zoo.exporters.package import SIGNATURE, Package
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.signatures import check_signature, sign

pytest.importorskip("model_signing", reason="needs model-signing: pip install 'klas-zoo[sign]'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of sigstore's libraries


def key_pair(folder: Path, name: str, curve: str = "prime256v1") -> tuple[Path, Path]:
    """As the help of `klas-zoo sign` says it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make keys")
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    for words in (["ecparam", "-genkey", "-name", curve, "-noout", "-out", private],
                  ["ec", "-in", private, "-pubout", "-out", public]):  # fmt: skip
        subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path, "mine")


def test_what_was_signed_is_accepted_and_is_still_the_same_package(package: Path, keys: tuple[Path, Path]) -> None:
    before = content(package)
    assert sign(package, keys[0]) == package / SIGNATURE
    assert {**before, SIGNATURE: (package / SIGNATURE).read_bytes()} == content(package)
    check_signature(package, keys[1])
    assert Package.open(package).extra_files() == []
    assert sign(package, keys[0]) == package / SIGNATURE  # again
    check_signature(package, keys[1])


@pytest.mark.parametrize("file", ["manifest.json", "weights.bin", "wide.onnx", "references.safetensors", "a new file"])
def test_whatever_is_changed_afterwards_is_refused(file: str, package: Path, keys: tuple[Path, Path]) -> None:
    sign(package, keys[0])
    path = package / file
    data = path.read_bytes() if path.exists() else b"new"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PackageError, match=r"is not what the owner of .*mine\.pub signed: Signature mismatch"):
        check_signature(package, keys[1])


def test_a_sound_package_of_somebody_else_is_refused(package: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    theirs, _ = key_pair(tmp_path, "theirs")
    packages.edit(package, lambda manifest: manifest["provenance"].update(build_id=9))
    sign(package, theirs)
    with pytest.raises(PackageError, match=r"is not what the owner of .*mine\.pub signed: "):
        check_signature(package, keys[1])


@pytest.mark.parametrize("found", [b"", b"{}", b"[]", b"\xff", b'{"mediaType": 5}', b"{" * 10_000])
def test_a_signature_that_is_none_is_refused(found: bytes, package: Path, keys: tuple[Path, Path]) -> None:
    (package / SIGNATURE).write_bytes(found)
    with pytest.raises(PackageError, match="is not what the owner of"):
        check_signature(package, keys[1])


def test_a_missing_or_linked_signature_is_refused(package: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="has no signature, and --verify-key asks for one: klas-zoo sign makes it"):
        check_signature(package, keys[1])
    sign(package, keys[0]).rename(tmp_path / "elsewhere")
    (package / SIGNATURE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="has no signature"):
        check_signature(package, keys[1])


def test_what_is_no_key_is_one_sentence(package: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(package, keys[0])
    (tmp_path / "text").write_text("text")
    for key in (tmp_path / "text", tmp_path / "missing", keys[1]):
        with pytest.raises(UsageError, match="is no private key on an elliptic curve in PEM"):
            sign(package, key)
    for key in (tmp_path / "text", tmp_path / "missing", keys[0]):
        with pytest.raises(UsageError, match="is no public key on an elliptic curve in PEM"):
            check_signature(package, key)


def test_a_damaged_package_is_not_signed(package: Path, keys: tuple[Path, Path]) -> None:
    (package / "notes.txt").write_text("mine")
    with pytest.raises(PackageError, match=r"holds notes\.txt, which is not of the package: remove it"):
        sign(package, keys[0])
    assert not (package / SIGNATURE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "registry", "hub"])
def test_a_signature_goes_where_the_package_goes_and_install_checks_it(
    place: str, package: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = key_pair(tmp_path, "theirs")[1]
    words = ("--dry-run", "--registry", tmp_path / "empty")

    def check(url: str) -> None:
        push(package, url)
        code, _, errors = run("install", url, "--verify-key", keys[1], *words)
        assert code == 1 and "has no signature" in errors
        assert run("sign", package, "--key", keys[0])[0] == 0
        push(package, url)
        pull(url, tmp_path / "pulled")
        assert content(tmp_path / "pulled") == content(package)
        assert run("install", url, "--verify-key", keys[1], *words)[0] == 0
        code, _, errors = run("install", url, "--verify-key", theirs, *words)
        assert code == 1 and "is not what the owner of" in errors and len(errors.strip().splitlines()) == 1

    if place == "folder":
        check(f"file://{tmp_path / 'shared'}")
    elif place == "registry":
        with oci_registries.serve(tmp_path / "registry") as server:
            check(server.url("zoo/made-up:1"))
    else:
        with hub_server.serve(monkeypatch):
            check("hf://me/zoo")

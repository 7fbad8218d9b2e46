"""What is pushed comes back; names, versions, and the command line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import content, pieces_of, quick, run, size

from klas_zoo.errors import KlasZooError, RemoteError, UnknownName, UsageError
from klas_zoo.sharing.names import latest_path, version_path
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push


def test_a_package_comes_back_as_it_was(package: Path, url: str, tmp_path: Path) -> None:
    pushed = push(package, url)
    assert pushed.name == "made-up"
    assert pushed.size_bytes == size(package)
    assert pushed.sent_bytes == sum(pieces_of(package).values())
    pulled = pull(url, tmp_path / "deep" / "pulled")
    assert content(tmp_path / "deep" / "pulled") == content(package)
    assert (pulled.name, pulled.version) == ("made-up", pushed.version)
    assert pulled.size_bytes == pulled.received_bytes == size(package)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["pulled"]


def test_pushing_again_sends_nothing_and_pulling_again_fetches_nothing(package: Path, url: str, tmp_path: Path) -> None:
    first = push(package, url)
    for trust_sizes in (False, True):
        again = push(package, url, trust_sizes=trust_sizes)
        assert (again.version, again.sent_bytes) == (first.version, 0)
    pull(url, tmp_path / "pulled")
    assert pull(url, tmp_path / "pulled").received_bytes == 0


@quick
def test_versions_share_what_they_have_in_common_and_can_be_named(
    package: Path, other: Path, url: str, tmp_path: Path
) -> None:
    old, new = push(package, url), push(other, url)
    assert new.version != old.version
    assert new.sent_bytes == (other / "manifest.json").stat().st_size
    assert pull(url, tmp_path / "new").version == new.version
    assert pull(url, tmp_path / "old", version=old.version[:8]).version == old.version
    assert content(tmp_path / "old") == content(package)
    assert content(tmp_path / "new") == content(other)


@quick
def test_several_names_lie_at_one_place(package: Path, other: Path, url: str, tmp_path: Path) -> None:
    push(package, url)
    push(other, url, name="made-up@prod")
    with pytest.raises(UsageError, match="holds several packages, made-up, made-up@prod: pass --name"):
        pull(url, tmp_path / "pulled")
    pull(url, tmp_path / "pulled", name="made-up@prod")
    assert content(tmp_path / "pulled") == content(other)


def test_the_version_is_the_hash_of_the_index_and_objects_are_their_own(package: Path, shared: Path) -> None:
    pushed = push(package, str(shared))
    stored = content(shared)
    index = stored.pop(version_path("made-up", pushed.version))
    assert hashlib.sha256(index).hexdigest() == pushed.version
    assert json.loads(stored.pop(latest_path("made-up"))) == {"schema_version": 1, "version": pushed.version}
    assert {Path(path).name: len(data) for path, data in stored.items()} == pieces_of(package)
    assert all(hashlib.sha256(data).hexdigest() == Path(path).name for path, data in stored.items())


def test_unknown_names_and_versions_are_named(package: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"There is no package at .*: klas-zoo push puts one there"):
        pull(url, tmp_path / "pulled")
    version = push(package, url).version
    with pytest.raises(UnknownName, match="Unknown package 'made-app': did you mean made-up"):
        pull(url, tmp_path / "pulled", name="made-app")
    with pytest.raises(UnknownName, match=rf"Unknown version '0000': .*{version[:12]}"):
        pull(url, tmp_path / "pulled", version="0000")
    for name in ("../x", "a/b", "", "x" * 200):
        with pytest.raises(UsageError, match="is no name of a package"):
            pull(url, tmp_path / "pulled", name=name)
        with pytest.raises(UsageError, match="is no name of a package"):
            push(package, url, name=name)


def test_the_commands_say_what_they_did(package: Path, shared: Path, tmp_path: Path) -> None:
    code, out, err = run("push", package, shared)
    assert (code, err) == (0, "")
    assert out.startswith("made-up ") and f"at {shared}: " in out
    code, out, _ = run("push", package, shared, "--json", "--trust-sizes", "--name", "made-up@prod")
    assert json.loads(out)["sent_bytes"] == 0
    code, out, err = run("pull", shared, tmp_path / "pulled", "--name", "made-up")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'pulled'}: made-up ")
    code, out, _ = run("pull", shared, tmp_path / "pulled", "--name", "made-up", "--json")
    assert (json.loads(out)["received_bytes"], json.loads(out)["folder"]) == (0, str(tmp_path / "pulled"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["push", "nowhere", "there"], 1, "is no package"),
        (["pull", "nowhere", "here"], 1, "There is no package at nowhere"),
        (["pull", "nowhere", "here", "--name", "a/b"], 2, "is no name of a package"),
        (["pull", "nonsense://x", "here"], 1, "Protocol not known"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert says in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_error_of_this_module_is_one_of_ours() -> None:
    assert issubclass(RemoteError, KlasZooError)

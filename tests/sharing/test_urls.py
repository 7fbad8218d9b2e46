"""URLs: those that name no place, those in place of a folder, and the credentials in them."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import click
import pytest
from sharing_fixtures import gs, other, package, s3, shared, small_pieces, url
from sharing_places import run

import klas_zoo
from klas_zoo.addresses import command_line, is_url, without_credentials
from klas_zoo.cli import main
from klas_zoo.cli.options import LocalPath
from klas_zoo.errors import KlasZooError, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.registry import Registry
from klas_zoo.sharing.pull import pull
from klas_zoo.sharing.push import push
from klas_zoo.sharing.remote import Remote

NO_PLACE = ["", " ", "file://", "file:///", "s3://", "S3:///", "memory://", "::", "file://::x", "simplecache::s3://b/x",
            "s3:/bucket/x", "oci://", "hf://", "folder\0x", "s3://bucket/\x1b[2J", "s3://@", "ftp://:@/"]  # fmt: skip


@pytest.mark.parametrize("url", NO_PLACE)
def test_a_url_that_names_no_place_is_refused_and_nothing_is_written(
    url: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    for attempt in (lambda: push(package, url), lambda: pull(url, tmp_path / "pulled")):
        with pytest.raises(UsageError, match="write a folder or a URL such as s3://bucket/zoo") as error:
            attempt()
        assert str(error.value).isprintable()
    if "\0" not in url:
        code, out, errors = run("push", package, url)
        assert (code, out, len(errors.strip().splitlines())) == (2, "", 1)
    assert list(empty.iterdir()) == [] and not (tmp_path / "pulled").exists()


def _protocols() -> list[str]:
    import fsspec

    return sorted(fsspec.available_protocols())


@pytest.mark.parametrize("protocol", _protocols())
def test_no_protocol_of_fsspec_brings_a_traceback(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        Remote(f"{protocol}://127.0.0.1:9/x")
    except KlasZooError as error:
        assert len(str(error).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# URLs where folders are expected


def _local_paths() -> list[tuple[str, click.Parameter]]:
    found = []

    def visit(words: list[str], command: click.Command) -> None:
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                visit([*words, name], command.get_command(click.Context(command), name))  # type: ignore[arg-type]
        else:
            found.extend((" ".join(words), one) for one in command.params if isinstance(one.type, click.Path))

    visit([], main)
    return found


def test_every_path_of_every_command_refuses_urls() -> None:
    paths = _local_paths()
    assert len(paths) > 20
    for command, parameter in paths:
        assert isinstance(parameter.type, LocalPath), f"{command}: {parameter.name} takes a URL for a folder"


@pytest.mark.parametrize("url", ["s3://bucket/zoo", "hf://owner/name", "s3:/bucket", "ftp://user:s3cr3t@host/x"])
def test_a_url_in_place_of_a_folder_is_refused(
    url: str, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for words in (["list", "--registry", url], ["registry", "gc", "--registry", url], ["pull", "x", url],
                  ["verify", url], ["install", str(package), "--registry", url]):  # fmt: skip
        code, out, errors = run(*words)
        assert (code, out) == (2, "")
        assert "is a URL, and this is a local path" in errors and "s3cr3t" not in errors
    for attempt in (
        lambda: Registry.open(url, create=True),
        lambda: Registry.open(Path(url), create=True),
        lambda: Package.open(url),
        lambda: pull(str(package), url),
        lambda: klas_zoo.build("deit-micro", registry=url),
    ):
        with pytest.raises(UsageError, match=r"is a URL, and .* is a local path"):
            attempt()
    monkeypatch.setenv("KLAS_ZOO_REGISTRY", url)
    with pytest.raises(UsageError, match="KLAS_ZOO_REGISTRY is a local path"):
        Registry.open(create=True)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("path", ["x", "./s3", "/m/a:b", "C:/models", "C:\\models", "hf:owner/name", "a/b:/c", "~x"])
def test_what_is_no_url_is_a_path(path: str) -> None:
    assert not is_url(path)


# credentials

SECRETS = [
    "ftp://user:s3cr3t@127.0.0.1:9/x",
    "ftp://user:s3cr3t%2Fmore@127.0.0.1:9/x",
    "ftp://user:s3c/r3t@127.0.0.1:9/x",
    "ftp://user:s3@cr3t@127.0.0.1:9/x",
    "http://127.0.0.1:9/x?X-Amz-Signature=s3cr3t&token=other-s3cr3t",
    "https://ghp_s3cr3t@127.0.0.1:9/x",
    "sftp://user:s3cr3t@127.0.0.1:9/x",
    "smb://user:s3cr3t@127.0.0.1:9/x",
    "webdav://user:s3cr3t@127.0.0.1:9/x",
    "nonsense://user:s3cr3t@host/x",
    "ftp://user:s3cr3t@host/::x",
    "oci://user:s3cr3t@127.0.0.1:9/x:1",
    "hf://user:s3cr3t@owner/name",
]


@pytest.mark.parametrize("url", SECRETS)
def test_credentials_are_in_no_message_and_no_log(
    url: str, package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = ("s3cr3t", "r3t@", "cr3t")
    for words in (["push", package, url], ["pull", url, tmp_path / "pulled"], ["install", url],
                  ["push", package, url, "--json"], ["verify", url], ["list", url], [url],
                  ["pull", url, tmp_path / "pulled", "extra"], ["list", "--registry", url]):  # fmt: skip
        with caplog.at_level(logging.INFO, logger="klas_zoo"):
            code, out, errors = run(*words)
        assert code != 0
        for text in (out, errors, *(record.getMessage() for record in caplog.records)):
            assert not any(part in text for part in parts), text


def test_a_message_of_a_library_is_shown_without_the_password() -> None:
    url = "ftp://user:s3cr3t%21@host/x"
    assert without_credentials("Login with s3cr3t! failed", url) == "Login with *** failed"
    assert without_credentials("at ftp://a:b@h/x?sig=c and oci://localhost:5000/n@sha256:ab") == (
        "at ftp://***@h/x?*** and oci://localhost:5000/n@sha256:ab"
    )


def test_what_a_push_reports_and_a_build_records_has_no_credentials(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = push(package, "memory://user:s3cr3t@shared/x")
    assert "s3cr3t" not in json.dumps(done.to_json()) and done.url == "memory://***@shared/x"
    monkeypatch.setattr("sys.argv", ["klas-zoo", "install", "ftp://user:s3cr3t@host/x", "--name", "a b"])
    assert command_line() == "klas-zoo install 'ftp://***@host/x' --name 'a b'"


def test_install_refuses_what_names_no_package_and_what_is_no_file(package: Path, tmp_path: Path) -> None:
    words = ("--registry", tmp_path / "registry")
    for empty in ("", "file://", "s3:/x"):
        assert "write a folder or a URL" in run("install", empty, *words)[2]
    os.mkfifo(package / "pipe")
    assert f"{package / 'pipe'} is no regular file" in run("install", package, *words)[2]
    (package / "pipe").unlink()
    with (package / "sparse").open("wb") as file:
        file.truncate(2**41)
    errors = run("install", package, *words)[2]
    assert "it has 2199.02 GB, and" in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "registry").exists()

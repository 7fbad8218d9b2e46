"""OCI registries, spoken to with the oras package: references, credentials of `docker login`, blobs and manifests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from klas_zoo.addresses import without_credentials
from klas_zoo.errors import KlasZooError, RemoteError, UsageError, first_line

_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"oci://(?P<registry>[A-Za-z0-9.-]+(?::\d{{1,5}})?|\[[0-9a-fA-F:]+\](?::\d{{1,5}})?)/(?P<name>{_NAME}(?:/{_NAME})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_HUBS = {"docker.io": ("registry-1.docker.io", "https://index.docker.io/v1/")}
"""Registries whose servers have another name, and under which `docker login` stores their credentials."""
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d+){3}|\[::1\])(?::\d+)?")
_CONNECT_S, _READ_S = 10, 60
_TRIES = 3  # of a request that a busy server refuses, or that breaks off
_PIECE = 2**16  # what is lost of a file where a line breaks off


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`oci://registry/name:tag`, or `@sha256:…` in place of the tag or after it."""

    registry: str
    name: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, url: str) -> Reference:
        """
        Raises:
            UsageError: it is none.
        """
        shown = without_credentials(url)
        if shown != url:
            raise UsageError(f"{shown} holds credentials: log in with docker login or oras login instead.")
        match = _REFERENCE.fullmatch(url)
        if match is None:
            raise UsageError(
                f"{shown} is no reference of an OCI registry: write oci://registry/name:tag, the name in lower case, "
                "or oci://registry/name@sha256:…"
            )
        return cls(**match.groupdict())

    @property
    def place(self) -> str:
        """Tag or digest; the digest where both are given, as registries do it."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag or 'latest'}" if self.tag or not self.digest else ""
        return f"oci://{self.registry}/{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"


class OciRegistry:
    """The repository of a reference.

    Over TLS, but for loopback addresses, as `docker` and `oras` do it. Credentials are those that `docker login`
    stored. `docker.io/zoo` is `docker.io/library/zoo`, on Docker Hub's server.

    Raises:
        RemoteError: oras is not installed, the registry cannot be reached, or wants a login.
    """

    def __init__(self, reference: Reference) -> None:
        try:
            import oras.container
        except ImportError as error:
            raise RemoteError("OCI registries need oras: pip install 'klas-zoo[oci]'.") from error
        self.reference = reference
        host, self._login = _HUBS.get(reference.registry, (reference.registry, reference.registry))
        one_part = reference.registry in _HUBS and "/" not in reference.name
        self._name = f"library/{reference.name}" if one_part else reference.name
        self._insecure = bool(_LOOPBACK.fullmatch(host))
        self._container = oras.container.Container(f"{host}/{self._name}:{reference.tag or 'latest'}")
        self._root = f"{'http' if self._insecure else 'https'}://{host}/v2/"
        with self._speaking("reached"):
            self._client = self._logged_in()

    def manifest(self, place: str, most_bytes: int) -> bytes | None:
        """The manifest that a tag or digest names; None: there is none.

        Raises:
            RemoteError: it cannot be read, or is not what its digest says.
        """
        from klas_zoo.sharing.modelpack import IMAGE_MANIFEST, digest_of

        with self._speaking("read"):
            url = f"{self._root}{self._name}/manifests/{place}"
            answer = self._client.do_request(url, "GET", headers={"Accept": IMAGE_MANIFEST}, stream=True)
            with answer:
                if answer.status_code == 404:
                    return None
                self._check(answer, "read")
                content = b""
                for piece in answer.iter_content(_PIECE):
                    content += piece
                    if len(content) > most_bytes:
                        break
        if len(content) > most_bytes:
            raise RemoteError(f"{self.reference} has a manifest of more than {most_bytes} bytes.")
        claimed = answer.headers.get("Docker-Content-Digest")
        for expected in (claimed, place if ":" in place else None):
            if expected and expected != digest_of(content):
                raise RemoteError(
                    f"{self.reference}: the manifest that came is {digest_of(content)}, not {expected[:80]}. Push the "
                    "package again."
                )
        return content

    def read_blob(self, digest: str, size_bytes: int, output: BinaryIO) -> int:
        """Completes a file with a blob, from what is there on; how many bytes had to come.

        Raises:
            RemoteError: it is not to be had, or not what its digest says; what came is then kept or emptied.
            OSError: the file cannot be written.
        """
        hashed, there = _hashed(output, size_bytes)
        if there == size_bytes and f"sha256:{hashed.hexdigest()}" == digest:
            output.truncate(there)
            return 0
        if there == size_bytes:
            hashed, there = hashlib.sha256(), 0
        received = 0
        for piece in self._pieces(digest, there):
            if piece is None:  # the server begins at the beginning
                hashed, there = hashlib.sha256(), 0
                output.seek(0)
                continue
            there += len(piece)
            received += len(piece)
            hashed.update(piece)
            output.write(piece)
            if there > size_bytes:
                break
        if there < size_bytes:
            raise RemoteError(f"{self.reference} broke off. Rerun the command to resume.")
        if there > size_bytes or f"sha256:{hashed.hexdigest()}" != digest:
            output.truncate(0)
            raise RemoteError(f"{self.reference}: {digest} is not what was pushed: push the package again.")
        output.truncate(there)
        return received

    def write_blob(self, content: Path, digest: str, size_bytes: int) -> bool:
        """Sees to it that a blob is there; whether it had to be sent.

        Raises:
            RemoteError: the registry does not take it.
        """
        layer = {"digest": digest, "size": size_bytes}
        with self._speaking("written"):
            if self._client.blob_exists(layer, self._container):
                return False
            self._check(self._client.put_upload(str(content), self._container, layer), "written")
        return True

    def write_manifest(self, content: bytes, place: str) -> None:
        """
        Raises:
            RemoteError: the registry does not take it, or reads it back as something else.
        """
        from klas_zoo.sharing.modelpack import IMAGE_MANIFEST

        with self._speaking("written"):
            url = f"{self._root}{self._name}/manifests/{place}"
            answer = self._client.do_request(url, "PUT", data=content, headers={"Content-Type": IMAGE_MANIFEST})
            self._check(answer, "written")
        if self.manifest(place, len(content)) != content:
            raise RemoteError(f"{self.reference} reads back as something else than was written: push again.")

    def _pieces(self, digest: str, start: int) -> Iterator[bytes | None]:
        with self._speaking("read"):
            headers = {"Range": f"bytes={start}-"} if start else {}
            url = f"{self._root}{self._name}/blobs/{digest}"
            with self._client.do_request(url, "GET", headers=headers, stream=True) as answer:
                if answer.status_code == 404:
                    raise RemoteError(f"{self.reference} has lost {digest}: push the package again.")
                self._check(answer, "read")
                if start and answer.status_code != 206:
                    yield None
                yield from answer.iter_content(_PIECE)

    def _logged_in(self) -> Any:
        from klas_zoo.sharing.oras_client import client

        for basic in (False, True):
            made = client(self._insecure, basic=basic, timeouts=(_CONNECT_S, _READ_S), tries=_TRIES)
            answer = made.session.get(self._root)
            if answer.status_code == 401 and answer.headers.get("Www-Authenticate", "").lower().startswith("basic"):
                if not basic:
                    continue
                made.auth.load_configs(self._credentials())
                user = getattr(made.auth, "_basic_auth", None)
                if not user:
                    raise self._refused(401)
                # at once: oras sends every request without it first, and a file cannot be sent twice
                made.session.headers["Authorization"] = f"Basic {user}"
            else:
                made.auth.load_configs(self._credentials())
            return made
        raise AssertionError

    def _credentials(self) -> Any:
        """The container under whose registry's name credentials are stored."""
        found = copy(self._container)
        found.registry = self._login
        return found

    def _check(self, answer: Any, done: str) -> None:
        if answer.status_code in (401, 403):
            raise self._refused(answer.status_code)
        if not 200 <= answer.status_code < 300:
            raise RemoteError(
                f"{self.reference} cannot be {done}: the registry answers {answer.status_code} {_reason(answer)}. "
                "Rerun the command to resume."
            )

    def _refused(self, status: int) -> RemoteError:
        return RemoteError(
            f"{self.reference.registry} refuses access to {self.reference.name} ({status}): log in with docker login "
            f"or oras login {self.reference.registry}."
        )

    @contextmanager
    def _speaking(self, done: str) -> Iterator[None]:
        import requests

        try:
            yield
        except KlasZooError:
            raise
        except requests.RequestException as error:
            broke_off = isinstance(error, requests.exceptions.ChunkedEncodingError)
            what = "it broke off" if broke_off else _cause(error)
            raise RemoteError(
                without_credentials(f"{self.reference} cannot be {done}: {what}. Rerun the command to resume.")
            ) from error
        except ValueError as error:  # what oras raises for answers that it cannot go on with
            if "authentication" in str(error):
                raise self._refused(401) from error
            what = without_credentials(first_line(error)).rstrip(".")
            raise RemoteError(f"{self.reference} cannot be {done}: {what}.") from error


def _hashed(file: BinaryIO, most_bytes: int) -> tuple[Any, int]:
    """The SHA-256 of the beginning of a file, and how much of it there is; the file stands after it."""
    found, there = hashlib.sha256(), 0
    file.seek(0)
    while piece := file.read(min(_PIECE, most_bytes - there)):
        found.update(piece)
        there += len(piece)
    return found, there


def _reason(answer: Any) -> str:
    """A registry's own words, else those of HTTP."""
    try:
        error = answer.json()["errors"][0]
        return f"{answer.reason} ({str(error.get('message') or error['code'])[:200]})"
    except (ValueError, LookupError, TypeError, AttributeError):
        return str(answer.reason)


def _cause(error: BaseException) -> str:
    """The innermost reason: what urllib3 wraps around it names objects in memory."""
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = getattr(error, "strerror", None) or first_line(error)
    return str(text).rpartition(">: ")[2][:200].rstrip(".")

"""A server that speaks what huggingface_hub's client says to the hub to make a repository, to commit, and to download.

The client is the real one; the server is not the hub's: what it knows of the protocol is what the client sends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

SMALL = 10_000
"""Bytes up to which a file goes into a commit itself, and not to the storage of large files."""


class Hub:
    """Repositories as lists of commits; a commit is a table of contents by name.

    Attributes:
        refuse: status that is answered to whatever comes, once so many more requests were answered.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.refuse: tuple[int, int] | None = None
        self.endpoint = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        text = json.dumps([len(self.repositories[name]), sorted((one, _sha256(data)) for one, data in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.repositories[name].append((oid, files))
        return oid

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name)
        if commits is None:
            return None
        if revision == "main":
            return commits[-1]
        return next((one for one in commits if one[0] == revision), None)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _described(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"size": len(data), "blobId": _git(data), "oid": _git(data)}
    if len(data) > SMALL:
        found["lfs"] = {"sha256": _sha256(data), "oid": _sha256(data), "size": len(data), "pointerSize": 134}
        found["blobId"] = found["oid"] = _git(_sha256(data).encode())
    return found


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_any(self) -> None:
        body, hub = self._body(), self.hub
        if hub.refuse is not None:
            left, status = hub.refuse
            if left <= 0:
                self._answer(status, {"error": "the server does not want to"})
                return
            hub.refuse = left - 1, status
        parts = [unquote(one) for one in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "repos"]:
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            status = 409 if name in hub.repositories else 200
            if status == 200:
                hub.repositories[name] = []
                hub.commit(name, {".gitattributes": b"*.bin filter=lfs\n"})
            self._answer(status, {"url": f"{hub.endpoint}/{name}", "name": name})
        elif parts[0] == "api":
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "lfs":
            hub.large[parts[1]] = body
            self._answer(200)
        elif parts[-2:] == ["objects", "batch"]:
            self._batch(json.loads(body))
        else:
            parts = parts[1:] if parts[0] == "datasets" else parts
            self._file("/".join(parts[:2]), parts[3], parts[4])

    do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815  http.server's names

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        what, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        found = self.hub.at(name, revision)
        if found is None:
            kind = "RepoNotFound" if name not in self.hub.repositories else "RevisionNotFound"
            self._answer(404, {"error": "not found"}, X_Error_Code=kind)
            return
        oid, files = found
        if what == "revision":
            siblings = [{"rfilename": one, **_described(one, data)} for one, data in files.items()]
            self._answer(200, {"id": name, "sha": oid, "siblings": siblings, "private": False, "tags": []})
        elif what == "tree":
            self._answer(200, [{"type": "file", "path": one, **_described(one, data)} for one, data in files.items()])
        elif what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["size"] > SMALL else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif what == "commit":
            self._commit(name, dict(files), body)
        else:
            self._answer(404, {"error": what})

    def _commit(self, name: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.commit(name, files)
        self._answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"]}
            | ({} if one["oid"] in self.hub.large
               else {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}", "header": {}}}})
            for one in wanted["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self.hub.at(name, revision)
        if found is None or file not in found[1]:
            kind = "RepoNotFound" if found is None else "EntryNotFound"
            self._answer(404, X_Error_Code=kind)
            return
        oid, files = found
        data = files[file]
        etag = _sha256(data) if len(data) > SMALL else _git(data)
        start = 0
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD":
            headers["Content_Length"] = str(len(data))
        self._answer(206 if start else 200, data[start:], **headers)


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client talks to in this process."""
    constants = pytest.importorskip("huggingface_hub", reason="needs pip install 'klas-zoo[hf]'").constants
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

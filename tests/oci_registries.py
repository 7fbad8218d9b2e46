"""A real OCI registry on loopback, Debian's docker-registry, and a line to it that breaks off."""

from __future__ import annotations

import base64
import hashlib
import json
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from server_processes import free_ports

PASSWORD = "s3cr3t"
_HTPASSWD = "user:$2b$04$WuJYhB1u3KI2FxgZhHTyOOL8U1dNNp8SQpv40gxNbLw4O95UrWGQy\n"


@dataclass(frozen=True)
class OciServer:
    """A registry with an address and a folder that it stores blobs in."""

    address: str
    folder: Path

    def url(self, name: str) -> str:
        return f"oci://{self.address}/{name}"

    def blob(self, digest: str) -> Path:
        """The file that a blob is stored in."""
        digest = digest.removeprefix("sha256:")
        return self.folder / "docker/registry/v2/blobs/sha256" / digest[:2] / digest / "data"

    def corrupt(self, digest: str) -> None:
        blob = self.blob(digest)
        content = bytearray(blob.read_bytes())
        content[len(content) // 2] ^= 1
        blob.write_bytes(content)


@contextmanager
def token_service(folder: Path) -> Iterator[str]:
    """The address of a service that gives out Bearer tokens as Docker Hub's does, and in the folder its certificate
    `token.pem`: anybody may pull, only `user` with `PASSWORD` push."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs cryptography: pip install 'klas-zoo[sign]'")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name, now = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tokens")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "token.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    der = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()

    def encoded(table: dict[str, Any]) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(table).encode()).rstrip(b"=")

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
            known = self.headers.get("Authorization") == "Basic " + _encoded_user()
            if self.headers.get("Authorization") and not known:
                self.send_error(401)
                return
            access = []
            for kind, repository, actions in (scope.split(":") for scope in scopes):
                allowed = [one for one in actions.split(",") if known or one == "pull"]
                access.append({"type": kind, "name": repository, "actions": allowed})
            started = int(time.time())
            claims = {"iss": "tokens", "sub": "", "aud": "zoo", "exp": started + 60, "nbf": started - 60,
                      "iat": started, "jti": "1", "access": access}  # fmt: skip
            signed = encoded({"typ": "JWT", "alg": "RS256", "x5c": [der]}) + b"." + encoded(claims)
            mark = base64.urlsafe_b64encode(key.sign(signed, padding.PKCS1v15(), hashes.SHA256())).rstrip(b"=")
            content = json.dumps({"token": (signed + b"." + mark).decode()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/token"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _encoded_user() -> str:
    return base64.b64encode(f"user:{PASSWORD}".encode()).decode()


@contextmanager
def serve(
    folder: Path, *, password: bool = False, tokens: str | None = None, largest_file_bytes: int | None = None
) -> Iterator[OciServer]:
    """
    Args:
        password: only `user` with `PASSWORD` may do anything.
        tokens: the address of a `token_service` of the same folder, whose tokens are asked for.
        largest_file_bytes: that the registry may write, as if its disk were full.
    """
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("needs a registry: apt-get install docker-registry")
    pytest.importorskip("oras", reason="needs oras: pip install 'klas-zoo[oci]'")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(_HTPASSWD)
    (port,) = free_ports(1)
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\nhttp:\n  addr: 127.0.0.1:{port}\n"
        + (f"auth:\n  htpasswd:\n    realm: zoo\n    path: {folder}/htpasswd\n" if password else "")
        + (
            f"auth:\n  token:\n    realm: {tokens}\n    service: zoo\n    issuer: tokens\n"
            f"    rootcertbundle: {folder}/token.pem\n"
            if tokens
            else ""
        )
    )

    def limit() -> None:
        if largest_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))

    quiet = subprocess.DEVNULL
    process = subprocess.Popen([program, "serve", str(config)], stdout=quiet, stderr=quiet, preexec_fn=limit)
    try:
        _wait(port, process)
        yield OciServer(f"127.0.0.1:{port}", folder / "data")
    finally:
        process.terminate()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the registry ended"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the registry does not answer")


@contextmanager
def breaking_off(address: str, after_bytes: int) -> Iterator[str]:
    """The address of a line to a server that is cut for good once so many bytes went through it, in both directions
    together."""
    host, port = address.split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    left, lock, open_ones = [after_bytes], threading.Lock(), list[socket.socket]()

    def carry(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                with lock:
                    allowed = min(len(data), left[0])
                    left[0] -= allowed
                sink.sendall(data[:allowed])
                if left[0] <= 0:
                    break
        except OSError:
            pass
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if left[0] <= 0:
                client.close()
                continue
            server = socket.create_connection((host, int(port)))
            open_ones.extend((client, server))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=carry, args=pair, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in open_ones:
            one.close()


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"

"""Real object stores on loopback, for tests: moto's server speaks S3, gcp-storage-emulator Google Cloud Storage."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from server_processes import free_ports

BUCKET = "zoo"


@dataclass(frozen=True)
class Store:
    """What a server is made of, and what fsspec has to know to reach it.

    Attributes:
        needs: distributions by the modules they bring.
        arguments: of Python, to serve at a port.
        environment: at an endpoint.
    """

    needs: Mapping[str, str]
    arguments: Callable[[int], list[str]]
    environment: Callable[[str], dict[str, str]]


STORES = {
    "s3": Store(
        needs={"moto": "moto[s3,server]", "s3fs": "s3fs"},
        arguments=lambda port: ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        environment=lambda endpoint: {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "made",
            "AWS_SECRET_ACCESS_KEY": "up",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        },
    ),
    "gs": Store(
        needs={"gcp_storage_emulator": "gcp-storage-emulator", "gcsfs": "gcsfs"},
        arguments=lambda port: [
            "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"
        ],
        # without the second, gcsfs asks Google what kind of bucket it is, and for credentials to ask with
        environment=lambda endpoint: {
            "STORAGE_EMULATOR_HOST": endpoint,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        },
    ),
}  # fmt: skip


@contextmanager
def serve(scheme: str) -> Iterator[None]:
    """Starts a store with an empty bucket, leads fsspec to it, and stops it."""
    store = STORES[scheme]
    for module, distribution in store.needs.items():
        pytest.importorskip(module, reason=f"needs {distribution}: pip install '{distribution}'")
    (port,) = free_ports(1)
    environment = store.environment(f"http://127.0.0.1:{port}")
    saved = {name: os.environ.get(name) for name in environment}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *store.arguments(port)], stdout=quiet, stderr=quiet)
    os.environ.update(environment)
    try:
        _wait(port, process)
        import fsspec

        fsspec.filesystem(scheme, skip_instance_cache=True).mkdir(BUCKET)
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        process.terminate()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise RuntimeError("the object store's server ended")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the object store's server does not answer")

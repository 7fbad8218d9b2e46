"""Real inference servers as processes: each in an environment of its own, on loopback, ended when done.

`scripts/servers` makes the environments beside the one it is told; without them the tests that
need one are skipped. Where $KLAS_ZOO_SERVERS names the place, a missing one is an error.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_S = 900  # after which a server ends by itself, whatever became of the test


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a running server listens; its output goes to `log`."""

    http: str
    grpc: str
    metrics: str
    log: Path
    process: subprocess.Popen[bytes]


def environment(server: str) -> Path:
    """The virtual environment of `triton`, `kserve` or `mlserver`; skips the test where there is none."""
    place = os.environ.get("KLAS_ZOO_SERVERS")
    folder = Path(place or ROOT / ".venv-servers").absolute() / server
    if (folder / "bin" / "python").exists():
        return folder
    message = f"no {server} in {folder.parent}: sh scripts/servers installs it"
    if place:
        pytest.fail(message)
    pytest.skip(message)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at; test processes that run at the same time never get the same ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    for port in random.sample(range(20_000 + 500 * worker, 20_500 + 500 * worker), 500):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


@contextmanager
def running(command: Sequence[str | Path], ports: Sequence[int], log: Path, **variables: str) -> Iterator[Server]:
    """Starts a server, waits until it answers ready on its first port, ends it with all it started.

    Args:
        ports: HTTP first, then gRPC, then that of metrics, if it is not the first.
        variables: of the environment, besides PATH and HOME.
    """
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["timeout", "--kill-after=10", str(LONGEST_S), *map(str, command)],
            env={**inherited, "OMP_NUM_THREADS": "1", "NO_PROXY": "*", **variables},
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_ready(process, ports[0], log)
        http, grpc, metrics = (f"127.0.0.1:{port}" for port in (*ports, ports[0])[:3])
        yield Server(http=http, grpc=grpc, metrics=metrics, log=log, process=process)
    finally:
        _end(process)


@contextmanager
def triton(repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """The tritonserver that the package nvidia-pytriton carries, with a backend for onnxruntime beside its own."""
    venv = environment("triton")
    (packages,) = venv.glob("lib/python3*/site-packages")
    backends = _backends(packages / "pytriton" / "tritonserver", venv, folder / "backends")
    http, grpc, metrics = free_ports(3)
    command = [
        packages / "pytriton/tritonserver/bin/tritonserver", f"--model-repository={repository}",
        f"--backend-directory={backends}", "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc}", "--metrics-address=127.0.0.1",
        f"--metrics-port={metrics}", "--metrics-interval-ms=200", *options,
    ]  # fmt: skip
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{_own_libraries(venv)}"
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    with running(
        command, (http, grpc, metrics), folder / "triton.log",
        LD_LIBRARY_PATH=libraries, PYTHONPATH=str(packages), PATH=path, VIRTUAL_ENV=str(venv),
    ) as server:  # fmt: skip
        yield server


@contextmanager
def kserve(package: Path, folder: Path, model: str, *options: str) -> Iterator[Server]:
    """KServe's own server with the package as its one model; metrics are on its HTTP port."""
    venv, ports = environment("kserve"), free_ports(2)
    command = [
        venv / "bin" / "python", ROOT / "tests" / "kserve_loopback.py", "--package", package, "--threads", "1",
        "--model_name", model, "--http_port", str(ports[0]), "--grpc_port", str(ports[1]), *options,
    ]  # fmt: skip
    with running(command, ports, folder / "kserve.log") as server:
        yield server


@contextmanager
def mlserver(package: Path, folder: Path, model: str, **extra: object) -> Iterator[Server]:
    """MLServer with the package as its one model."""
    venv, ports = environment("mlserver"), free_ports(3)
    settings = {
        "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
        "parallel_workers": 0,
    }  # fmt: skip
    found = {
        "name": model,
        "implementation": "klas_zoo.serving.mlserver_runtime.ElasticRuntime",
        "parameters": {"uri": str(package), "extra": {"threads": 1, **extra}},
    }
    (folder / "models").mkdir()
    (folder / "models" / "settings.json").write_text(json.dumps(settings))
    (folder / "models" / "model-settings.json").write_text(json.dumps(found))
    command = [venv / "bin" / "mlserver", "start", folder / "models"]
    with running(command, ports, folder / "mlserver.log", PROMETHEUS_MULTIPROC_DIR=str(folder)) as server:
        yield server


def _backends(server: Path, venv: Path, folder: Path) -> Path:
    """Triton's python backend with the stub for the environment's Python, and ours."""
    (version,) = venv.glob("lib/python3*")
    stub = version.name.removeprefix("python")
    shutil.copytree(server / "backends", folder)
    shutil.copy(server / "python_backend_stubs" / stub / "triton_python_backend_stub", folder / "python")
    shutil.copytree(ROOT / "tests" / "triton_backends", folder, dirs_exist_ok=True)
    return folder


def _own_libraries(venv: Path) -> Path:
    """Where the libpython is that an environment's Python was made with; Triton's stub is linked with one."""
    lines = dict(line.split(" = ", 1) for line in (venv / "pyvenv.cfg").read_text().splitlines() if " = " in line)
    return Path(lines["home"]).parent / "lib"


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 120) -> None:
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with opener.open(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    sys.stderr.write(log.read_text(errors="replace")[-5000:])
    raise AssertionError(f"the server did not become ready; its output: {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=20)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue

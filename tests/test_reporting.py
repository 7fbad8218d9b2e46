"""What all processes of a team meet, one tells, whoever comes first and however long the others take."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from klas_zoo.processes.team import report_once

JOB = """
import time
from klas_zoo.processes.team import report_once

def say():
    time.sleep(0.5)  # if the other ended meanwhile, torchrun would end this one before it has spoken
    print("told", flush=True)

report_once(say)
raise SystemExit(3)
"""


@pytest.mark.slow
def test_one_of_two_processes_tells_and_is_not_ended_before_it_has(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--monitor-interval", "0.05", str(tmp_path / "job.py")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert done.stdout == "told\n"


def test_a_process_that_reaches_nobody_speaks_for_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
    for name, value in {**places, "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("klas_zoo.processes.team._REPORT_PATIENCE", timedelta(seconds=1))
    report_once(lambda: print("told"))
    assert capsys.readouterr().out == "told\n"

"""Starts a build as several processes on this machine, as `torchrun --standalone` would."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from klas_zoo.hardware import physical_cores


def launch(arguments: Sequence[str], *, processes: int, restarts: int) -> int:
    """Runs `klas-zoo` with these arguments in a team of processes; gives the exit code.

    A process that dies takes the others with it; then all start again, up to `restarts` times, and
    resume from the last checkpoint.
    """
    # torchrun reports a failed child with a page of its own; the child has reported the error
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # else every process would take all cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, physical_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "klas_zoo", *arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0

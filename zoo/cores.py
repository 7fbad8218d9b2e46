"""How many cores this process may use: its affinity, hyper-threads, and the CPU quota of its container.

Imports nothing heavy. `os.cpu_count` and psutil ignore quotas; loky knows those of a container's own root
group, but not of the groups below it, and warns on Arm, where /proc/cpuinfo has no core numbers.
"""

from __future__ import annotations

import math
import os
from pathlib import Path


def physical_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on, at least 1; the default number of threads everywhere.

    Hyper-threads of one core count once. A quota of control groups (v1 or v2) is rounded down: with more
    threads than whole CPUs, the kernel stops all of them in every period.

    Args:
        root: where `sys` and `proc` are mounted.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    topology = root / "sys/devices/system/cpu"
    try:
        # the threads of one core all name the same siblings
        cores = len({(topology / f"cpu{n}/topology/thread_siblings_list").read_text() for n in usable})
    except OSError:  # not Linux
        cores = len(usable)
    return max(1, math.floor(min(cores, cpu_quota(root))))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs' worth of time that control groups leave this process; infinite where nothing limits it."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    found = [math.inf]
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = Path(path.lstrip("/"))
        # a limit of any group above holds too; in a container the path may be one of the host's, which is not there
        found += [_quota_of(mount / group) for group in (own, *own.parents)]
    return min(found)


def _quota_of(group: Path) -> float:
    """Of one control group: quota / period, as v2 or v1 writes them."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdecimal() and period.isdecimal() and int(period):  # else `max` or -1: no limit
            return int(quota) / int(period)
    return math.inf

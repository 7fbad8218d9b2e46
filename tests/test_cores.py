"""How many cores a process may use, read from trees laid out as /proc and /sys are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from klas_zoo.cores import cpu_quota, physical_cores


def machine(root: Path, monkeypatch: pytest.MonkeyPatch, *, usable: set[int], of: int = 8) -> Path:
    """A processor of `of` hyper-threads, n and n + of / 2 on one core."""
    for n in range(of):
        folder = root / f"sys/devices/system/cpu/cpu{n}/topology"
        folder.mkdir(parents=True)
        first = n % (of // 2)
        (folder / "thread_siblings_list").write_text(f"{first},{first + of // 2}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
    return root


def limit(root: Path, groups: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(("usable", "cores"), [(set(range(8)), 4), ({0, 4}, 1), ({0, 1, 5}, 2)])
def test_hyper_threads_of_one_core_count_once(
    usable: set[int], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert physical_cores(machine(tmp_path, monkeypatch, usable=usable)) == cores


V1 = "9:name=systemd:/\n4:memory:/pod\n2:cpu,cpuacct:/pod\n1:cpuset:/other\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, float("inf")),
        ("0::/a.slice/b.scope\n", {"a.slice/cpu.max": "150000 100000", "a.slice/b.scope/cpu.max": "max 100000"}, 1.5),
        ("0::/kubepods/pod1/on-the-host\n", {"cpu.max": "50000 100000"}, 0.5),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "300000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        (V1, {"cpu/pod/cpu.cfs_quota_us": "-1\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, float("inf")),
        (V1, {"cpuset/other/cpu.cfs_quota_us": "1\n", "cpuset/other/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ("0::/\n", {"cpu.max": "no numbers at all"}, float("inf")),
    ],
    ids=["v2", "v2 without limit", "v2, a group above", "v2 in a container", "v1", "v1 in a container",
         "v1 without limit", "v1 of another controller", "a file of another kind"],
)  # fmt: skip
def test_quotas_of_control_groups_are_read(
    groups: str, files: dict[str, str], quota: float, tmp_path: Path
) -> None:
    limit(tmp_path, groups, files)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("quota", "cores"), [("250000", 2), ("30000", 1), ("6400000", 4)])
def test_a_container_gets_whole_cpus_of_its_quota_and_at_least_one(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(machine(tmp_path, monkeypatch, usable=set(range(8))), "0::/\n", {"cpu.max": f"{quota} 100000"})
    assert physical_cores(tmp_path) == cores


def test_a_machine_without_proc_and_sys_counts_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert physical_cores(tmp_path) == 3

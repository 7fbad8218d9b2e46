"""On which file system a folder lies: some are shared between machines, and keep fewer promises."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_SHARED = {
    "9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "smb3", "smbfs", "vboxsf", "virtiofs", "wekafs",
}  # fmt: skip
"""Whose files other machines, or the host of a virtual one, may have open too."""
_LOCAL_FUSE = {"fuse.ext2", "fuse.ext4", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.ntfs-3g"}


def network_file_system(folder: Path) -> str | None:
    """The type of the file system of a folder, such as `nfs4`, where it is one that machines share; else None.

    As Linux's mount table has it; elsewhere, and where the table does not list the device, None.
    """
    try:
        found = _type_of(folder.stat().st_dev)
    except OSError:
        return None
    return found if found in _SHARED or (found.startswith("fuse.") and found not in _LOCAL_FUSE) else None


@cache
def _type_of(device: int) -> str:
    """By the number of its device; empty where it is unknown."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    # 36 35 98:0 /root /mount rw,noatime master:1 - ext4 /dev/sda1 rw: fields before the dash vary in number
    rows = (line.split(" - ", 1) for line in lines)
    return next((row[1].split()[0] for row in rows if len(row) == 2 and row[0].split()[2] == wanted), "")

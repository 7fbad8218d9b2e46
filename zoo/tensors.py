"""Writing safetensors files: with the mode that any other new file of the folder gets, and the system's own errors."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn


def write_tensors(
    tensors: Mapping[str, Tensor] | nn.Module, file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors by name, or all of a module's, on whichever device and in whichever layout they are.

    Raises:
        OSError: the file cannot be written.
    """
    held = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    # safetensors makes files that only their owner may read; this one gets its mode from the umask
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY, 0o666)
    mode = os.fstat(descriptor).st_mode
    os.close(descriptor)
    try:
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}
        save_file(found, file, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        # it reports the disk in words only
        full = "No space left" in str(error) or "StorageFull" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from error
    file.chmod(mode)

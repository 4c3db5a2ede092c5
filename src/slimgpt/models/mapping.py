"""Tensors in memory-mapped files, for what does not fit into memory."""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 2**24  # bytes


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    directory: Path | None,
    device: torch.device | None = None,
) -> Tensor:
    """Allocate a tensor in a device's memory, or in a memory-mapped file in a directory.

    The file is unlinked at once, so that nothing remains however the process ends.

    Raises
    ------
    OSError
        If there is not enough space for the file.
    """
    if directory is None:
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape)
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # Writing to a hole in a mapped file would crash the process if the disk is full.
            num_bytes = size * dtype.itemsize
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                for start in range(0, num_bytes, CHUNK):
                    file.write(bytes(min(CHUNK, num_bytes - start)))
        return torch.from_file(name, shared=True, size=size, dtype=dtype).view(shape)
    finally:
        os.unlink(name)

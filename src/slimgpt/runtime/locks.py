"""Locks: only one process at a time writes an output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from slimgpt.errors import RunStateError


@contextmanager
def writing_alone(file: Path, seconds: float = 0) -> Iterator[None]:
    """Prevent other processes from writing the same file.

    A lock file exists beside it during the context.

    Parameters
    ----------
    file : Path
        The output; its directory must exist.
    seconds : float
        Maximum time to wait for another process.

    Raises
    ------
    RunStateError
        If another process still holds the lock then, or the lock file is a link.
    OSError
        If the directory cannot be written.
    """
    path = file.with_name(f".{file.name}.lock")
    if path.is_symlink():  # locking it would open its target
        raise RunStateError(f"{path} is a link, not a lock", hint="remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds, poll_interval=0.05)
        while not path.exists():  # removed by the previous holder
            lock.release()
            lock.acquire(timeout=seconds, poll_interval=0.05)
    except Timeout:
        raise RunStateError(
            f"another process is writing {file}",
            hint="wait for it to end, or choose another output",
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)  # still held; the next process creates a new one
        lock.release()

"""One process at a time writes an output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from slimgpt.errors import RunStateError


@contextmanager
def writing_alone(file: Path, seconds: float = 0) -> Iterator[None]:
    """Keep other processes from writing the same file.

    A lock file lies beside it for as long.

    Parameters
    ----------
    file : Path
        The output, in a directory that exists.
    seconds : float
        How long to wait for another process.

    Raises
    ------
    RunStateError
        If another process has not ended by then, or the lock file is a link.
    OSError
        If the directory cannot be written.
    """
    path = file.with_name(f".{file.name}.lock")
    if path.is_symlink():  # to lock it would be to open what it leads to
        raise RunStateError(f"{path} is a link, not a lock", hint="remove it")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds, poll_interval=0.05)
        while not path.exists():  # the one before us has removed it
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
            os.unlink(path)  # while it is held: who comes next has another one
        lock.release()

"""Locks: only one process at a time writes an output."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from slimgpt.errors import RunStateError
from slimgpt.runtime.files import writing


@contextmanager
def writing_alone(
    output: Path, seconds: float = 0, lock_file: Path | None = None
) -> Iterator[None]:
    """Prevent other processes from writing the same output.

    Parameters
    ----------
    output : Path
        The output, in a directory that exists.
    seconds : float
        How long to wait for another process.
    lock_file : Path, optional
        A file that exists for as long. Default: ``.NAME.lock`` beside the output.

    Raises
    ------
    RunStateError
        If another process has not ended by then, the lock file is a link, or it cannot be made.
    """
    path = lock_file or output.with_name(f".{output.name}.lock")
    if path.is_symlink():  # to lock it would be to open what it leads to
        raise RunStateError(f"{path} is a link, not a lock", hint="remove it")
    lock = FileLock(path)
    with writing(output):
        try:
            lock.acquire(timeout=seconds, poll_interval=0.05)
            while not path.exists():  # the one before us has removed it
                lock.release()
                lock.acquire(timeout=seconds, poll_interval=0.05)
        except Timeout:
            raise RunStateError(
                f"another process is working on {output}",
                hint="wait for it to end, or choose another output",
            ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)  # still held; the next process creates a new one
        lock.release()

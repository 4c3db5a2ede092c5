"""A run: its output directory, where files appear all at once or not at all, and its cost."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimgpt.errors import RunStateError


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Collect the files of a result, and give them the output directory's name when all is done.

    Parameters
    ----------
    output : Path
        The output directory; must not exist, or be empty.

    Yields
    ------
    Path
        A temporary directory beside it. It is removed if the block raises, else synced to disk
        and renamed in one step.

    Raises
    ------
    RunStateError
        If `check_output` raises it, or the directory cannot be made.
    """
    check_output(output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield directory
        with writing(output):
            _settle(directory)
            if output.exists():
                output.rmdir()
            directory.rename(output)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def check_output(output: Path) -> None:
    """Check that a result can be put into an output directory: it must not exist, or be empty.

    Raises
    ------
    RunStateError
        If the output exists and is not an empty directory.
    """
    if output.is_dir() and any(output.iterdir()):
        raise RunStateError(
            f"the output directory {output} exists and is not empty",
            hint="choose another --output, or remove it first",
        )
    if output.exists() and not output.is_dir():
        raise RunStateError(f"the output {output} exists and is not a directory")


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn a failure of the file system into an error that says what could not be written.

    Raises
    ------
    RunStateError
        In place of an ``OSError``.
    """
    try:
        yield
    except OSError as err:
        raise RunStateError(
            f"cannot write to {output}: {err}", hint="free some space, or choose another --output"
        ) from err


def write_atomically(file: Path, text: str) -> None:
    """Replace a text file in one step."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        Path(name).chmod(0o666 & ~_umask())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where unknown (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _settle(directory: Path) -> None:
    """Sync all files to disk, and give them the permissions that new files have here."""
    umask = _umask()
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask

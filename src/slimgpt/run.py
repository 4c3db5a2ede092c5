"""A run: its output directory, where files appear all at once or not at all, and its cost."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimgpt.errors import RunStateError

STATE = ".slimgpt"


def check_output(output: Path) -> None:
    """Make sure that a new result can go to a directory.

    Raises
    ------
    RunStateError
        If it is a file, or a directory that is not empty.
    """
    if output.is_dir() and any(output.iterdir()):
        raise RunStateError(
            f"the output directory {output} exists and is not empty",
            hint="choose another --output, or remove it first",
        )
    if output.exists() and not output.is_dir():
        raise RunStateError(f"the output {output} exists and is not a directory")


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Collect the files of a result, and move them to the output directory when all is done.

    Parameters
    ----------
    output : Path
        The output directory; made if it does not exist.

    Yields
    ------
    Path
        A directory on the same file system. If the block raises, it is removed, and so is the
        output directory if it was made here.

    Raises
    ------
    RunStateError
        If the directory cannot be made or written to.
    """
    check_output(output)
    existed = output.exists()
    state = output / STATE
    try:
        state.mkdir(parents=True)
        yield state
        for file in sorted(state.iterdir()):
            file.chmod(0o644)
            file.rename(output / file.name)
        state.rmdir()
    except BaseException as err:
        shutil.rmtree(state if existed else output, ignore_errors=True)
        if isinstance(err, OSError):
            raise RunStateError(f"cannot write to {output}: {err}") from err
        raise


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where unknown (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

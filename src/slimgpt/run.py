"""A run: its output directory, the state that outlives an interruption, and its cost.

While a run is going on, ``OUT/.slimgpt`` holds its manifest and one file for each finished block.
Every file appears by a write to a temporary name, a sync to disk and a rename. The finished
product is put together in ``OUT/.slimgpt/result`` and then moved into ``OUT``, ``config.json``
last: a directory that has one is complete.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slimgpt.errors import RunStateError

STATE_DIR = ".slimgpt"
LAST_FILE = "config.json"

_MANIFEST, _RESULT = "manifest.json", "result"


@dataclass(frozen=True)
class Run:
    """The state of a run that this process owns.

    Attributes
    ----------
    output : Path
        The output directory.
    """

    output: Path

    @property
    def state(self) -> Path:
        """Directory of the state."""
        return self.output / STATE_DIR

    @property
    def is_published(self) -> bool:
        """Whether the product is complete in the output directory."""
        return (self.output / LAST_FILE).exists()

    @property
    def is_written(self) -> bool:
        """Whether the product is complete, if perhaps not yet in its place."""
        return self.is_published or (self.state / _RESULT).exists()

    def block_file(self, index: int) -> Path:
        """Where the result of a block is or will be; it exists only when it is whole."""
        return self.state / f"block-{index:05d}.safetensors"

    @contextmanager
    def product(self) -> Iterator[Path]:
        """Put the finished product together.

        Yields
        ------
        Path
            An empty directory for its files; they are synced to disk when the block ends.
        """
        draft = self.state / f"{_RESULT}.tmp"
        with writing(self.output):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            yield draft
            for path in (*draft.rglob("*"), draft):
                _sync(path)
            draft.rename(self.state / _RESULT)
            _sync(self.state)

    def publish(self) -> None:
        """Move the finished product to its place."""
        with writing(self.output):
            if not self.is_published:
                result = self.state / _RESULT
                for path in sorted(result.iterdir(), key=lambda path: path.name == LAST_FILE):
                    path.rename(self.output / path.name)
                _sync(self.output)


@contextmanager
def open_run(output: Path, identity: dict[str, Any], restart: bool = False) -> Iterator[Run]:
    """Begin a run, or go on with one that was interrupted.

    Parameters
    ----------
    output : Path
        The output directory: missing, empty, or with the state of a run.
    identity : dict
        All that the result depends on, as JSON values. An interrupted run goes on only if its
        identity is the same.
    restart : bool
        Throw away the state of an interrupted run.

    Yields
    ------
    Run
        The state is removed when the product is published, or when the block raises before any
        block of the model was finished.

    Raises
    ------
    RunStateError
        If the output has other files, another process works on it, it cannot be written, or the
        interrupted run has another identity; names what differs.
    """
    run = Run(output)
    if run.is_published and not (run.state / _MANIFEST).exists():
        shutil.rmtree(run.state, ignore_errors=True)  # the end of a clean-up
    if output.exists() and not output.is_dir():
        raise RunStateError(f"the output {output} exists and is not a directory")
    if output.is_dir() and not run.state.exists() and any(output.iterdir()):
        raise RunStateError(
            f"the output directory {output} exists and is not empty",
            hint="choose another --output, or remove it first",
        )
    is_new = not output.exists()
    with writing(output):
        run.state.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.state / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RunStateError(
                f"another process is working on {output}",
                hint="wait for it to end, or choose another --output",
            ) from None
    try:
        _identify(run, identity, restart)
        yield run
    finally:
        useless = run.is_published or not _blocks(run)
        lock.release()
        if useless:
            for file in _blocks(run):
                file.unlink()
            shutil.rmtree(run.state, ignore_errors=True)
            if is_new and not run.is_published:
                output.rmdir()


def _blocks(run: Run) -> list[Path]:
    return sorted(run.state.glob("block-*.safetensors"))


def _identify(run: Run, identity: dict[str, Any], restart: bool) -> None:
    """Compare with the identity of an interrupted run, or note that of a new one."""
    if restart:
        shutil.rmtree(run.state / _RESULT, ignore_errors=True)
        for file in _blocks(run):
            file.unlink()
    manifest = run.state / _MANIFEST
    now = json.loads(json.dumps(identity))
    if not _blocks(run) and not run.is_written:
        with writing(run.output):
            write_atomically(manifest, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(manifest.read_text(encoding="utf-8"))
    differences = [
        f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise RunStateError(
            f"{run.output} holds an interrupted run that differs: {'; '.join(differences)}",
            hint="give the same options to go on with it, or --restart to throw it away",
        )


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
            f"cannot write to {output}: {err}",
            hint="free some space or correct the permissions, then give the same command again; "
            "or choose another --output",
        ) from err


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and give it its own when it is safely on disk.

    Yields
    ------
    Path
        The temporary name. If the block raises, `file` is as it was.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, file)
        _sync(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(file: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where unknown (Windows)."""
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":  # where ru_maxrss starts at that of the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to disk."""
    if path.is_dir() and sys.platform == "win32":  # has no such thing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

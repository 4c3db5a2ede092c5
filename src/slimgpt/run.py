"""A run: its output directory, the state that outlives an interruption, and its cost.

While a run is going on, ``OUT/.slimgpt`` holds its manifest and what is finished: blocks, or
checkpoints of the training. A file appears by a write to a temporary name, a sync to disk and a
rename, but for the checkpoints, which the Trainer writes. The finished product is put together in
``OUT/.slimgpt/result`` and then moved into ``OUT``, ``config.json`` last: a directory that has one
is complete.
"""

import ctypes
import gc
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from slimgpt.errors import OtherRunError, RunStateError
from slimgpt.files import reading, sync, write_atomically, writing

STATE_DIR = ".slimgpt"
LAST_FILE = "config.json"

GENERATED_FILE, SCORES_FILE = "generated.safetensors", "scores.safetensors"
WIDTHS_FILE = "widths.json"

# What a sweep over the blocks is for: to measure, or to prune.
Stage = Literal["survey", "block"]

_PROGRESS = (
    GENERATED_FILE,
    SCORES_FILE,
    WIDTHS_FILE,
    "survey-*.safetensors",
    "block-*.safetensors",
    "checkpoint-*/trainer_state.json",
)
_MANIFEST, _RESULT, _DRAFT, _LOCK = "manifest.json", "result", "result.tmp", "lock"
_MOVED = "moved.json"  # names in the output directory that are the product's


@dataclass(frozen=True)
class Run:
    """The output directory of a run, and its state.

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

    @property
    def size(self) -> int:
        """Bytes of the state."""
        return sum(path.stat().st_size for path in self.state.rglob("*") if path.is_file())

    def block_file(self, index: int, stage: Stage = "block") -> Path:
        """Where the result of a block is or will be; it exists only when it is whole."""
        return self.state / f"{stage}-{index:05d}.safetensors"

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to go on with: what costs time to make again."""
        return any(next(self.state.glob(pattern), None) for pattern in _PROGRESS)

    def identify(self, identity: dict[str, Any], restart: bool) -> None:
        """Compare with the identity of an interrupted run, or note that of a new one.

        Parameters
        ----------
        identity : dict
            All that the result depends on, as JSON values.
        restart : bool
            Throw away the state of an interrupted run.

        Raises
        ------
        OtherRunError
            If the interrupted run has another identity and anything to go on with; names what
            differs.
        RunStateError
            If the run to throw away is finished.
        """
        manifest, now = self.state / _MANIFEST, json.loads(json.dumps(identity))
        if restart and self.is_published:
            raise _occupied(self.output)
        if restart or not (self.has_begun or self.is_written):
            self._forget()
        if not manifest.exists():
            with writing(self.output):
                write_atomically(manifest, json.dumps(now, indent=1) + "\n")
        with reading(manifest):
            before = json.loads(manifest.read_text(encoding="utf-8"))
        differences = [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in before | now
            if before.get(key) != now.get(key)
        ]
        if differences:
            raise OtherRunError(
                f"{self.output} holds an interrupted run that differs: {'; '.join(differences)}",
                hint="give the same options to go on with it, or --restart to throw it away",
            )

    @contextmanager
    def product(self) -> Iterator[Path]:
        """Put the finished product together.

        Yields
        ------
        Path
            An empty directory for its files; they are synced to disk when the block ends.
        """
        draft = self.state / _DRAFT
        with writing(self.output):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            yield draft
            for path in (*draft.rglob("*"), draft):
                sync(path)
            draft.rename(self.state / _RESULT)
            sync(self.state)

    def publish(self) -> None:
        """Move the finished product to its place.

        Raises
        ------
        RunStateError
            If the output directory has files of the same names, or cannot be written.
        """
        with writing(self.output):
            if not self.is_published:
                result, moved = self.state / _RESULT, self.state / _MOVED
                paths = sorted(result.iterdir(), key=lambda path: path.name == LAST_FILE)
                if not moved.exists():
                    if taken := [path.name for path in paths if (self.output / path.name).exists()]:
                        raise RunStateError(
                            f"{self.output} has other files of these names: {', '.join(taken)}",
                            hint="move them away, then give the same command again",
                        )
                    write_atomically(moved, json.dumps([path.name for path in paths]) + "\n")
                for path in paths[:-1]:
                    path.rename(self.output / path.name)
                sync(self.output)
                (result / LAST_FILE).rename(self.output / LAST_FILE)
                sync(self.output)

    def _forget(self) -> None:
        """Remove the state, but for the lock; an unfinished product first, the manifest last."""
        result = self.state / _RESULT
        if result.exists():
            shutil.rmtree(self.state / _DRAFT, ignore_errors=True)
            result.rename(self.state / _DRAFT)
        moved = self.state / _MOVED
        if moved.exists() and not self.is_published:
            for name in json.loads(moved.read_text(encoding="utf-8")):
                _remove(self.output / name)
        for path in sorted(self.state.iterdir(), key=lambda path: path.name == _MANIFEST):
            if path.name != _LOCK:
                _remove(path)


@contextmanager
def open_run(output: Path) -> Iterator[Run]:
    """Take possession of an output directory.

    Parameters
    ----------
    output : Path
        The output directory: missing, empty, or with the state of a run.

    Yields
    ------
    Run
        Its state is removed when the product is published, or when there is nothing to go on with.

    Raises
    ------
    RunStateError
        If the output has other files, another process works on it, or it cannot be written.
    """
    run = Run(output)
    if output.exists() and not output.is_dir():
        raise RunStateError(f"the output {output} exists and is not a directory")
    if output.is_dir() and not run.state.exists() and any(output.iterdir()):
        raise _occupied(output)
    is_new = not output.exists()
    with writing(output):
        run.state.mkdir(parents=True, exist_ok=True)
        lock = locked(run.state / _LOCK, output)
    try:
        if run.is_published and not (run.state / _MANIFEST).exists():
            raise _occupied(output)  # but for the end of a clean-up
        yield run
    finally:
        if run.is_published or not run.has_begun:
            run._forget()
            (run.state / _LOCK).unlink()  # while it is held: who comes next has another one
            with suppress(OSError):
                run.state.rmdir()
                if is_new and not run.is_published:
                    output.rmdir()
        lock.release()


def locked(file: Path, output: Path) -> FileLock:
    """Lock an output directory by a file.

    Raises
    ------
    RunStateError
        If another process has locked it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunStateError(
            f"another process is working on {output}",
            hint="wait for it to end, or choose another --output",
        ) from None
    return lock


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _occupied(output: Path) -> RunStateError:
    return RunStateError(
        f"the output directory {output} exists and is not empty",
        hint="choose another --output, or remove it first",
    )


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, of the packages that every result depends on, and of these."""
    packages = ("slimgpt", "torch", "transformers", "safetensors", *packages)
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


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


def trim_heap() -> None:
    """Give freed memory back to the system, which glibc keeps in pieces between those in use."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def reset_peak_memory() -> bool:
    """Have `peak_memory` begin anew; False where the system cannot (all but Linux)."""
    gc.collect()
    trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def machine() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())

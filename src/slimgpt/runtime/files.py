"""Read and check files; write them atomically, so that they survive a crash."""

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from slimgpt.errors import ConfigError, DamagedRunError, RunStateError


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file whose top level has a given type.

    Parameters
    ----------
    file : Path
        The file.
    kind : type
        ``dict`` or ``list``.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not JSON, or has another type at the top level.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise _broken(file, str(err)) from None
    if not isinstance(values, kind):
        raise _broken(file, f"its top level is a {type(values).__name__}, not a {kind.__name__}")
    return values


def _broken(file: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"cannot read {file}: {problem}", hint="the file is broken: write it again, or remove it"
    )


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Convert errors from reading a file of an interrupted run; they name the file.

    Raises
    ------
    DamagedRunError
        If the file is damaged.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError) as err:
        raise DamagedRunError(
            f"{file} of the interrupted run is damaged: {err}",
            hint="--restart discards the interrupted run and starts again",
        ) from err


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Convert file-system errors; the new error names the output.

    Raises
    ------
    RunStateError
        Instead of an ``OSError``, or safetensors' version of it.
    """
    try:
        yield
    except (OSError, SafetensorError, UnicodeEncodeError) as err:
        raise RunStateError(
            f"cannot write to {output}: {err}",
            hint="free some space or correct the permissions, then repeat the command; "
            "or choose another --output",
        ) from err


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Write a file under a temporary name, and rename it when it is safely on disk.

    The temporary name is random and must not exist, so that no link in a foreign directory can
    redirect it. A link with the file's final name is replaced, not followed.

    Yields
    ------
    Path
        The temporary name. If the block raises, `file` is unchanged.
    """
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(file: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe_file(file: Path) -> str:
    """Describe the content of a file: its size and SHA-256."""
    stat = file.stat()
    times = stat.st_mtime_ns, stat.st_ctime_ns
    return f"{stat.st_size} bytes, sha256 {_sha256(file, stat.st_size, times, stat.st_ino)}"


@lru_cache(maxsize=4096)
def _sha256(file: Path, *_: Any) -> str:
    """Hash a file; the other arguments are the cache key of its current state."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if path.is_dir() and sys.platform == "win32":  # not supported
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

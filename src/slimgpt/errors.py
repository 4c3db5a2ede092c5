"""All errors that SlimGPT raises deliberately. Each has a message and a hint for the user."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# What PyTorch, C++ and safetensors say when memory or disk is full.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
_NO_SPACE = ("No space left on device", "Disk quota exceeded")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class SlimGPTError(Exception):
    """Base class of all deliberate errors.

    Parameters
    ----------
    message : str
        What happened, with numbers.
    hint : str, optional
        What to do about it.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(SlimGPTError, ValueError):
    """An option, a model name or a path is invalid."""


class UnsupportedModelError(SlimGPTError):
    """The model exists but cannot be pruned: unknown family, unsafe format, broken weights."""


class DataError(SlimGPTError):
    """A data set cannot be read, lacks a field or is too short."""


class NumericalError(SlimGPTError):
    """A Hessian cannot be factorised, even with the largest damping, or training diverges."""

    exit_code = 1


@contextmanager
def numerical_errors_at(place: str) -> Iterator[None]:
    """Name the place in numerical errors."""
    try:
        yield
    except NumericalError as err:
        raise NumericalError(f"{place}: {err}", hint=err.hint) from err


class RunStateError(SlimGPTError):
    """The output directory is not in the state that the command requires."""


class OtherRunError(RunStateError):
    """The output directory holds an interrupted run with other options or inputs."""


class DamagedRunError(RunStateError):
    """A file of an interrupted run was changed after it was written."""


class ExportError(SlimGPTError):
    """The target format cannot represent the model, or its engine would compute something else."""


class EngineError(SlimGPTError):
    """An inference engine cannot load the model, or exits early."""

    exit_code = 1


class ResourceError(SlimGPTError):
    """Memory or disk is full, or the file system refuses an operation."""

    exit_code = 1


class MissingDependencyError(SlimGPTError):
    """An optional package is not installed.

    Parameters
    ----------
    package : str
        The missing package.
    purpose : str
        What needs it.
    command : str
        The command that installs it.
    """

    def __init__(self, package: str, purpose: str, command: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"install it with: {command}",
        )


def is_disk_full(err: BaseException) -> bool:
    """Whether an error means that the disk is full."""
    return getattr(err, "errno", None) in _FULL or any(words in str(err) for words in _NO_SPACE)


def resource_error(err: BaseException) -> SlimGPTError | None:
    """Convert an error of the machine (memory, disk, files) into an error for the user.

    Parameters
    ----------
    err : BaseException
        The exception that a library or the system raised.

    Returns
    -------
    SlimGPTError or None
        The error; None if the machine is not the cause.
    """
    text = " ".join(str(err).split())
    is_memory = isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError"
    if is_memory or (
        isinstance(err, RuntimeError | OSError) and any(words in text for words in _NO_MEMORY)
    ):
        return ResourceError(
            f"out of memory: {text[:300]}" if text else "out of memory",
            hint="use fewer or shorter samples, smaller batches, a smaller --dtype, or the CPU",
        )
    if is_disk_full(err):
        return ResourceError(
            f"no space left: {text[:300]}",
            hint="free some space on the disk, then repeat the command",
        )
    if getattr(err, "errno", None) == errno.ENAMETOOLONG:
        return ConfigError(f"a name is too long: {text[:300]}", hint="give a shorter one")
    if isinstance(err, OSError):
        return ResourceError(
            f"a file cannot be read or written: {text[:300]}",
            hint="check the name, the permissions and the disk",
        )
    return None

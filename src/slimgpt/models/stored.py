"""Read the headers and tensors of a checkpoint's weight files."""

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimgpt.errors import ConfigError, SlimGPTError, UnsupportedModelError
from slimgpt.models.config_checks import explain, read_object

# What transformers raises for files that are missing, broken or need another package.
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes
    ----------
    read : callable
        Reads the tensor.
    shape : tuple of int
        Its shape.
    dtype : str
        Its safetensors type name.
    origin : str
        Its name in the file, if transformers renames it.
    is_converted : bool
        Whether it is made of several tensors in the file.
    read_row : callable or None
        Reads one index of the first axis, if that takes less memory than to read all.
    """

    read: Callable[[], Tensor]
    shape: tuple[int, ...]
    dtype: str
    origin: str = ""
    is_converted: bool = False
    read_row: Callable[[int], Tensor] | None = None


class _ShardIndex(BaseModel):
    """The index of a sharded checkpoint; transformers needs both keys."""

    model_config = ConfigDict(strict=True)

    metadata: dict[str, Any]
    weight_map: dict[str, str]


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Convert library errors for a user's file into an error about that file.

    Parameters
    ----------
    what : str
        The file or its content, and the model, for error messages.

    Raises
    ------
    ConfigError
        Instead of the library's error.
    """
    try:
        yield
    except SlimGPTError:
        raise
    except LOAD_ERRORS as err:
        raise cannot_load(what, err) from err


def cannot_load(what: str, err: Exception) -> ConfigError:
    """Build the error for a file that transformers or safetensors could not read."""
    reason = " ".join(str(err).split())[:300] or type(err).__name__
    if re.search(r"can't allocate memory|not enough memory|out of memory", reason):
        return ConfigError(
            f"there is not enough memory to load {what}: {reason}",
            hint="close other programs, choose a smaller --dtype, or take a larger machine",
        )
    return ConfigError(
        f"cannot load {what}: {reason}",
        hint="check that the files are whole, or for a hub id the name and the network; only "
        "safetensors and GGUF are loaded, never pickles",
    )


def read_index(file: Path) -> set[str]:
    """Read the file names of a sharded checkpoint from its index.

    Parameters
    ----------
    file : Path
        ``model.safetensors.index.json``.

    Returns
    -------
    set of str
        Names without a folder: the files are beside the index.

    Raises
    ------
    ConfigError
        If the file is not such an index.
    UnsupportedModelError
        If it names files outside its directory.
    """
    try:
        names = set(_ShardIndex.model_validate(read_object(file)).weight_map.values())
    except ValidationError as err:
        raise ConfigError(
            f"{file} is not an index of weights: {explain(err)}",
            hint='it has "metadata", an object, and "weight_map", from tensors to files; '
            "download or write it again",
        ) from None
    for name in sorted(names):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UnsupportedModelError(
                f"{file} names the file {name!r}; only *.safetensors files in the same folder "
                "are read",
                hint="move the files beside the index and correct it, or download the model again",
            )
    return names


def read_headers(model: str, files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Find the tensors in the safetensors files of a checkpoint.

    Parameters
    ----------
    model : str
        Its name, for error messages.
    files : sequence of Path
        Its files.

    Raises
    ------
    ConfigError
        If a file is missing or broken, or a tensor is in two of them.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with loading(f"the file {file.name} of {model}"), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name in stored:
                    raise ConfigError(
                        f"{model}: the tensor {name} is in {file.name} and in another file too",
                        hint="the files are of different checkpoints: download or write them again",
                    )
                entry, read = opened.get_slice(name), partial(read_tensor, file, name)
                row = partial(_read_row, file, name)
                shape = tuple(entry.get_shape())
                stored[name] = StoredTensor(read, shape, entry.get_dtype(), read_row=row)
    return stored


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _read_row(file: Path, name: str, index: int) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_slice(name)[index]

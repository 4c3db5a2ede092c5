"""Read the weights of a checkpoint tensor by tensor, and write files the same way."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from slimgpt.errors import UnsupportedModelError
from slimgpt.model import LOAD_ERRORS, Source, cannot_load, incomplete, load_model

# Floating-point types by their names in a safetensors file.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weights:
    """The tensors of a model, read when they are asked for.

    Parameters
    ----------
    source : Source
        The model.
    tensors : dict
        For each name a function that reads the tensor, and the tensor's shape and type.
    dtype : torch.dtype
        What tensors are converted to.
    files : sequence of Path
        Where they come from.
    """

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, tuple[Callable[[], Tensor], Sequence[int], str]],
        dtype: torch.dtype,
        files: Sequence[Path],
    ) -> None:
        self.source, self.dtype = source, dtype
        self._tensors, self.files = dict(tensors), files

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names of all tensors, with their shapes."""
        return {name: tuple(shape) for name, (_, shape, _) in self._tensors.items()}

    def check(self, skeleton: PreTrainedModel) -> None:
        """Check that a model can be filled.

        Parameters
        ----------
        skeleton : PreTrainedModel
            The model without weights.

        Raises
        ------
        UnsupportedModelError
            If tensors are missing, have another shape or no floating-point type, or differ where
            the config says that they are one.
        """
        for name, origin in skeleton.all_tied_weights_keys.items():
            if name in self._tensors and origin not in self._tensors:
                self._tensors[origin] = self._tensors[name]
            elif name in self._tensors and not torch.equal(self.read(name), self.read(origin)):
                raise UnsupportedModelError(
                    f"{self.source.name}: the config ties {name} to {origin}, but they differ",
                    hint="set tie_word_embeddings to false in its config.json",
                )
        problems = []
        for name, parameter in saved_tensors(skeleton).items():
            _, shape, dtype = self._tensors.get(name, (None, None, "F32"))
            if shape is None or tuple(shape) != parameter.shape:
                problems.append(name)
            if dtype not in DTYPES:
                raise UnsupportedModelError(
                    f"{self.source.name}: the tensor {name} has the type {dtype}, not one of "
                    f"{', '.join(DTYPES)}",
                    hint="prune the original model, and quantise the result",
                )
        if problems:
            raise incomplete(self.source, problems)

    def add_biases(self, skeleton: PreTrainedModel) -> None:
        """Let the biases that a model has, and the checkpoint has not, be zero."""
        for name, parameter in saved_tensors(skeleton).items():
            if name.endswith(".bias") and name not in self._tensors:
                zeros = partial(torch.zeros, parameter.shape)
                self._tensors[name] = zeros, parameter.shape, "F32"

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Raises
        ------
        ConfigError
            If the file is broken.
        UnsupportedModelError
            If the tensor has values that are not finite.
        """
        try:
            tensor = self._tensors[name][0]().to(self.dtype)
        except LOAD_ERRORS as err:
            raise cannot_load(f"the tensor {name} of {self.source.name}", err) from err
        if not tensor.isfinite().all():
            raise UnsupportedModelError(
                f"{self.source.name}: the tensor {name} has values that are not finite",
                hint="the checkpoint is broken, or overflows in this --dtype",
            )
        return tensor


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a model less the tensors that are tied to others."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def weight_files(source: Source) -> list[Path]:
    """The files with the weights of a checkpoint, in the hub's cache if it is not local.

    Raises
    ------
    ConfigError
        If they are not there, or the hub cannot be reached.
    """
    if source.gguf_file:
        return [Path(source.location, source.gguf_file)]
    try:
        index = cached_file(
            source.location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False
        )
        if index:
            names = get_checkpoint_shard_files(source.location, index)[0] or []
        else:
            names = [cached_file(source.location, SAFE_WEIGHTS_NAME)]
    except LOAD_ERRORS as err:
        raise cannot_load(f"the weights of {source.name}", err) from err
    return [Path(str(name)) for name in names]


def open_weights(source: Source, config: PreTrainedConfig, dtype: str = "auto") -> Weights:
    """Find the tensors of a checkpoint; their values are read later.

    A GGUF file is the exception: transformers dequantises it as a whole, so it is held in memory.

    Parameters
    ----------
    source : Source
        From `find_model`.
    config : PreTrainedConfig
        Its config.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        ``auto`` is that of the checkpoint, float32 for GGUF.

    Raises
    ------
    ConfigError
        If a file is missing or broken, or the hub cannot be reached.
    """
    if source.gguf_file:
        model = load_model(source, dtype, "cpu")
        state = {
            name: (partial(torch.Tensor.detach, tensor), tensor.shape, "F32")
            for name, tensor in saved_tensors(model).items()
        }
        return Weights(source, state, model.dtype, weight_files(source))
    files = weight_files(source)
    tensors = {}
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    entry = shard.get_slice(name)
                    read = partial(read_tensor, file, name)
                    tensors[name] = read, entry.get_shape(), entry.get_dtype()
        except LOAD_ERRORS as err:
            raise cannot_load(f"the file {file.name} of {source.name}", err) from err
    target = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(target, torch.dtype):
        target = DTYPES.get(next(iter(tensors.values()))[2], torch.float32)
    return Weights(source, tensors, target, files)


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def read_metadata(file: Path) -> dict[str, str]:
    """What `write_file` was given for the header of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def write_file(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a safetensors file one tensor after the other.

    Parameters
    ----------
    file : Path
        Is overwritten.
    tensors : dict
        Names, shapes and types; the values too if `read` is not given.
    metadata : dict
        For the header.
    read : callable, optional
        Gives the values of a name, so that not more than one tensor need be in memory.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            values = tensors[name] if read is None else read(name)
            out.write(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)

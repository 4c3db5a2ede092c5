"""Read the weights of a checkpoint one tensor at a time, and write files in the same way."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from slimgpt.errors import UnsupportedModelError
from slimgpt.models.layout import decoder_name
from slimgpt.models.loading import load_model, read_stored, weight_files
from slimgpt.models.mapping import allocate
from slimgpt.models.matching import DTYPES, fit_tensors
from slimgpt.models.source import Source
from slimgpt.models.stored import StoredTensor, loading


class Weights:
    """The tensors of a model, read on demand.

    Parameters
    ----------
    source : Source
        The model.
    tensors : dict
        Tensors by name.
    dtype : torch.dtype
        Type to which tensors are converted.
    files : sequence of Path
        The weight files.
    """

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        files: Sequence[Path],
    ) -> None:
        self.source, self.dtype = source, dtype
        self._tensors, self.files = dict(tensors), files
        self._precise: set[str] = set()  # modules that stay in float32

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def check(self, skeleton: PreTrainedModel, adds_biases: bool = False) -> None:
        """Check that the tensors are exactly those of a model.

        Parameters
        ----------
        skeleton : PreTrainedModel
            The model without weights.
        adds_biases : bool
            Whether biases that the checkpoint lacks are zero.

        Raises
        ------
        UnsupportedModelError
            See `slimgpt.models.stored.fit_tensors`.
        """
        self._tensors = fit_tensors(self.source.name, self._tensors, skeleton, adds_biases)
        self._precise = set(skeleton._keep_in_fp32_modules_strict or ())

    def as_in_file(self, name: str, tensor: Tensor, skeleton: PreTrainedModel) -> dict[str, Tensor]:
        """Name a tensor as the checkpoint does, or split it as there.

        Parameters
        ----------
        name : str
            Its name in the model; transformers may rename or convert what it loads.
        tensor : Tensor
            A new value, perhaps of another shape.
        skeleton : PreTrainedModel
            The model.
        """
        if self._tensors[name].is_converted:
            return revert_weight_conversion(skeleton, {name: tensor})
        return {self._tensors[name].origin or name: tensor}

    def read(self, name: str, directory: Path | None = None) -> Tensor:
        """Read one tensor.

        Parameters
        ----------
        name : str
            Its name in the model.
        directory : Path, optional
            If given, the tensor goes to a memory-mapped file there, one index of its first axis at
            a time.

        Raises
        ------
        ConfigError
            If the file is broken.
        UnsupportedModelError
            If the tensor has non-finite values.
        """
        with loading(f"the tensor {name} of {self.source.name}"):
            stored = self._tensors[name]
            is_precise = not self._precise.isdisjoint(name.split("."))
            dtype = torch.float32 if is_precise else self.dtype
            if directory is None or stored.read_row is None:
                return self._finite(name, stored.read().to(dtype))
            tensor = allocate(stored.shape, dtype, directory)
            for index, row in enumerate(tensor):
                row.copy_(self._finite(name, stored.read_row(index).to(dtype)))
            return tensor

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.isfinite().all():
            raise UnsupportedModelError(
                f"{self.source.name}: the tensor {name} has values that are not finite",
                hint="the checkpoint is broken, or overflows in this --dtype",
            )
        return tensor


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state of a model without tensors that are tied to others."""
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def text_tensors(model: PreTrainedModel) -> list[str]:
    """List the saved tensors of the text decoder and of the head."""
    decoder, all_but_head = f"{decoder_name(model)}.", f"{model.base_model_prefix}."
    return [
        name
        for name in saved_tensors(model)
        if name.startswith(decoder) or not name.startswith(all_but_head)
    ]


def result_dtype(source: Source, config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """Precision of the weights that a pruning run writes, for a value of the option ``dtype``."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if source.gguf_file:
        return torch.float32
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return open_weights(source, config).dtype


def open_weights(source: Source, config: PreTrainedConfig, dtype: str = "auto") -> Weights:
    """Find the tensors of a checkpoint; values are read later.

    The exception is a GGUF file: transformers dequantises it as a whole, so it stays in memory.

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
            name: StoredTensor(partial(torch.Tensor.detach, tensor), tuple(tensor.shape), "F32")
            for name, tensor in saved_tensors(model).items()
        }
        return Weights(source, state, model.dtype, weight_files(source))
    tensors = read_stored(source, config)
    target = config.dtype if dtype == "auto" else getattr(torch, dtype)
    if not isinstance(target, torch.dtype):
        target = DTYPES[next(iter(tensors.values())).dtype]
    return Weights(source, tensors, target, weight_files(source))


def tensor_names(file: Path) -> list[str]:
    """List the names of the tensors in a safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata in the header of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def write_file(
    file: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write a safetensors file one tensor at a time.

    Parameters
    ----------
    file : Path
        The file; overwritten if it exists.
    tensors : dict
        Names, shapes and types; also the values if `read` is not given.
    metadata : dict
        Metadata in the header.
    read : callable, optional
        Returns the values for a name, so that only one tensor at a time is in memory.
    """
    with file.open("wb") as out:
        out.write(_header(tensors, metadata))
        for name in tensors:
            values = tensors[name] if read is None else read(name)
            out.write(values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Size of the file that `write_file` writes."""
    return len(_header(tensors, metadata)) + sum(tensor.nbytes for tensor in tensors.values())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What comes before the values in a safetensors file."""
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
    return len(text).to_bytes(8, "little") + text

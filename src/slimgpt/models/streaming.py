"""A model that holds one block in memory at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.models.blocks import Block, bind, blocks_of, decoder_of
from slimgpt.models.device import autocast
from slimgpt.models.layout import decoder_name, family_in
from slimgpt.models.loading import build_skeleton
from slimgpt.models.weights import Weights, saved_tensors, text_tensors
from slimgpt.runtime.environment import trim_heap


class BlockStandIn(nn.Module):
    """Takes the place of a block: returns given hidden states in the form in which blocks do."""

    hidden: Tensor

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Return the given hidden states."""
        return (self.hidden,) if self._returns_tuple else self.hidden


class StreamedModel:
    """A skeleton that gets the weights of one part of the model at a time.

    Parameters
    ----------
    skeleton : PreTrainedModel
        The model with its parameters on the meta device.
    weights : Weights
        The checkpoint to read from; its tensors have been checked.
    device : torch.device
        Device of the loaded part.
    directory : Path, optional
        If given, the weights of the experts of a block are in memory-mapped files there.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        weights: Weights,
        device: torch.device,
        directory: Path | None = None,
    ) -> None:
        self.skeleton, self.weights, self.device = skeleton, weights, device
        self.directory = directory

    @contextmanager
    def whole(self, dtype: torch.dtype | None = None) -> Iterator[PreTrainedModel]:
        """Load all weights, in this type, for the duration of the context."""
        with self._holding(
            list(saved_tensors(self.skeleton)), dtype or self.weights.dtype
        ) as model:
            yield model

    @contextmanager
    def _holding(self, names: Iterable[str], dtype: torch.dtype) -> Iterator[PreTrainedModel]:
        self._fill(self.skeleton, {name: self.weights.read(name).to(dtype) for name in names})
        self.skeleton.tie_weights()
        try:
            yield self.skeleton
        finally:
            self._release(self.skeleton)
            self.skeleton.tie_weights()

    @contextmanager
    def after_blocks(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Load the model without its blocks and without what surrounds the text model.

        Yields
        ------
        callable
            Computes the logits (tokens, vocabulary) of a sample from its hidden states after the
            last block (tokens, hidden size).
        """
        decoder, blocks = decoder_of(self.skeleton), blocks_of(self.skeleton)
        family = family_in(self.skeleton.config)
        last = BlockStandIn(family.returns_tuple)
        decoder.set_submodule(family.blocks, nn.ModuleList([last]))

        def logits(hidden_TC: Tensor) -> Tensor:
            last.hidden = hidden_TC[None].to(self.device)
            tokens = torch.zeros(1, len(hidden_TC), dtype=torch.int64, device=self.device)
            with autocast(next(decoder.parameters())):
                return model(tokens, use_cache=False).logits[0]

        try:
            with self._holding(text_tensors(self.skeleton), self.weights.dtype) as model:
                yield logits
        finally:
            decoder.set_submodule(family.blocks, blocks)

    def anew(self) -> "StreamedModel":
        """Create a copy with a skeleton of its own."""
        skeleton = build_skeleton(self.skeleton.config, self.weights.dtype)
        return StreamedModel(skeleton, self.weights, self.device, self.directory)

    @contextmanager
    def around_blocks(self) -> Iterator[PreTrainedModel]:
        """Load the weights of the decoder except those of the blocks."""
        decoder, family = decoder_of(self.skeleton), family_in(self.skeleton.config)
        names = [name for name, _ in decoder.named_parameters()]
        others = [name for name in names if not name.startswith(f"{family.blocks}.")]
        self._fill(decoder, self._read(decoder_name(self.skeleton), others))
        try:
            yield self.skeleton
        finally:
            self._release(decoder)

    def blocks(self, indices: Iterable[int] | None = None) -> Iterator[Block]:
        """Yield all or some blocks in this order, each with its weights until the next one.

        For a GPU, the next block is read into pinned memory meanwhile, and copied from there on a
        stream of its own.
        """
        blocks = list(bind(self.skeleton, self.directory))
        if indices is not None:
            blocks = [blocks[index] for index in indices]
        copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for block, following in zip_longest(blocks, blocks[1:]):
                ahead = ahead or reader.submit(self._read_block, block, copying)
                tensors, ahead = ahead.result(), None
                if copying:
                    _take_over(tensors.values(), copying)
                    if following:
                        ahead = reader.submit(self._read_block, following, copying)
                self._fill(block.module, tensors)
                del tensors
                yield block
                self._release(block.module)
                trim_heap()

    def _read_block(self, block: Block, copying: torch.cuda.Stream | None) -> dict[str, Tensor]:
        with torch.cuda.stream(copying):
            return self._moved(self._read(block.name, block.module.state_dict()))

    def _read(self, prefix: str, names: Iterable[str]) -> dict[str, Tensor]:
        tensors, shapes = {}, self.weights.shapes
        for name in names:
            is_mapped = self._is_mapped(shapes[f"{prefix}.{name}"])
            tensor = self.weights.read(f"{prefix}.{name}", self.directory if is_mapped else None)
            pins = self.device.type == "cuda" and not is_mapped
            tensors[name] = tensor.pin_memory() if pins else tensor
        return tensors

    def _is_mapped(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape, the weights of all experts, is in a mapped file."""
        return self.directory is not None and len(shape) == 3

    def _fill(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        module.load_state_dict(self._moved(tensors), strict=False, assign=True)
        for child in module.modules():  # computed ones, which no file has
            for name, buffer in child.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(child, name, buffer.to(self.device))

    def _moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy to the device what is not there or in a mapped file, on the current stream."""
        # Only pinned memory may be released before the copy has finished.
        pinned = self.device.type == "cuda"
        return {
            name: t if self._is_mapped(t.shape) else t.to(self.device, non_blocking=pinned)
            for name, t in tensors.items()
        }

    def _release(self, module: nn.Module) -> None:
        """Move the parameters back to the meta device; buffers keep their values."""
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                empty = parameter.to("meta", self.weights.dtype)
                setattr(child, name, nn.Parameter(empty, requires_grad=False))


def _take_over(tensors: Iterable[Tensor], copying: torch.cuda.Stream) -> None:
    """Let the current stream wait for copies on another one; it owns what they have written."""
    current = torch.cuda.current_stream(copying.device)
    current.wait_stream(copying)
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(current)  # until it is released there

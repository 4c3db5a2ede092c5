"""Run the blocks of a model on the calibration samples, one sublayer at a time.

A sublayer runs once, with its output projection replaced by the identity, so that it returns the
input of that projection. These activations give both the statistics and, after pruning, the
sublayer's output. A sequential pass costs one forward pass through each block, and a second one for
the dense stream, if there is one.

Shape suffixes: ``N`` samples, ``T`` tokens per sample, ``C`` hidden size, ``I`` columns of the
output projection, ``O`` its rows (``O`` = ``C``).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.models.blocks import Block, blocks_of, decoder_of
from slimgpt.models.device import autocast, exact_products, sums_device
from slimgpt.models.experts import Experts
from slimgpt.models.layout import family_in
from slimgpt.models.mapping import allocate
from slimgpt.models.streaming import BlockStandIn
from slimgpt.models.sublayers import Projection, Sublayer
from slimgpt.runtime import distributed

TOKENS_PER_BATCH, MIN_BATCHES = 4096, 8

PANEL_SIZE = 256  # of the symmetric products, of which only the upper half is computed
GPU_PANEL_SIZE = 1024  # enough tiles for all of its multiprocessors


class Recorder(BlockStandIn):
    """Takes the place of a block: returns the hidden states and records its arguments by name."""

    def __init__(self, block: nn.Module, returns_tuple: bool) -> None:
        super().__init__(returns_tuple)
        self._signature = inspect.signature(block.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Record the arguments."""
        (_, self.hidden), *others = self._signature.bind(*args, **kwargs).arguments.items()
        self.kwargs: dict[str, Any] = dict(others)
        self.kwargs |= self.kwargs.pop("kwargs", {})
        return super().forward()


@dataclass
class Stream:
    """The residual stream of the samples before the next sublayer.

    Attributes
    ----------
    hidden_NTC : Tensor
        In the model's dtype, in the memory of the GPU or the host, or in a memory-mapped file.
    dense_NTC : Tensor or None
        The same for the dense model, if inherited errors are corrected.
    batch_size : int
        Samples per forward pass of a sublayer.
    kwargs : list of dict
        Arguments of each block beside the hidden states (positions, mask); they are the same for
        every sample.
    input_NTC, dense_input_NTC : Tensor or None
        Copies of both at the start of the block, in models whose sublayers all read that.
    """

    hidden_NTC: Tensor
    dense_NTC: Tensor | None
    batch_size: int
    kwargs: list[dict[str, Any]]
    input_NTC: Tensor | None = None
    dense_input_NTC: Tensor | None = None

    def enter(self, block: Block) -> None:
        """Prepare for the first sublayer of a block."""
        for copy, original in (
            (self.input_NTC, self.hidden_NTC),
            (self.dense_input_NTC, self.dense_NTC),
        ):
            if block.is_parallel and copy is not None and original is not None:
                copy.copy_(original)

    def batches(self) -> tuple[Tensor, ...]:
        """Split the stream into batches, which are views."""
        return self.hidden_NTC.split(self.batch_size)

    @property
    def source(self) -> Tensor:
        """What the next sublayer reads."""
        return self.hidden_NTC if self.input_NTC is None else self.input_NTC

    def inputs(self) -> tuple[Tensor, ...]:
        """Split what the next sublayer reads in the same way."""
        return self.source.split(self.batch_size)

    def dense(self) -> "Stream | None":
        """The dense model's stream by itself, if there is one."""
        if self.dense_NTC is None:
            return None
        return Stream(self.dense_NTC, None, self.batch_size, self.kwargs, self.dense_input_NTC)


def choose_batch_size(num_samples: int, seqlen: int) -> int:
    """Choose the samples per batch: a few thousand tokens, but several batches to distribute."""
    return max(1, min(TOKENS_PER_BATCH // seqlen, num_samples // MIN_BATCHES))


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    samples_NT: Tensor,
    batch_size: int,
    with_dense: bool = False,
    place: Path | torch.device | None = None,
) -> Stream:
    """Compute the input of the first block.

    Parameters
    ----------
    model : PreTrainedModel
        A model of a supported family; its blocks are not run.
    samples_NT : Tensor
        int64, calibration tokens.
    batch_size : int
        From `choose_batch_size`.
    with_dense : bool
        Whether to keep a second stream for the dense model.
    place : Path or torch.device, optional
        Where the stream is: in the memory of a device, or in a memory-mapped file in a directory,
        which is unlinked at once, so that nothing remains however the process ends. Default: in
        host memory.

    Raises
    ------
    OSError
        If there is not enough space for the file.
    """
    decoder, blocks = decoder_of(model), blocks_of(model)
    family, config = family_in(model.config), model.config.get_text_config()
    device = next(model.get_input_embeddings().parameters()).device
    directory, memory = (place, None) if isinstance(place, Path) else (None, place)
    shape = (*samples_NT.shape, config.hidden_size)
    new_stream = partial(allocate, shape, model.dtype, directory, memory)
    hidden_NTC = new_stream()
    recorders = [Recorder(block, family.returns_tuple) for block in blocks]
    name = family.blocks
    decoder.set_submodule(name, nn.ModuleList(recorders))
    try:
        for hidden_TC, sample_T in zip(hidden_NTC, samples_NT, strict=True):
            decoder(sample_T[None].to(device), use_cache=False)
            hidden_TC.copy_(recorders[0].hidden[0])
    finally:
        decoder.set_submodule(name, blocks)
    stream = Stream(hidden_NTC, None, batch_size, [recorder.kwargs for recorder in recorders])
    is_parallel = family.is_parallel(config)
    if is_parallel:
        stream.input_NTC = new_stream()
    if with_dense:
        stream.dense_NTC = new_stream().copy_(hidden_NTC)
        stream.dense_input_NTC = new_stream() if is_parallel else None
    return stream


def run_sublayer(sublayer: Sublayer, stream: Stream, hidden_NTC: Tensor) -> Tensor:
    """Compute the input of a sublayer's output projection.

    Parameters
    ----------
    sublayer : Sublayer
        What to run.
    stream : Stream
        Has the other arguments of the block.
    hidden_NTC : Tensor
        One batch of the sublayer's input, before the norm.

    Returns
    -------
    Tensor
        batch_NTI, on the device of the block.
    """
    with autocast(sublayer.weight):
        normed_NTC = sublayer.normed(hidden_NTC.to(sublayer.weight.device))
    return output_input(sublayer, normed_NTC, stream.kwargs[sublayer.block])


def output_input(
    sublayer: Sublayer, normed: Tensor, kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """Compute the input of the output projection from that of the sublayer, after the norm."""
    name, projection = sublayer.spec.output, sublayer.output
    sublayer.module.set_submodule(name, nn.Identity())
    try:
        with autocast(projection.weight):
            return sublayer.forward(normed, kwargs)
    finally:
        sublayer.module.set_submodule(name, projection.module)


@dataclass
class Activations:
    """Inputs of a sublayer's output projection.

    Attributes
    ----------
    hessian_II : Tensor
        E[x xᵀ] over the tokens of all processes, float64 (on the CPU if the device does not support
        it), accumulated from float32 sums per batch.
    mean_I : Tensor
        E[x], in the same type.
    kept : list of Tensor
        The activations of the first batches, as many as fit into the budget.
    cross_OI : Tensor or None
        E[(t − b) xᵀ], where b is the bias of the output projection, and t its target: what moves
        the stream to where the dense model's stream is after the sublayer. None without a dense
        stream. A norm after the sublayer makes the stream depend on the output in a way that is
        not linear; t is then the dense model's output before that norm.
    target_O : Tensor or None
        E[t − b].
    correction : float or None
        How far the output is to move toward its target, 0 to 1; None for what the options say.
    """

    hessian_II: Tensor
    mean_I: Tensor
    kept: list[Tensor]
    cross_OI: Tensor | None = None
    target_O: Tensor | None = None
    correction: float | None = None

    def take_sums(self) -> tuple[Tensor, Tensor | None]:
        """Give `hessian_II` and `cross_OI` away, so that whoever has them can free them."""
        taken = self.hessian_II, self.cross_OI
        del self.hessian_II, self.cross_OI
        return taken


@torch.no_grad()
def collect(
    sublayer: Sublayer, stream: Stream, budget: int, dense_is_ahead: bool = False
) -> Activations:
    """Run a sublayer up to its output projection, and gather the statistics.

    Parameters
    ----------
    sublayer : Sublayer
        What to run.
    stream : Stream
        The residual stream before the sublayer. The dense model's stream moves on past it.
    budget : int
        Maximum bytes of activations to keep.
    dense_is_ahead : bool
        Whether the dense model's stream is already where the output is to move the stream to.
    """
    kept: list[Tensor] = []
    sums = Sums(sublayer.output, has_target=stream.dense_NTC is not None)
    found = (_distances if dense_is_ahead else targets)(sublayer, stream)
    for input_NTC, target_NTC in zip_longest(stream.inputs(), found):
        batch_NTI = run_sublayer(sublayer, stream, input_NTC)
        target_TO = None
        if target_NTC is not None:
            target_TO = target_NTC.flatten(0, 1).to(batch_NTI.device, torch.float32)
            if sublayer.output.bias is not None:
                target_TO -= sublayer.output.bias
        sums.add(batch_NTI.flatten(0, 1), target_TO)
        budget -= batch_NTI.nbytes
        if budget >= 0:
            kept.append(batch_NTI)
    return sums.average(kept)


class Sums:
    """Sums over the tokens of this process, of which `Activations` are the averages.

    Parameters
    ----------
    output : Projection
        The output projection, for its shape and device.
    has_target : bool
        Whether the output has a target.
    """

    def __init__(self, output: Projection, has_target: bool) -> None:
        size, device = output.in_features, sums_device(output.weight.device)
        self._total_II = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._sum_I = self._total_II.new_zeros(size)
        self.num_tokens = self._total_II.new_zeros(())
        self._cross_OI = self._target_O = None
        if has_target:
            self._target_O = self._total_II.new_zeros(output.out_features)
            self._cross_OI = self._total_II.new_zeros(output.out_features, size)
        panel = GPU_PANEL_SIZE if device.type == "cuda" else PANEL_SIZE
        self._panels = [(start, min(start + panel, size)) for start in range(0, size, panel)]

    def add(self, batch_TI: Tensor, target_TO: Tensor | None = None) -> None:
        """Add inputs of the output projection, with their targets in float32 if there are any."""
        rows_TI, device = batch_TI.float(), self._total_II.device
        with exact_products(batch_TI):
            for start, stop in self._panels:
                product = rows_TI[:, start:stop].T @ rows_TI[:, start:]
                self._total_II[start:stop, start:] += product.to(device)
        if self._cross_OI is not None and self._target_O is not None and target_TO is not None:
            # TF32 rounds the targets to 11 bits, without bias. On a CPU, bfloat16 is too coarse.
            with exact_products(batch_TI) if batch_TI.is_cuda else nullcontext():
                product = target_TO.T @ rows_TI
            self._cross_OI += product.to(device)
            self._target_O += target_TO.sum(dim=0).to(device)
        self._sum_I += rows_TI.sum(dim=0).to(device)
        self.num_tokens += len(rows_TI)

    def average(self, kept: list[Tensor], num_tokens: Tensor | None = None) -> Activations:
        """Average over the tokens of all processes; afterwards the sums are used up.

        Parameters
        ----------
        kept : list of Tensor
            See `Activations`.
        num_tokens : Tensor, optional
            Divide by this number, if not by that of the added tokens.
        """
        total_II = self._total_II
        for start, stop in self._panels:
            total_II[stop:, start:stop] = total_II[start:stop, stop:].T
        distributed.all_reduce(self.num_tokens)
        number = self.num_tokens if num_tokens is None else num_tokens
        hessian_II = distributed.all_reduce(total_II).div_(number)
        mean_I = distributed.all_reduce(self._sum_I).div_(number)
        if self._cross_OI is not None and self._target_O is not None:
            distributed.all_reduce(self._cross_OI).div_(number)
            distributed.all_reduce(self._target_O).div_(number)
        return Activations(hessian_II, mean_I, kept, self._cross_OI, self._target_O)


@torch.no_grad()
def propagate(
    sublayer: Sublayer,
    stream: Stream,
    columns: Tensor,
    weight: Tensor,
    kept: Sequence[Tensor] = (),
) -> None:
    """Add the output of the pruned sublayer to the residual stream, in place.

    Parameters
    ----------
    sublayer : Sublayer
        It must still be as it was.
    stream : Stream
        The residual stream before the sublayer; on return, the one after it.
    columns : Tensor
        The columns of the activations that are kept, sorted.
    weight : Tensor
        (out features, columns), the new weight of the output projection, in the model's dtype.
    kept : sequence of Tensor
        Activations from `collect`; the missing ones are computed again.
    """
    batches = zip_longest(stream.inputs(), stream.batches(), kept)
    for input_NTC, hidden_NTC, known_NTI in batches:
        batch_NTI = known_NTI
        if batch_NTI is None:
            batch_NTI = run_sublayer(sublayer, stream, input_NTC)
        with autocast(weight):
            output = nn.functional.linear(batch_NTI[..., columns], weight, sublayer.output.bias)
            hidden_NTC.add_(sublayer.contribution(output).to(hidden_NTC.device))


def pass_through(sublayer: Sublayer, stream: Stream | None) -> None:
    """Add the output of the sublayer as it is to a residual stream, if there is one, in place."""
    if stream is not None:
        for _ in _outputs(sublayer, stream):
            pass


def pass_block(block: Block, stream: Stream) -> None:
    """Move a residual stream past a block as it is, in place."""
    stream.enter(block)
    for sublayer in block.sublayers:
        pass_through(sublayer, stream)


@torch.no_grad()
def _outputs(sublayer: Sublayer, stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
    """Move a residual stream past a sublayer; yield each batch of its output, and of the stream."""
    for input_NTC, hidden_NTC in zip(stream.inputs(), stream.batches(), strict=True):
        output_NTO = _output(sublayer, stream, input_NTC)
        with autocast(sublayer.weight):
            hidden_NTC.add_(sublayer.contribution(output_NTO).to(hidden_NTC.device))
        yield output_NTO, hidden_NTC


def _output(sublayer: Sublayer, stream: Stream, input_NTC: Tensor) -> Tensor:
    if isinstance(sublayer, Experts):
        return sublayer.forward(sublayer.normed(input_NTC.to(sublayer.weight.device)))
    batch_NTI = run_sublayer(sublayer, stream, input_NTC)
    with autocast(sublayer.weight):
        return sublayer.output.module(batch_NTI)


def targets(sublayer: Sublayer, stream: Stream) -> Iterator[Tensor]:
    """Target of the output projection for each batch, see `Activations`; none without a dense one.

    The dense model's stream moves on past the sublayer.
    """
    dense = stream.dense()
    if dense is None:
        return
    outputs = zip(_outputs(sublayer, dense), stream.batches(), strict=True)
    for (output_NTO, dense_NTC), hidden_NTC in outputs:
        if sublayer.post_norm is not None:
            yield output_NTO.float()
        else:
            yield _distance(sublayer, dense_NTC, hidden_NTC)


def _distances(sublayer: Sublayer, stream: Stream) -> Iterator[Tensor]:
    """What the output lacks, for each batch, to bring the stream to the dense model's."""
    assert stream.dense_NTC is not None
    dense = stream.dense_NTC.split(stream.batch_size)
    for dense_NTC, hidden_NTC in zip(dense, stream.batches(), strict=True):
        yield _distance(sublayer, dense_NTC, hidden_NTC)


def _distance(sublayer: Sublayer, dense_NTC: Tensor, hidden_NTC: Tensor) -> Tensor:
    device = sublayer.weight.device
    distance_NTC = dense_NTC.to(device).float() - hidden_NTC.to(device).float()
    return distance_NTC if sublayer.multiplier == 1 else distance_NTC / sublayer.multiplier

"""Run the blocks of a model over the calibration samples, one sublayer at a time.

A sublayer is run once. Its output projection is taken out for the time of the run, so that what
it returns is the input of that projection; the statistics and, after pruning, the sublayer's
output both come from these activations. A whole run costs one forward through each block.

Shape suffixes: ``N`` samples, ``T`` tokens of a sample, ``I`` columns of the output projection.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.families import Block, Sublayer, blocks_of, decoder_of, family_of

TOKENS_PER_BATCH = 4096


class Recorder(nn.Module):
    """Stands in for a block: passes the hidden states on and keeps the other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Record the arguments."""
        self.hidden, self.kwargs = hidden, kwargs
        return hidden


@dataclass
class Stream:
    """The residual stream of all samples at the entry of the next sublayer.

    Attributes
    ----------
    hidden : list of Tensor
        Batches (samples, seqlen, hidden_size), in the model's dtype.
    kwargs : list of dict
        For each block the arguments it gets beside the hidden states (positions, mask); they are
        the same for every sample.
    """

    hidden: list[Tensor]
    kwargs: list[dict[str, Any]]


@torch.no_grad()
def embed(model: PreTrainedModel, samples: Tensor) -> Stream:
    """Compute what enters the first block.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a supported family.
    samples : Tensor
        int64, (nsamples, seqlen).
    """
    decoder, blocks = decoder_of(model), blocks_of(model)
    recorders = [Recorder() for _ in blocks]
    name = family_of(model.config.model_type).blocks
    decoder.set_submodule(name, nn.ModuleList(recorders))
    try:
        hidden = []
        for sample in samples.to(model.device):
            decoder(sample[None], use_cache=False)
            hidden.append(recorders[0].hidden)
    finally:
        decoder.set_submodule(name, blocks)
    batch_size = max(1, TOKENS_PER_BATCH // samples.shape[1])
    batches = [torch.cat(hidden[i : i + batch_size]) for i in range(0, len(hidden), batch_size)]
    return Stream(batches, [recorder.kwargs for recorder in recorders])


def run_sublayer(block: Block, sublayer: Sublayer, stream: Stream, hidden: Tensor) -> Tensor:
    """Compute the input of a sublayer's output projection.

    Parameters
    ----------
    block, sublayer
        What to run.
    stream : Stream
        Where the other arguments of the block are.
    hidden : Tensor
        One batch of the residual stream, (samples, seqlen, hidden_size).

    Returns
    -------
    Tensor
        (samples, seqlen, columns).
    """
    kwargs = stream.kwargs[block.index] if sublayer.kind == "attention" else {}
    name, projection = sublayer.spec.output, sublayer.output
    sublayer.module.set_submodule(name, nn.Identity())
    try:
        result = sublayer.module(sublayer.norm(hidden), **kwargs)
    finally:
        sublayer.module.set_submodule(name, projection)
    return result[0] if isinstance(result, tuple) else result


class Activations:
    """Inputs of a sublayer's output projection, and their second moment.

    Parameters
    ----------
    block, sublayer
        What to run.
    stream : Stream
        The residual stream before the sublayer.
    budget : int
        Bytes of activations to keep; a batch beyond it is computed again when it is needed.

    Attributes
    ----------
    hessian_II : Tensor
        E[x xᵀ] over all tokens, float64 (on the CPU where the device has no such type),
        accumulated from float32 products of one batch each.
    """

    @torch.no_grad()
    def __init__(self, block: Block, sublayer: Sublayer, stream: Stream, budget: int) -> None:
        self._block, self._sublayer = block, sublayer
        self._kept: list[Tensor | None] = []
        size = sublayer.output.in_features
        device = stream.hidden[0].device
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        total_II = torch.zeros(size, size, dtype=torch.float64, device=device)
        num_tokens = 0
        for hidden in stream.hidden:
            batch_NTI = run_sublayer(block, sublayer, stream, hidden)
            rows_TI = batch_NTI.flatten(0, 1).float()
            total_II += (rows_TI.T @ rows_TI).to(device)
            num_tokens += len(rows_TI)
            budget -= batch_NTI.nbytes
            self._kept.append(batch_NTI if budget >= 0 else None)
        self.hessian_II = total_II / num_tokens

    def batches(self, stream: Stream) -> Iterator[Tensor]:
        """Yield the activations again, batch by batch; the sublayer must not have changed."""
        for batch_NTI, hidden in zip(self._kept, stream.hidden, strict=True):
            if batch_NTI is None:
                yield run_sublayer(self._block, self._sublayer, stream, hidden)
            else:
                yield batch_NTI


@torch.no_grad()
def propagate(
    stream: Stream, activations: Activations, columns: Tensor, weight: Tensor, bias: Tensor | None
) -> None:
    """Add the output of the sublayer as it will be to the residual stream, in place.

    Parameters
    ----------
    stream : Stream
        The residual stream before the sublayer; afterwards the one after it.
    activations : Activations
        Of the sublayer, which must still be as it was.
    columns : Tensor
        The columns of the activations that stay, sorted.
    weight : Tensor
        (out features, columns), the new weight of the output projection, in the model's dtype.
    bias : Tensor or None
        Its bias.
    """
    for hidden, batch_NTI in zip(stream.hidden, activations.batches(stream), strict=True):
        hidden.add_(nn.functional.linear(batch_NTI[..., columns], weight, bias))


@torch.no_grad()
def pass_through(block: Block, sublayer: Sublayer, stream: Stream) -> None:
    """Add the output of a sublayer that stays as it is to the residual stream, in place."""
    for hidden in stream.hidden:
        hidden.add_(sublayer.output(run_sublayer(block, sublayer, stream, hidden)))

"""Estimate the memory of a run from its inputs, and check it in every process."""

from collections.abc import Sequence

import torch

from slimgpt.allocation.reallocation import PROBE_TOKENS
from slimgpt.allocation.shapes import BlockWidths
from slimgpt.calibration.activations import TOKENS_PER_BATCH, choose_batch_size
from slimgpt.data.datasets import PYDOCS, SELF
from slimgpt.data.samples import READING_BYTES
from slimgpt.errors import ConfigError
from slimgpt.models.blocks import bind
from slimgpt.models.experts import Experts
from slimgpt.models.sublayers import Sublayer
from slimgpt.pruning.depth import choice_bytes
from slimgpt.pruning.job import Inputs
from slimgpt.pruning.memory import (
    FLOAT32,
    MemoryEstimate,
    free_gpu_memory,
    place_activations,
    probe_bytes,
    refit_bytes,
    solver_bytes,
)
from slimgpt.pruning.plan import is_measured
from slimgpt.runtime.distributed import gather, shard
from slimgpt.runtime.run_directory import Run

SCORE = 4 * FLOAT32  # an attention score and its weight, with their gradients

READ_AHEAD = 2  # blocks in host memory beside a GPU: one is read, the other is pinned


def check_memory(estimate: MemoryEstimate, run: Run) -> None:
    """Check each process's estimate against its machine and GPU.

    Raises
    ------
    ConfigError
        In all processes, if one of them has too little memory or disk.
    """
    refusal = None
    try:
        estimate.check(run.output, run.size)
    except ConfigError as err:
        refusal = err
    for err in filter(None, gather(refusal)):
        raise err


def estimate_memory(inputs: Inputs, widths: Sequence[BlockWidths]) -> MemoryEstimate:
    """Estimate the peak memory and the disk space of a run."""
    config, method, skeleton = inputs.config, inputs.method, inputs.streamed.skeleton
    measures = is_measured(inputs.shapes, widths, inputs.seqlen, config)
    batch_size = choose_batch_size(config.nsamples, inputs.seqlen)
    num_own = len(shard(torch.arange(config.nsamples), batch_size))
    size = skeleton.dtype.itemsize
    blocks, solvers, num_removed = list(bind(skeleton)), [], 0
    sublayers = [
        (sublayer, width)
        for block, block_widths in zip(blocks, widths, strict=True)
        for sublayer, width in zip(block.sublayers, block_widths, strict=True)
    ]
    tokens, widest = num_own * inputs.seqlen, 0
    for sublayer, width in sublayers:
        shape = sublayer.shape
        whole, kept = shape.params, shape.kept_params(width)
        num_removed += whole - kept
        if isinstance(sublayer, Experts):
            _, num_out, num_in = sublayer.weights.down_proj.shape
            # The rest of the target for all tokens, and the input of an expert that has them all.
            held = tokens * (num_out + num_in) * FLOAT32
            solvers.append(solver_bytes(num_out, num_in, num_in, True, False) + held)
            continue
        output = sublayer.output
        widest = max(widest, output.in_features)
        columns = output.in_features - sublayer.num_columns(width)
        if measures:  # and further ones
            columns = 2 * (output.in_features if shape.kind == "attention" else columns)
        sizes, has_bias = (output.out_features, output.in_features), output.bias is not None
        solvers.append(solver_bytes(*sizes, columns, method.needs_dense, has_bias))
        if method.refit_epochs and shape.kind == "ffn" and kept < whole:
            solvers.append(refit_bytes(whole, kept, size))
    activation = tokens * size
    stream = (
        activation
        * skeleton.config.get_text_config().hidden_size
        * (2 if method.needs_dense else 1)
    )
    if blocks[0].is_parallel:
        stream *= 2
    experts = [size * sub.shape.params for sub, _ in sublayers if isinstance(sub, Experts)]
    mapped = max(experts, default=0)
    if mapped <= config.activation_memory:
        mapped = 0
    held = [[(_held(sub, mapped > 0), sub.shape.params) for sub in b.sublayers] for b in blocks]
    # A dropped one is beside the one before it.
    copies = 2 if config.drop_layers else 1
    block = copies * max(sum(now for now, _ in parts) for parts in held)
    device, room = inputs.streamed.device, None
    others, on_host = _other_phases(inputs, measures)
    if device.type == "cuda":
        ahead = copies * max(sum(map(min, parts)) for parts in held)
        working = max((block + ahead) * size + max(solvers), others)
        room = free_gpu_memory(device)[0] - working
    else:
        working = max(block * size + max(solvers), others, on_host)
    return MemoryEstimate(
        stream,
        place_activations(stream, activation * widest, config.activation_memory, room),
        working,
        result=(skeleton.num_parameters() - num_removed) * size,
        device=device,
        mapped_experts=mapped,
        beside=max(READ_AHEAD * block * size, on_host),
    )


def _other_phases(inputs: Inputs, measures: bool) -> tuple[int, int]:
    """Bytes that phases outside the blocks need on the device, and on the host."""
    config, skeleton = inputs.config, inputs.streamed.skeleton
    size, num_params = skeleton.dtype.itemsize, skeleton.num_parameters()
    phases = [next(skeleton.get_input_embeddings().parameters()).numel() * size]
    if measures:
        phases.append(probe_bytes(skeleton, config.nsamples, inputs.seqlen))
    if config.drop_layers:
        phases.append(choice_bytes(skeleton, config.nsamples, inputs.seqlen))
    on_host = max(phases)  # a part of each
    if not {SELF, PYDOCS}.issuperset(config.sources):
        on_host = max(on_host, READING_BYTES)
    if measures and inputs.streamed.device.type == "cuda":
        # Of a batch of the gradient pass, see `repeatable_attention`.
        num_heads = skeleton.config.get_text_config().num_attention_heads
        num_scores = TOKENS_PER_BATCH * min(inputs.seqlen, PROBE_TOKENS) * num_heads
        phases.append(probe_bytes(skeleton, config.nsamples, inputs.seqlen) + num_scores * SCORE)
    if SELF in config.calibration:
        phases.append(num_params * size)
    if inputs.method.needs_gradients:
        phases.append(2 * num_params * FLOAT32)
    return max(phases), on_host


def _held(sublayer: Sublayer, is_mapped: bool) -> int:
    """Parameters of a sublayer in memory at once: of mapped experts one, else all twice."""
    params = sublayer.shape.params
    if isinstance(sublayer, Experts):
        return params // sublayer.num_units if is_mapped else 2 * params
    return params if sublayer.spec.widths else 0

"""Refit: fine-tune all weights of a pruned FFN toward its target output.

The solver updates only the output projection, where least squares has a closed form. The input
projections can compensate for removed channels too, but without a closed form. The refit therefore
minimises the same squared error by gradient descent over all projections, one FFN at a time, on
the calibration tokens.

Shape suffixes: ``N`` samples, ``T`` tokens, ``C`` hidden size.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from slimgpt.calibration.activations import Stream
from slimgpt.config import PruneConfig
from slimgpt.models.device import autocast, fast_dtype
from slimgpt.models.sublayers import Sublayer
from slimgpt.runtime.distributed import all_reduce, shard_batches

STEP_TOKENS, CHUNK_TOKENS = 512, 4096

RATE = 0.015  # of the root mean square of a weight; falls to 0

WARM_UP = 8  # steps

BETAS, EPSILON = (0.9, 0.95), 1e-16  # the scale of the gradients is arbitrary


@torch.enable_grad()
def refit(
    ffn: Sublayer,
    dense: Sublayer,
    stream: Stream,
    config: PruneConfig,
    correction: float | None = None,
) -> float:
    """Fine-tune all weights of a pruned FFN toward its target output, with Adam.

    The target is (1 − α) y + α (h* − h), as in `slimgpt.solver.hessian.prepare`: α is `correction`,
    by default that of the options, y what the dense FFN adds to the residual stream, h the stream
    before it, h* the dense model's stream after it, or after the dropped blocks that follow. A norm
    after the FFN is part of what is fitted. Each step draws its tokens from the samples of all
    processes. If the error on a sample of up to 4,096 calibration tokens does not fall, the
    solver's weights are kept.
    """
    correction = config.correction if correction is None else correction
    epochs = config.refit_epochs
    # The same split over the processes as in `shard`.
    num_batches = int(all_reduce(torch.tensor(len(stream.batches()))))
    seqlen, num_own = stream.hidden_NTC.shape[1], stream.hidden_NTC.shape[:2].numel()
    start = shard_batches(num_batches).start * stream.batch_size * seqlen
    num_tokens = int(all_reduce(torch.tensor(num_own)))

    def steps(rows_T: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Input and target of this process's tokens, one step at a time."""
        is_own_T = (rows_T >= start) & (rows_T < start + num_own)
        pair = _input_and_target(dense, stream, correction, rows_T[is_own_T] - start)
        sizes = [int(part.sum()) for part in is_own_T.split(STEP_TOKENS)]
        return zip(*(tensor.split(sizes) for tensor in pair), strict=True)

    def tried_error() -> float:
        with torch.no_grad():
            errors = [_squared_error(ffn, *step) for step in steps(tried_T)]
            return float(all_reduce(torch.stack(errors).sum()))

    dtype = ffn.output.weight.dtype
    ffn.module.float()
    layers: list[Any] = [linear.module for linear in (*ffn.inputs.values(), ffn.output)]
    weights = [layer.weight.requires_grad_() for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    rates = [RATE * float(weight.square().mean().sqrt()) for weight in before]
    groups = [{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
    num_steps = epochs * -(-num_tokens // STEP_TOKENS)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1 - step / num_steps))
    generator = torch.Generator().manual_seed(config.seed + ffn.block)
    tried_T = torch.randperm(num_tokens, generator=generator)[:CHUNK_TOKENS]
    error = tried_error()
    for _ in range(epochs):
        for rows_T in torch.randperm(num_tokens, generator=generator).split(CHUNK_TOKENS):
            for step in steps(rows_T):
                gradients = torch.autograd.grad(_squared_error(ffn, *step), weights)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = all_reduce(gradient)
                optimizer.step()
                schedule.step()
    error_ratio = tried_error() / error if error else 1.0
    is_better = error_ratio < 1
    for weight, old in zip(weights, before, strict=True):
        weight.requires_grad_(False).grad = None
        if not is_better:
            weight.copy_(old)
    ffn.module.to(dtype)
    return error_ratio if is_better else 1.0


def _squared_error(ffn: Sublayer, input_TC: Tensor, target_TC: Tensor) -> Tensor:
    dtype, device = input_TC.dtype, input_TC.device
    # Gradients underflow in float16.
    products = torch.bfloat16 if dtype.itemsize < 4 else fast_dtype(device, dtype)
    with torch.autocast(device.type, products, enabled=products != torch.float32):
        output_TC = ffn.contribution(ffn.forward(input_TC))
    return (output_TC - target_TC).square().sum()


@torch.no_grad()
def _input_and_target(
    dense: Sublayer, stream: Stream, correction: float, rows_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Input and target of the FFN for some tokens; the target is in float32."""
    weight = dense.output.weight
    hidden_TC = stream.hidden_NTC.flatten(0, 1)[rows_T].to(weight.device)
    input_TC = dense.normed(stream.source.flatten(0, 1)[rows_T].to(weight.device))
    with autocast(weight):
        target_TC = dense.contribution(dense.forward(input_TC)).float()
    if stream.dense_NTC is not None:
        dense_TC = stream.dense_NTC.flatten(0, 1)[rows_T]
        target_TC.lerp_(dense_TC.to(target_TC) - hidden_TC, correction)
    return input_TC, target_TC

"""The refit of a pruned FFN against what its definition says."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_model, prune_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimgpt.calibration.activations import Stream, embed
from slimgpt.config import PruneConfig
from slimgpt.models.blocks import Block, bind
from slimgpt.models.sublayers import Sublayer
from slimgpt.models.units import Kept
from slimgpt.pruning import refit as module
from slimgpt.pruning.refit import refit
from slimgpt.pruning.slicing import slice_sublayer

NUM_CHANNELS = 48


def sample_tokens(num_samples: int, seqlen: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (num_samples, seqlen), generator=generator)


def first_block(
    variant: str, num_samples: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Block, Stream]:
    """A block with the stream in front of its FFN, and a dense stream somewhere else."""
    model = make_tiny_model(variant).to(dtype)
    stream = embed(model, sample_tokens(num_samples), num_samples // 8, with_dense=True)
    stream.dense_NTC += 0.1 * torch.randn(
        stream.dense_NTC.shape, generator=torch.Generator().manual_seed(2)
    )
    return next(iter(bind(model))), stream


def config(correction: float, epochs: int) -> PruneConfig:
    return PruneConfig.create(correction=correction, refit_epochs=epochs)


def cut(block: Block) -> Sublayer:
    """Slice the FFN; gives it as it was."""
    dense = replace(block.sublayers[1], module=copy.deepcopy(block.sublayers[1].module))
    kept = torch.arange(NUM_CHANNELS)
    slice_sublayer(block.sublayers[1], Kept(kept), block.sublayers[1].output.weight[:, kept])
    return dense


def squared_error(block: Block, stream: Stream, target: Tensor) -> float:
    output = block.sublayers[1].module(block.sublayers[1].norm(stream.hidden_NTC))
    return float((output - target).square().sum())


def test_gradients_may_be_off_around_it() -> None:
    block, stream = first_block("llama")
    dense = cut(block)
    with torch.no_grad():
        assert refit(block.sublayers[1], dense, stream, config(0.5, 1)) < 1


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("variant", ["llama", "llama-biases"])
@settings(derandomize=True, deadline=None, database=None, max_examples=5)
@given(correction=st.floats(0, 1))
def test_target(variant: str, correction: float) -> None:
    block, stream = first_block(variant, 16)
    dense = cut(block)
    rows_T = torch.tensor([3, 0, 700])
    input_TC, target_TC = module._input_and_target(dense, stream, correction, rows_T)
    output_NTC = dense.module(dense.norm(stream.hidden_NTC))
    residual_NTC = stream.dense_NTC - stream.hidden_NTC
    expected = (1 - correction) * output_NTC + correction * residual_NTC
    torch.testing.assert_close(target_TC, expected.flatten(0, 1)[rows_T])
    torch.testing.assert_close(input_TC, dense.norm(stream.hidden_NTC).flatten(0, 1)[rows_T])


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("variant", ["llama", "llama-biases"])
def test_the_output_comes_nearer_on_other_tokens_too(variant: str) -> None:
    block, stream = first_block(variant)
    dense = cut(block)
    sliced = [
        linear.weight.clone()
        for linear in (*block.sublayers[1].inputs.values(), block.sublayers[1].output)
    ]
    noise = torch.randn(stream.hidden_NTC.shape, generator=torch.Generator().manual_seed(3))
    other = replace(stream, hidden_NTC=stream.hidden_NTC + 0.1 * noise)
    goals = [dense.module(dense.norm(s.hidden_NTC)) for s in (stream, other)]
    before = [squared_error(block, *pair) for pair in zip((stream, other), goals, strict=True)]
    gain = refit(block.sublayers[1], dense, stream, config(0.0, 10))
    after = [squared_error(block, *pair) for pair in zip((stream, other), goals, strict=True)]
    assert gain < 0.8
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.95 * before[1]
    linears = [*block.sublayers[1].inputs.values(), block.sublayers[1].output]
    for linear, old in zip(linears, sliced, strict=True):
        assert not torch.equal(linear.weight, old)
        assert not linear.weight.requires_grad
        assert linear.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_stay_so(dtype: torch.dtype) -> None:
    block, stream = first_block("llama", dtype=dtype)
    dense = cut(block)
    assert refit(block.sublayers[1], dense, stream, config(0.5, 5)) < 0.9
    assert {p.dtype for p in block.sublayers[1].module.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in block.sublayers[1].module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stay_where_the_error_grows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RATE", 100.0)
    block, stream = first_block("llama", dtype=dtype)
    dense = cut(block)
    before = copy.deepcopy(block.sublayers[1].module.state_dict())
    assert refit(block.sublayers[1], dense, stream, config(0.5, 1)) == 1
    for name, tensor in block.sublayers[1].module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_only_what_loses_channels_is_refitted() -> None:
    widths = [(4, 64), (3, 64), (4, 24), (4, 64)]
    plans = {}
    for epochs in (0, 5):
        config = PruneConfig.create(refit_epochs=epochs)
        plans[epochs] = prune_blocks(make_tiny_model("llama"), sample_tokens(64), widths, config)
    assert [plan.sublayers[1].refit for plan in plans[0]] == [None] * 4
    first, second, third, fourth = plans[5]
    assert {p.sublayers[0].refit for p in plans[5]} == {None}
    assert (
        first.sublayers[1].refit is second.sublayers[1].refit is fourth.sublayers[1].refit is None
    )
    assert 0 < third.sublayers[1].refit < 1
